"""The test image's size, scale factor and interpolation."""

import mmcv
from mmdet.datasets.transforms import Resize
from mmengine.registry import TRANSFORMS

from ...layers._args import ConfigError
from .conventions import MMDET_V1, check_convention


@TRANSFORMS.register_module()
class LegacyResize(Resize):
    """mmdet's ``Resize`` that keeps the aspect ratio, as the convention does it.

    - ``'mmdet-v1'``: size and pixels are those of ``Resize(keep_ratio=True)``, but boxes are scaled by the one factor
      ``s = min(long limit / long side, short limit / short side)`` that was asked for. mmdet 3.x scales by the rounded
      sizes, (resized W / W, resized H / H); at the far border the two differ by up to half a pixel.
    - ``'maskrcnn-benchmark'``: short side = min(short limit, round(long limit * short / long)), long side = short side
      * long / short, *truncated*; Pillow's bilinear interpolation, which averages when it shrinks (antialiasing).
      Boxes are scaled per axis, by the resulting sizes.

    Args:
        scale: (long limit, short limit) in pixels, in any order, e.g. (1333, 800).
        convention: see above. Default: ``'mmdet-v1'``.
        clip_object_border: as in mmdet. Default: True.

    Raises:
        ConfigError: unknown convention, or ``scale`` is not a pair.
    """

    def __init__(self, scale: tuple[int, int], convention: str = MMDET_V1, clip_object_border: bool = True):
        self.convention = check_convention(self, convention)
        if not isinstance(scale, (tuple, list)) or len(scale) != 2:
            raise ConfigError(f'LegacyResize.scale={scale!r} must be (long limit, short limit), e.g. (1333, 800)')
        v1 = convention == MMDET_V1
        super().__init__(
            scale=tuple(scale),
            # Masks and label maps follow: by the same rule, or, where the size is computed here, to that size.
            keep_ratio=v1,
            clip_object_border=clip_object_border,
            backend='cv2' if v1 else 'pillow',
            interpolation='bilinear',
        )

    def _resize_img(self, results: dict) -> None:
        if results.get('img') is None:
            return
        height, width = results['img'].shape[:2]
        if self.convention == MMDET_V1:
            super()._resize_img(results)
            factor = mmcv.rescale_size((width, height), self.scale, return_scale=True)[1]
            results['scale_factor'] = (factor, factor)
        else:
            results['scale'] = _truncated_size(width, height, self.scale)
            super()._resize_img(results)
            results['keep_ratio'] = True

    def __repr__(self) -> str:
        return f'{type(self).__name__}(scale={self.scale}, convention={self.convention!r})'


def _truncated_size(width: int, height: int, scale: tuple[int, int]) -> tuple[int, int]:
    short, long = sorted((width, height))
    size = min(scale)
    if long / short * size > max(scale):
        size = round(max(scale) * short / long)
    if size == short:
        return width, height
    return (size, int(size * height / width)) if width < height else (int(size * width / height), size)
