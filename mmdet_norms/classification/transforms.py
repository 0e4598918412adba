"""Image transforms of classifiers that mmcv has not."""

import math

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmengine.structures import BaseDataElement


@TRANSFORMS.register_module()
class RandomResizedCrop(BaseTransform):
    """Crop a random part, resize it to a square (Szegedy et al., arXiv:1409.4842).

    Args:
        scale: side of the result, px.
        crop_ratio_range: area of the part over the image's. Default 8 to 100 %.
        aspect_ratio_range: width over height of the part. Default 3/4 to 4/3; ``(1, 1)`` crops squares.
        max_attempts: after which the largest part of an allowed ratio, in the centre, is taken.
        interpolation: as mmcv names them.
        backend: 'cv2' or 'pillow'.
    """

    def __init__(
        self,
        scale: int,
        crop_ratio_range: tuple[float, float] = (0.08, 1.0),
        aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
        max_attempts: int = 10,
        interpolation: str = 'bilinear',
        backend: str = 'cv2',
    ) -> None:
        self.scale, self.max_attempts = scale, max_attempts
        self.crop_ratio_range, self.aspect_ratio_range = crop_ratio_range, aspect_ratio_range
        self.interpolation, self.backend = interpolation, backend

    def transform(self, results: dict) -> dict:
        image = results['img']
        top, left, height, width = self._part(*image.shape[:2])
        image = mmcv.imcrop(image, np.array([left, top, left + width - 1, top + height - 1]))
        image = mmcv.imresize(image, (self.scale, self.scale), interpolation=self.interpolation, backend=self.backend)
        results['img'], results['img_shape'] = image, image.shape[:2]
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
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (height - h) // 2, (width - w) // 2, h, w


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
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        sample = BaseDataElement(metainfo={key: results[key] for key in self.meta_keys if key in results})
        if 'gt_label' in results:
            sample.gt_label = torch.tensor(results['gt_label'])
        return dict(inputs=image, data_samples=sample)
