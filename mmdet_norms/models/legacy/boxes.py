"""Anchors and boxes of the inclusive ("+1") world, stored as ``(x1, y1, x2 + 1, y2 + 1)``."""

import math
from collections.abc import Sequence

import torch
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import LegacyAnchorGenerator
from mmdet.structures.bbox import HorizontalBoxes, get_box_tensor
from mmengine.registry import TASK_UTILS
from torch import Tensor

from .conventions import MASKRCNN_BENCHMARK, MMDET_V1, check_convention


def boxes_to_original_image(boxes: Tensor, scale_factor: Sequence[float]) -> Tensor:
    """Boxes of the resized image in the original one, as both conventions do it: by their inclusive corners.

    ``x1 / s`` and ``x2 / s``, so ``x2' = (x2' - 1) / s + 1``; a width of ``w`` becomes ``(w - 1) / s + 1``.

    Args:
        boxes: (..., 4) as ``x1, y1, x2 + 1, y2 + 1``.
        scale_factor: resized / original size, ``(w_scale, h_scale)``.
    """
    scale = boxes.new_tensor(scale_factor).repeat(2)
    plus_one = boxes.new_tensor([0, 0, 1, 1])
    return (boxes - plus_one) / scale + plus_one


@TASK_UTILS.register_module()
class PlusOneAnchorGenerator(LegacyAnchorGenerator):
    """Anchors with whole-numbered inclusive corners, centred at ``(stride - 1) / 2``.

    For stride s, scale a and ratio r = h / w:

    - ``'mmdet-v1'``: ``w = a s / sqrt(r)``, ``h = a s sqrt(r)``, corners rounded. mmdet's ``LegacyAnchorGenerator``,
      with 1 added to x2 and y2.
    - ``'maskrcnn-benchmark'``: the box at scale 1 is rounded first, ``w = round(s / sqrt(r))``, ``h = round(w r)``
      (halves to even), then multiplied by a. Stride 4, ratio 0.5: 48 x 24, where ``'mmdet-v1'`` has 46 x 22.

    Args:
        convention: see above. Default: ``'mmdet-v1'``.
        center_offset: as in mmdet, 0.5 for both conventions. Default: 0.5.
        **kwargs: of mmdet's ``AnchorGenerator``: ``strides``, ``ratios``, ``scales``, ...

    Raises:
        ValueError: unknown convention.
    """

    def __init__(self, *args, convention: str = MMDET_V1, center_offset: float = 0.5, **kwargs):
        self.convention = check_convention(self, convention)
        super().__init__(*args, center_offset=center_offset, **kwargs)

    def gen_single_level_base_anchors(self, base_size, scales, ratios, center=None) -> Tensor:
        """(A, 4) anchors of one position as ``x1, y1, x2 + 1, y2 + 1``."""
        if self.convention == MMDET_V1:
            inclusive = super().gen_single_level_base_anchors(base_size, scales, ratios, center)
        else:
            inclusive = self._round_then_scale(base_size, scales, ratios, center)
        return inclusive + inclusive.new_tensor([0, 0, 1, 1])

    def _round_then_scale(self, base_size, scales, ratios, center) -> Tensor:
        if center is None:
            center = [self.center_offset * (base_size - 1)] * 2
        widths = (base_size**2 / ratios).sqrt().round()
        heights = (widths * ratios).round()
        sizes = torch.stack([widths, heights], 1)
        # Ratios outside, scales inside (scale_major), or the other way round.
        sizes = sizes[:, None] * scales[:, None] if self.scale_major else sizes * scales[:, None, None]
        half = (sizes.reshape(-1, 2) - 1) / 2
        center = half.new_tensor(center)
        return torch.cat([center - half, center + half], 1)


@TASK_UTILS.register_module()
class PlusOneDeltaXYWHBBoxCoder(DeltaXYWHBBoxCoder):
    """mmdet's ``DeltaXYWHBBoxCoder``, which on ``x2 + 1`` is the legacy coder, with the legacy limits.

    - Clipping: x1 and the inclusive x2 to [0, W - 1], so ``x2'`` to [1, W]. A box beside the image keeps one pixel,
      where the stock coder leaves it empty.
    - dw and dh: ``'mmdet-v1'`` limits them to ± log(1000 / 16) as mmdet still does; ``'maskrcnn-benchmark'`` only from
      above.

    Args:
        convention: see above. Default: ``'mmdet-v1'``.
        **kwargs: of mmdet's ``DeltaXYWHBBoxCoder``: ``target_means``, ``target_stds``, ``clip_border``, ...

    Raises:
        ValueError: unknown convention.
    """

    def __init__(self, *args, convention: str = MMDET_V1, **kwargs):
        super().__init__(*args, **kwargs)
        self.convention = check_convention(self, convention)

    def decode(self, bboxes, pred_bboxes, max_shape=None, wh_ratio_clip=16 / 1000):
        """Boxes from deltas.

        Args:
            bboxes: (N, 4) as ``x1, y1, x2 + 1, y2 + 1``.
            pred_bboxes: (N, 4 * classes) deltas ``dx, dy, dw, dh``.
            max_shape: (H, W) of the image; None: do not clip.
            wh_ratio_clip: smallest ratio of a side before and after; its inverse is the largest.

        Returns:
            (N, 4 * classes) as ``x1, y1, x2 + 1, y2 + 1``.
        """
        if self.convention == MASKRCNN_BENCHMARK:
            pred_bboxes = self._limit_growth(pred_bboxes, -math.log(wh_ratio_clip))
            wh_ratio_clip = 1e-30  # no lower limit: in float32, exp(-69) times any box is an empty one
        boxes = get_box_tensor(super().decode(bboxes, pred_bboxes, None, wh_ratio_clip))
        if self.clip_border and max_shape is not None:
            height, width = max_shape[:2]
            lowest = boxes.new_tensor([0, 0, 1, 1])
            highest = boxes.new_tensor([width - 1, height - 1, width, height])
            boxes = boxes.reshape(-1, 4).minimum(highest).maximum(lowest).reshape(boxes.shape)
        return HorizontalBoxes(boxes) if self.use_box_type else boxes

    def _limit_growth(self, deltas: Tensor, limit: float) -> Tensor:
        most = [(limit - mean) / std for mean, std in zip(self.means[2:], self.stds[2:])]
        return deltas.reshape(-1, 4).minimum(deltas.new_tensor([math.inf, math.inf, *most])).reshape(deltas.shape)
