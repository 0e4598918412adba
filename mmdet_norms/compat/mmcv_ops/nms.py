"""Non-maximum suppression in plain PyTorch, with the signatures of mmcv's compiled ops."""

import torch
from torch import Tensor

from .sparse import at_least_fp32

# Boxes that nms settles at a time, to hold so many rows of the IoU matrix: on CPU few, for its
# caches; on GPU eight times as many, since each block costs a few waits for the device.
NMS_BLOCK = 128


def _pairwise_iou(a: Tensor, b: Tensor, offset: int = 0) -> Tensor:
    """IoU of boxes ``a`` (N, 4) with ``b`` (M, 4); a side is ``x2 - x1 + offset``."""
    inter = torch.minimum(a[:, None, 2], b[:, 2]).sub_(torch.maximum(a[:, None, 0], b[:, 0]))
    height = torch.minimum(a[:, None, 3], b[:, 3]).sub_(torch.maximum(a[:, None, 1], b[:, 1]))
    inter.add_(offset).clamp_(min=0).mul_(height.add_(offset).clamp_(min=0))
    area_a = (a[:, 2] - a[:, 0] + offset) * (a[:, 3] - a[:, 1] + offset)
    area_b = (b[:, 2] - b[:, 0] + offset) * (b[:, 3] - b[:, 1] + offset)
    return inter.div_(torch.add(area_a[:, None], area_b, out=height).sub_(inter))


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy NMS: by descending score, keep a box unless IoU > threshold with a kept one.

    Args:
        boxes: (N, 4) as ``x1, y1, x2, y2``. ``scores``: (N,); of equal ones the first is better.
        offset: 0, or 1 for sides counted as ``x2 - x1 + 1``.

    Returns:
        (K,) int64 indices of the kept boxes by descending score, on the device of ``boxes``.
    """
    order = scores.sort(descending=True, stable=True).indices
    block = NMS_BLOCK if boxes.device.type == 'cpu' else 8 * NMS_BLOCK
    rest = order
    candidates = at_least_fp32(boxes)[order]
    kept = []
    while rest.numel():
        head = candidates[:block]
        # overlaps[j, i]: the better box j would suppress i.
        overlaps = (_pairwise_iou(head, head, offset) > iou_threshold).float().triu_(1)
        # Greedy NMS is the one fixed point of keep[i] = no kept j < i overlaps i: each sweep
        # settles at least the next box of every chain, so this ends after the longest chain.
        keep = head.new_ones(len(head), dtype=torch.bool)
        while True:
            update = keep.float() @ overlaps == 0
            if torch.equal(update, keep):
                break
            keep = update
        kept.append(rest[:block][keep])
        rest, candidates = rest[block:], candidates[block:]
        if rest.numel():
            alive = ~(_pairwise_iou(head[keep], candidates, offset) > iou_threshold).any(0)
            rest, candidates = rest[alive], candidates[alive]
    return torch.cat(kept) if kept else order


@torch.no_grad()
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS: take the best box, lower the scores of the others by their overlap, repeat.

    The factor is ``[iou < t]`` (method 0, naive), ``1 - iou`` where ``iou >= t`` (1, linear) or
    ``exp(-iou**2 / sigma)`` (2, gaussian); a box whose score falls below ``min_score`` is out.

    Args:
        boxes: (N, 4). ``scores``: (N,).
        dets: (N, 5), written in place: row k is the k-th picked box and its final score.

    Returns:
        (K,) int64 indices of the picked boxes in the order picked; rows K.. of dets are undefined.
    """
    inds = torch.arange(len(boxes), device=boxes.device)
    # Columns x1, y1, x2, y2, score.
    left = at_least_fp32(torch.cat((boxes, scores[:, None]), 1))
    picked = []
    while len(left):
        best = int(left[:, 4].argmax())
        # The compiled op swaps the pick to the front; later ties are resolved in that order.
        left[[0, best]], inds[[0, best]] = left[[best, 0]], inds[[best, 0]]
        dets[len(picked)] = left[0]
        picked.append(inds[0])
        # 0 / 0 between empty boxes: no overlap.
        iou = _pairwise_iou(left[:1, :4], left[1:, :4], offset)[0].nan_to_num_(nan=0)
        left, inds = left[1:], inds[1:]
        if method == 2:
            left[:, 4] *= torch.exp(-(iou**2) / sigma)
        else:
            left[:, 4] *= torch.where(iou >= iou_threshold, (1 - iou) * method, 1)
        alive = ~(left[:, 4] < min_score)
        count = int(alive.sum())
        # Also as compiled: gaps are filled with the survivors from the far end.
        slots = torch.arange(count, device=boxes.device)
        slots[~alive[:count]] = alive[count:].nonzero()[:, 0].flip(0) + count
        left, inds = left[slots], inds[slots]
    return torch.stack(picked) if picked else inds
