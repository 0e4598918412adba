"""Image transforms of classifiers that mmcv has not."""

import math
from collections.abc import Sequence

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmengine.structures import BaseDataElement

from ..console import as_text
from ..errors import UserError

# Principal components of ImageNet's pixels, R, G, B in 0 to 255 (Krizhevsky et al. 2012); directions are columns.
_DEVIATIONS = np.array([55.4625, 4.7940, 1.1475])
_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@TRANSFORMS.register_module()
class RandomResizedCrop(BaseTransform):
    """Crop a random part, resize it (Szegedy et al., arXiv:1409.4842), as torchvision's transform of that name.

    Args:
        scale: of the result, px: the side of a square, or ``(width, height)``.
        crop_ratio_range: area of the part over the image's. Default 8 to 100 %.
        aspect_ratio_range: width over height of the part. Default 3/4 to 4/3; ``(1, 1)`` crops squares.
        max_attempts: after which the largest part of an allowed ratio, in the centre, is taken.
        interpolation: as mmcv names them.
        backend: 'cv2', or 'pillow', which averages over all pixels where it makes an image smaller. Default 'cv2'.
    """

    def __init__(
        self,
        scale: int | Sequence[int],
        crop_ratio_range: tuple[float, float] = (0.08, 1.0),
        aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
        max_attempts: int = 10,
        interpolation: str = 'bilinear',
        backend: str = 'cv2',
    ) -> None:
        self.scale = (scale, scale) if isinstance(scale, int) else tuple(scale)
        if len(self.scale) != 2 or not all(isinstance(side, int) and side > 0 for side in self.scale):
            raise UserError(f'RandomResizedCrop: scale={scale!r} must be a side in px, or (width, height)')
        for key, (low, high), most in (
            ('crop_ratio_range', crop_ratio_range, 1),
            ('aspect_ratio_range', aspect_ratio_range, math.inf),
        ):
            if not 0 < low <= high <= most:
                raise UserError(
                    f'RandomResizedCrop: {key}=({low!r}, {high!r}) must be two rising numbers in 0 to {most}'
                )
        self.max_attempts = max_attempts
        self.crop_ratio_range, self.aspect_ratio_range = crop_ratio_range, aspect_ratio_range
        self.how = dict(interpolation=interpolation, backend=backend)
        try:
            mmcv.imresize(np.zeros((1, 1, 3), np.uint8), (1, 1), **self.how)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"RandomResizedCrop: interpolation={interpolation!r}, backend={backend!r}: mmcv has 'bilinear', "
                "'bicubic', 'nearest', 'lanczos' and others, and 'cv2' and 'pillow'"
            ) from error

    def transform(self, results: dict) -> dict:
        top, left, height, width = self._part(*results['img'].shape[:2])
        results['img'] = mmcv.imresize(results['img'][top : top + height, left : left + width], self.scale, **self.how)
        results['img_shape'] = results['img'].shape[:2]
        return results

    def _part(self, height: int, width: int) -> tuple[int, int, int, int]:
        low, high = self.aspect_ratio_range
        for _ in range(self.max_attempts):
            area = height * width * np.random.uniform(*self.crop_ratio_range)
            ratio = math.exp(np.random.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return np.random.randint(height - h + 1), np.random.randint(width - w + 1), h, w
        ratio = min(max(width / height, low), high)
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w


@TRANSFORMS.register_module()
class ColorJitter(BaseTransform):
    """Random brightness, contrast and saturation, in random order, as torchvision's transform of that name.

    Each blends the image with black, with its mean grey, or with its grey values: ``f * image + (1 - f) * other``.

    Args:
        brightness, contrast, saturation: ``f`` is drawn from ``max(0, 1 - value)`` to ``1 + value``, or from a range
            that is given. Default 0: none.
    """

    def __init__(
        self,
        brightness: float | Sequence[float] = 0.0,
        contrast: float | Sequence[float] = 0.0,
        saturation: float | Sequence[float] = 0.0,
    ) -> None:
        self.ranges = []
        for key, value, adjust in (
            ('brightness', brightness, mmcv.adjust_brightness),
            ('contrast', contrast, mmcv.adjust_contrast),
            ('saturation', saturation, mmcv.adjust_color),
        ):
            low, high = (max(0, 1 - value), 1 + value) if isinstance(value, (int, float)) else value
            if not 0 <= low <= high:
                raise UserError(f'ColorJitter: {key}={value!r} must be at least 0, or a range such as (0.6, 1.4)')
            if (low, high) != (1, 1):
                self.ranges.append((adjust, low, high))

    def transform(self, results: dict) -> dict:
        for place in np.random.permutation(len(self.ranges)):
            adjust, low, high = self.ranges[place]
            results['img'] = adjust(results['img'], np.random.uniform(low, high), backend='cv2')
        return results


@TRANSFORMS.register_module()
class Lighting(BaseTransform):
    """Add a random colour to the whole image, along the principal components of ImageNet's (Krizhevsky et al. 2012).

    The image becomes float32 and is not clipped. Its channels are B, G, R in 0 to 255, as ``LoadImageFromFile`` gives
    them.

    Args:
        alphastd: standard deviation of the weight of each component. Default 0.1.
    """

    def __init__(self, alphastd: float = 0.1) -> None:
        if not 0 <= alphastd < math.inf:
            raise UserError(f'Lighting: alphastd={alphastd!r} must be at least 0')
        self.alphastd = alphastd

    def transform(self, results: dict) -> dict:
        colour = _DIRECTIONS @ (np.random.normal(0, self.alphastd, 3) * _DEVIATIONS)
        results['img'] = results['img'].astype(np.float32) + colour[::-1].astype(np.float32)
        return results


@TRANSFORMS.register_module()
class PackClsInputs(BaseTransform):
    """The image as a ``(3, H, W)`` tensor, and a sample with ``gt_label``.

    Args:
        meta_keys: what else the sample keeps.
    """

    def __init__(self, meta_keys: tuple[str, ...] = ('img_path', 'ori_shape', 'img_shape')) -> None:
        self.meta_keys = meta_keys

    def transform(self, results: dict) -> dict:
        image = results['img']
        if image.ndim != 3 or image.shape[2] != 3:
            name = as_text(results.get('img_path'))
            raise UserError(
                f'PackClsInputs: the image {name} is of shape {image.shape}, not (H, W, 3); write '
                "dict(type='LoadImageFromFile', color_type='color')"
            )
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        sample = BaseDataElement(metainfo={key: results[key] for key in self.meta_keys if key in results})
        if 'gt_label' in results:
            sample.gt_label = torch.tensor(results['gt_label'])
        return dict(inputs=image, data_samples=sample)
