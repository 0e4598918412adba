"""From the network's outputs to boxes and masks of the original image, in the inclusive ("+1") world."""

import torch
import torch.nn.functional as F
from mmdet.models.layers import multiclass_nms
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmengine.structures import InstanceData
from torch import Tensor

from ...registry import MODELS
from ..heads import NormFCNMaskHead, NormShared4Conv1FCBBoxHead
from .boxes import boxes_to_original_image
from .conventions import MMDET_V1, check_convention


class _PlusOneBoxes:
    """Mixin for mmdet's ``BBoxHead``: its ``convention`` says how boxes get back to the original image."""

    def __init__(self, *args, convention: str = MMDET_V1, **kwargs):
        check_convention(self, convention)
        super().__init__(*args, **kwargs)
        self.convention = convention

    def _predict_by_feat_single(
        self, roi, cls_score, bbox_pred, img_meta, rescale=False, rcnn_test_cfg=None
    ) -> InstanceData:
        single = super()._predict_by_feat_single
        if len(roi) == 0:
            return single(roi, cls_score, bbox_pred, img_meta, rescale, rcnn_test_cfg)
        # Without a test_cfg mmdet returns all boxes of all classes, before NMS.
        results = single(roi, cls_score, bbox_pred, img_meta, rescale=False, rcnn_test_cfg=None)
        resized, scores = results.bboxes, results.scores
        original = boxes_to_original_image(resized.view(-1, 4), img_meta.get('scale_factor', (1.0, 1.0)))
        original = original.view(resized.shape)
        wanted = original if rescale else resized
        if rcnn_test_cfg is None:
            results.bboxes = wanted
            return results
        detections, labels, picked = multiclass_nms(
            original if self.convention == MMDET_V1 else resized,
            scores,
            rcnn_test_cfg.score_thr,
            rcnn_test_cfg.nms,
            rcnn_test_cfg.max_per_img,
            return_inds=True,
        )
        # ``picked`` counts (RoI, class) pairs; class-agnostic boxes are one per RoI.
        classes_per_box = (scores.shape[1] - 1) * 4 // resized.shape[1]
        boxes = wanted.view(-1, 4)[picked // classes_per_box]
        return InstanceData(bboxes=boxes, scores=detections[:, -1], labels=labels)


@MODELS.register_module()
class PlusOneShared4Conv1FCBBoxHead(_PlusOneBoxes, NormShared4Conv1FCBBoxHead):
    """``(Norm)Shared4Conv1FCBBoxHead`` with the legacy way back to the original image.

    Boxes go back by :func:`boxes_to_original_image`. NMS sees them in the original image in ``'mmdet-v1'`` (with masks
    too, and whether or not the result is rescaled), in the resized one in ``'maskrcnn-benchmark'``: 1 pixel more in
    every side is more of a small box than of a large one, so the IoU of two boxes differs.

    Args:
        convention: see above. Default: ``'mmdet-v1'``.
        **kwargs: of the stock head. Its ``bbox_coder`` should be a :class:`PlusOneDeltaXYWHBBoxCoder`.

    Raises:
        ValueError: unknown convention.
    """


@MODELS.register_module()
class PlusOneShared2FCBBoxHead(_PlusOneBoxes, Shared2FCBBoxHead):
    """``Shared2FCBBoxHead``; otherwise as :class:`PlusOneShared4Conv1FCBBoxHead`."""


@MODELS.register_module()
class PlusOneFCNMaskHead(NormFCNMaskHead):
    """``(Norm)FCNMaskHead`` that pastes masks as the convention does: into boxes of whole pixels.

    The probabilities (M, M), M = 28, are resized bilinearly to the pixels of the box and set where they are greater
    than ``mask_thr_binary``. Corners (inclusive, in the original image) are truncated to whole numbers, in
    ``'maskrcnn-benchmark'`` after a border of one zero is put around the probabilities and the box is enlarged by
    (M + 2) / M about its centre. Pixels outside the image are dropped.

    Args:
        convention: see above. Default: ``'mmdet-v1'``.
        **kwargs: of mmdet's ``FCNMaskHead``.

    Raises:
        ValueError: unknown convention.
    """

    def __init__(self, *args, convention: str = MMDET_V1, **kwargs):
        check_convention(self, convention)
        super().__init__(*args, **kwargs)
        self.convention = convention

    def _predict_by_feat_single(
        self, mask_preds, bboxes, labels, img_meta, rcnn_test_cfg, rescale=False, activate_map=False
    ) -> Tensor:
        """(N, H, W) masks: bool, or 0 to 255 for a negative ``mask_thr_binary``. With ``rescale``, ``bboxes`` are
        rescaled in place, as in mmdet."""
        height, width = img_meta['ori_shape'][:2]
        if rescale:
            bboxes.copy_(boxes_to_original_image(bboxes, img_meta['scale_factor']))
        else:
            w_scale, h_scale = img_meta['scale_factor']
            height, width = round(height * h_scale), round(width * w_scale)
        # With activate_map they are probabilities already, those of test-time augmentation.
        probabilities = torch.as_tensor(mask_preds, device=bboxes.device)
        if not activate_map:
            probabilities = probabilities.sigmoid()
        rows = torch.arange(len(bboxes), device=bboxes.device)
        probabilities = probabilities[rows, 0 if self.class_agnostic else labels].float()
        corners = bboxes - bboxes.new_tensor([0, 0, 1, 1])
        if self.convention != MMDET_V1:
            probabilities, corners = _pad(probabilities, corners)
        threshold = rcnn_test_cfg.mask_thr_binary
        masks = torch.zeros(
            len(bboxes), height, width, device=bboxes.device, dtype=torch.bool if threshold >= 0 else torch.uint8
        )
        for mask, probability, box in zip(masks, probabilities, corners.int().tolist()):
            _paste(mask, probability, box, threshold)
        return masks


def _pad(probabilities: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """A border of one zero around the probabilities (N, M, M), and the boxes (N, 4) enlarged accordingly."""
    size = probabilities.shape[-1]
    center = (corners[:, :2] + corners[:, 2:]) / 2
    half = (corners[:, 2:] - corners[:, :2]) / 2 * ((size + 2) / size)
    return F.pad(probabilities, (1, 1, 1, 1)), torch.cat([center - half, center + half], 1)


def _paste(mask: Tensor, probability: Tensor, box: list[int], threshold: float) -> None:
    """Write one instance into ``mask`` (H, W). ``box``: inclusive corners."""
    x1, y1, x2, y2 = box
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    left, right = max(x1, 0), min(x1 + width, mask.shape[1])
    top, bottom = max(y1, 0), min(y1 + height, mask.shape[0])
    if left >= right or top >= bottom:
        return
    patch = F.interpolate(probability[None, None], size=(height, width), mode='bilinear', align_corners=False)[0, 0]
    patch = patch[top - y1 : bottom - y1, left - x1 : right - x1]
    mask[top:bottom, left:right] = patch > threshold if threshold >= 0 else patch * 255
