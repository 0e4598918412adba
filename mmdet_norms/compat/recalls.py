"""Recall of proposals: what mmdet's ``eval_recalls`` cannot do since numpy 1.24.

It puts the overlaps of all images into one array, and numpy no longer makes arrays of rows of different lengths; two
images with different numbers of boxes are enough. ``metric='proposal_fast'`` of COCO, which mmdet's RPN configs have,
and ``metric='recall'`` of VOC end in it.
"""

import numpy as np
from mmdet.evaluation.functional import bbox_overlaps, print_recall_summary
from mmdet.evaluation.functional.recall import set_recall_param


def eval_recalls(
    gts, proposals, proposal_nums=None, iou_thrs=0.5, logger=None, use_legacy_coordinate=False
) -> np.ndarray:
    """The share of boxes that proposals overlap, each by one of its own: the best pair is matched first, then the next.

    Args:
        gts: (n, 4) boxes of each image, or None.
        proposals: (k, 4) of each image, best first, or (k, 5) with scores.
        proposal_nums: how many of an image's best proposals count; one row of the result for each.
        iou_thrs: which overlap counts; one column of the result for each.
        logger: where the summary is printed.
        use_legacy_coordinate: a box of mmdet 1 is one pixel larger.

    Returns:
        Recalls, (len(proposal_nums), len(iou_thrs)); NaN without boxes.
    """
    assert len(gts) == len(proposals)
    proposal_nums, iou_thrs = set_recall_param(proposal_nums, iou_thrs)
    overlaps = []
    for boxes, found in zip(gts, proposals):
        if boxes is None or not len(boxes):
            continue
        if found.ndim == 2 and found.shape[1] == 5:
            found = found[np.argsort(found[:, 4])[::-1]]
        found = found[: proposal_nums.max(), :4]
        overlaps.append(bbox_overlaps(boxes, found, use_legacy_coordinate=use_legacy_coordinate))
    matched = [np.concatenate([_matched(ious[:, :n]) for ious in overlaps] or [np.zeros(0)]) for n in proposal_nums]
    with np.errstate(invalid='ignore'):
        recalls = np.array([[np.divide((best >= thr).sum(), len(best)) for thr in iou_thrs] for best in matched])
    print_recall_summary(recalls, proposal_nums, iou_thrs, logger=logger)
    return recalls


def _matched(ious: np.ndarray) -> np.ndarray:
    """The overlaps (n,) of the pairs of boxes (rows) and proposals (columns), 0 for boxes that get none."""
    ious, best = ious.copy(), np.zeros(len(ious))
    for i in range(min(ious.shape)):
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        best[i] = ious[row, column]
        ious[row, :] = ious[:, column] = -1
    return best
