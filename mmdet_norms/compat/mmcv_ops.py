"""The compiled mmcv ops that common detectors need, in plain PyTorch.

``mmcv-lite`` installs without a compiler but has no ``mmcv._ext``, so ``mmcv.ops`` and with it
``mmdet.models`` do not import. :func:`install` puts a stand-in for ``mmcv._ext`` in place. It
supplies the ops of Faster, Mask, Cascade and Cascade Mask R-CNN and RetinaNet, and deformable
convolution (see :data:`SUPPLIED`), on CPU and GPU; any other op raises
:class:`NotImplementedError` when called.
A compiled mmcv, where there is one, is left alone and used.

The functions here have the signatures that mmcv's Python wrappers call: results are written into
the tensors passed in. Autograd comes from the wrappers (``mmcv.ops.roi_align`` and so on).
"""

import functools
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import NamedTuple

try:
    import mmcv
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mmdet_norms needs mmcv: pip install 'mmcv>=2.0.0,<2.2.0' (compiled ops) or 'mmcv-lite>=2.0.0,<2.2.0' "
        '(no compiler needed), not both'
    ) from error
import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

EXT_NAME = 'mmcv._ext'
# Boxes that nms settles at a time, to hold so many rows of the IoU matrix: on CPU few, for its
# caches; on GPU eight times as many, since each block costs a few waits for the device.
NMS_BLOCK = 128
# Non-zeros of the RoIAlign matrix held at a time; one takes about 100 bytes in temporaries.
ROI_ALIGN_BUDGET = 4_000_000
_REMEDY = (
    'For all ops replace mmcv-lite by the full mmcv: `pip uninstall mmcv-lite`, then `pip install '
    "'mmcv>=2.0.0,<2.2.0'` (a wheel for your torch and CUDA, or 10-40 minutes of building)."
)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- Non-maximum suppression ---
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
    candidates = _at_least_fp32(boxes)[order]
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
    left = _at_least_fp32(torch.cat((boxes, scores[:, None]), 1))
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


# --- RoIAlign ---
class _Taps(NamedTuple):
    """What each bin reads along one axis: (R, bins, K), of which the first ``count`` are valid."""

    pixel: Tensor
    weight: Tensor
    count: Tensor


def _axis_taps(start: Tensor, length: Tensor, bins: int, sampling_ratio: int, size: int) -> _Taps:
    """Interpolation weights of every bin along one axis of ``size`` pixels.

    Args:
        start, length: (R,) RoI extent in pixels of the feature map.
    """
    bin_size = length / bins
    grid = bin_size.ceil() if sampling_ratio <= 0 else torch.full_like(bin_size, sampling_ratio)
    # RoIs that are inverted or not finite have no samples.
    grid = torch.where(grid.isfinite(), grid, 0).clamp_(min=0)
    most = int(grid.max()) if len(grid) else 0
    bin_size, grid = bin_size[:, None, None], grid[:, None, None]
    divisor = grid.clamp(min=1)
    sample = torch.arange(most, device=start.device, dtype=start.dtype)
    # Surplus samples of RoIs with a smaller grid repeat the last one, at weight zero.
    used = torch.minimum(sample, grid - 1)
    at = (
        start[:, None, None]
        + torch.arange(bins, device=start.device)[:, None] * bin_size
        + (used + 0.5) * bin_size / divisor
    )
    inside = (sample < grid) & (at >= -1) & (at <= size)
    share = inside / divisor
    at = at.nan_to_num_(nan=0).clamp_(0, size - 1)
    low = at.floor().clamp_(max=max(size - 2, 0))
    high_share = (at - low) * share
    # Merge what neighbouring samples share: a sample moves on by 0, 1 or 2 (= no overlap) taps.
    step = low.diff(dim=2, prepend=low[:, :, :1])
    slot = torch.where((step == 0) | (step == 1), step, 2).long().cumsum(2)
    taps = int(slot.max()) + 2 if slot.numel() else 0
    weight = at.new_zeros(*at.shape[:2], taps)
    weight.scatter_add_(2, slot, share - high_share).scatter_add_(2, slot + 1, high_share)
    pixel = slot.new_zeros(weight.shape)
    low = low.long()
    pixel.scatter_(2, slot + 1, (low + 1).clamp_(max=size - 1)).scatter_(2, slot, low)
    count = (slot[:, :, -1] + 2) * inside.any(2) if taps else slot.sum(2)
    return _Taps(pixel, weight, count)


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For groups of ``counts`` members: the group of each member and its number in the group."""
    group = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return group, torch.arange(len(group), device=counts.device) - first[group]


def _roi_align_matrix(
    rois: Tensor, shape: torch.Size, bins: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """RoIAlign as a sparse matrix; it is linear in the features.

    A bin is the mean of bilinear samples on a grid. Both are products of a y and an x part, so
    pixel (y, x) has the weight ``wy[y] * wx[x]`` in the bin, with 1-D weights per RoI and axis.

    Yields:
        Chunks of RoIs: their slice, and the non-zeros sorted by bin as (bin within the chunk in
        (r, bin_h, bin_w) order, pixel in (n, h, w) order, weight).
    """
    height, width = shape[2:]
    bins_h, bins_w = bins
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, length = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        length = length.clamp(min=1)
    ys = _axis_taps(start[:, 1], length[:, 1], bins_h, sampling_ratio, height)
    xs = _axis_taps(start[:, 0], length[:, 0], bins_w, sampling_ratio, width)
    image_row = rois[:, 0].long()[:, None, None] * height
    total = (ys.count.sum(1) * xs.count.sum(1)).cumsum(0)
    stop = 0
    for size in torch.unique_consecutive(total // ROI_ALIGN_BUDGET, return_counts=True)[1].tolist():
        part = slice(stop, stop + size)
        stop += size
        # A line is the pixels of one row in one bin: expand bins to lines, lines to pixels.
        line_bin, y_at = _expand(ys.count[part, :, None].expand(-1, -1, bins_w).reshape(-1))
        y_at += line_bin // bins_w * ys.pixel.shape[2]
        line_pixel = ((image_row[part] + ys.pixel[part]) * width).view(-1)[y_at]
        line_weight = ys.weight[part].view(-1)[y_at]
        line_x = line_bin // (bins_h * bins_w) * bins_w + line_bin % bins_w
        line, x_at = _expand(xs.count[part].view(-1)[line_x])
        x_at += (line_x * xs.pixel.shape[2])[line]
        yield (
            part,
            line_bin[line],
            line_pixel[line] + xs.pixel[part].view(-1)[x_at],
            line_weight[line] * xs.weight[part].view(-1)[x_at],
        )


def _sparse_matmul(row: Tensor, column: Tensor, weight: Tensor, rows: int, dense: Tensor) -> Tensor:
    """``out[i] = sum of weight * dense[column] where row == i``; ``row`` must be sorted."""
    counts = torch.bincount(row, minlength=rows)
    return F.embedding_bag(column, dense, counts.cumsum(0) - counts, mode='sum', per_sample_weights=weight)


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "roi_align with pool_mode='max' is not among the PyTorch ops of mmdet_norms, which "
            f"know pool_mode='avg'. {_REMEDY}"
        )


@torch.no_grad()
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign: each bin of a RoI is the mean of a grid of bilinear samples.

    Samples outside [-1, size] count as 0. Half precision is computed in fp32 and rounded once.
    RoIs without samples (not finite, or aligned and adaptive without positive size) give 0.

    Args:
        input: (N, C, H, W).
        rois: (R, 5) as ``image index, x1, y1, x2, y2``.
        output: (R, C, aligned_height, aligned_width), written in place.
        argmax_y, argmax_x: Of max pooling; unused.
        spatial_scale: Feature map size / image size.
        sampling_ratio: Samples per bin and axis; 0: ``ceil(bin size)`` for each RoI and axis.
        pool_mode: 1 (mean).
        aligned: Shift RoIs by half a pixel; otherwise they are at least one pixel in size.

    Raises:
        NotImplementedError: For ``pool_mode=0`` (max).
    """
    _check_pool_mode(pool_mode)
    channels = input.shape[1]
    pixels = _at_least_fp32(input).permute(0, 2, 3, 1).reshape(-1, channels)
    for part, bin_, pixel, weight in _roi_align_matrix(
        rois.to(pixels), input.shape, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned
    ):
        out = output[part].permute(0, 2, 3, 1)
        out.copy_(_sparse_matmul(bin_, pixel, weight, out[..., 0].numel(), pixels).view(out.shape))


@torch.no_grad()
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` by ``input``, written into ``grad_input``."""
    _check_pool_mode(pool_mode)
    channels = grad_output.shape[1]
    grads = _at_least_fp32(grad_output).permute(0, 2, 3, 1)
    total = grads.new_zeros(grad_input[:, 0].numel(), channels)
    for part, bin_, pixel, weight in _roi_align_matrix(
        rois.to(grads), grad_input.shape, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned
    ):
        # The transposed product. Sorted sums, not atomic adds, so runs repeat exactly on a GPU.
        pixel, order = pixel.sort(stable=True)
        total += _sparse_matmul(pixel, bin_[order], weight[order], len(total), grads[part].reshape(-1, channels))
    image = grad_input.permute(0, 2, 3, 1)
    image.copy_(total.view(image.shape))


# --- Focal loss ---
def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Per logit the sign of the truth and its alpha factor times the weight."""
    hit = target[:, None] == torch.arange(input.shape[1], device=input.device)
    factor = torch.full_like(_at_least_fp32(input), 1 - alpha).masked_fill_(hit, alpha)
    if weight.numel():
        factor *= weight[target][:, None]
    return torch.where(hit, 1, -1), factor


@torch.no_grad()
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss ``-a * (1 - p)**gamma * log(p)`` per logit, written into ``output``.

    ``p`` is the probability of the truth: ``sigmoid(x)`` with ``a = alpha`` for the target class,
    ``sigmoid(-x)`` with ``a = 1 - alpha`` for the others.

    Args:
        input: (N, C) logits. ``output``: (N, C).
        target: (N,) int64 class; C means background.
        weight: (C,) factor by target class, or empty.
    """
    sign, factor = _focal_terms(input, target, weight, alpha)
    x = _at_least_fp32(input) * sign
    output.copy_(-factor * torch.sigmoid(-x) ** gamma * F.logsigmoid(x))


@torch.no_grad()
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient ``-a * (1 - p)**gamma * (1 - p - gamma * p * log(p))`` of the loss by the logit."""
    sign, factor = _focal_terms(input, target, weight, alpha)
    x = _at_least_fp32(input) * sign
    miss = torch.sigmoid(-x)
    slope = miss - gamma * torch.sigmoid(x) * F.logsigmoid(x)
    grad_input.copy_(-factor * sign * miss**gamma * slope)


# --- Deformable convolution ---
class _Deform(NamedTuple):
    """Settings of a deformable convolution; pairs are (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int


class _Reads(NamedTuple):
    """What a deformable convolution reads in one image: R = places x taps x deformable groups, in this order."""

    pixels: Tensor  # (H * W * deform_groups, C / deform_groups)
    index: Tensor  # (R, 4): the four neighbours among the pixels
    weight: Tensor  # (R, 4)
    slopes: tuple[Tensor, Tensor]  # (R, 4) each: derivatives of the weight by y and by x

    def sum(self, weight: Tensor) -> Tensor:
        """The weighted sums (R, C / deform_groups) of the neighbours."""
        return F.embedding_bag(self.index, self.pixels, mode='sum', per_sample_weights=weight)

    def spread(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The transposed of :meth:`sum`. Sorted sums, not atomic adds, so runs repeat exactly on a GPU."""
        pixel, order = self.index.view(-1).sort(stable=True)
        return _sparse_matmul(pixel, order // 4, weight.reshape(-1)[order], len(self.pixels), grad)


def _neighbours(at: Tensor, inside: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, for each place two of them: pixel, bilinear weight, and the weight's derivative by the place."""
    at = torch.where(inside, at, 0)
    low = at.floor()
    pixel = torch.stack((low, low + 1), -1).long()
    # Off the image there are zeros.
    there = inside[..., None] & (pixel >= 0) & (pixel < size)
    share, one = at - low, torch.ones_like(at)
    weight = torch.stack((1 - share, share), -1) * there
    return pixel.clamp_(0, size - 1), weight, torch.stack((-one, one), -1) * there


def _deform_reads(image: Tensor, offset: Tensor, how: _Deform) -> _Reads:
    """Bilinear reads of all taps: tap i at place p reads at ``p * stride - padding + i * dilation + offset``.

    As compiled, a place counts if it is less than one pixel off the image, and the derivative at a pixel is that to
    the next one; both matter, since offsets start at 0.

    Args:
        image: (C, H, W), fp32 or fp64. ``offset``: (deform_groups * taps * 2, H_out, W_out), last y and x.
    """
    (channels, height, width), places = image.shape, offset.shape[1:]
    starts = []
    for count, taps, stride, padding, dilation in zip(places, *how[:4]):
        place = torch.arange(count, device=image.device)[:, None] * stride - padding
        starts.append(place + torch.arange(taps, device=image.device) * dilation)
    moved = _by_read(offset.to(image), how).view(*places, *how.kernel, how.deform_groups, 2)
    y = starts[0][:, None, :, None, None] + moved[..., 0]
    x = starts[1][:, None, :, None] + moved[..., 1]
    inside = (y > -1) & (x > -1) & (y < height) & (x < width)
    row, row_weight, row_slope = (part[..., None] for part in _neighbours(y, inside, height))
    column, column_weight, column_slope = (part[..., None, :] for part in _neighbours(x, inside, width))
    group = torch.arange(how.deform_groups, device=image.device)[:, None, None]
    index = (row * width + column) * how.deform_groups + group
    weight, *slopes = (
        (by_row * by_column).view(-1, 4)
        for by_row, by_column in ((row_weight, column_weight), (row_slope, column_weight), (row_weight, column_slope))
    )
    pixels = image.permute(1, 2, 0).reshape(-1, channels // how.deform_groups)
    return _Reads(pixels, index.view(-1, 4), weight, tuple(slopes))


def _by_read(values: Tensor, how: _Deform) -> Tensor:
    """Offsets or factors of one image, (deform_groups * taps * M, H_out, W_out), as (R, M)."""
    taps = how.kernel[0] * how.kernel[1]
    return values.reshape(how.deform_groups, taps, -1, *values.shape[1:]).permute(3, 4, 1, 0, 2).flatten(0, 3)


def _by_channel(values: Tensor, how: _Deform, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_by_read`, whose argument had this shape."""
    taps = how.kernel[0] * how.kernel[1]
    return values.view(*shape[1:], taps, how.deform_groups, -1).permute(3, 2, 4, 0, 1).reshape(shape)


def _columns(reads: Tensor, how: _Deform) -> Tensor:
    """(R, C / deform_groups) as the matrices (groups, places, taps * C / groups) that meet the filters."""
    taps = how.kernel[0] * how.kernel[1]
    channels = reads.shape[1] * how.deform_groups // how.groups
    return reads.view(-1, taps, how.groups, channels).permute(2, 0, 1, 3).flatten(2)


def _reads_of_columns(columns: Tensor, how: _Deform) -> Tensor:
    """The inverse of :func:`_columns`."""
    taps = how.kernel[0] * how.kernel[1]
    channels = columns.shape[2] // taps * how.groups // how.deform_groups
    return columns.unflatten(2, (taps, -1)).permute(1, 2, 0, 3).reshape(-1, channels)


def _filters(weight: Tensor, groups: int) -> Tensor:
    """The weight of a convolution as (groups, C_out / groups, taps * C_in / groups)."""
    return _at_least_fp32(weight).flatten(2).transpose(1, 2).flatten(1).unflatten(0, (groups, -1))


def _check_deform(input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, how: _Deform) -> None:
    channels, taps = input.shape[1], how.kernel[0] * how.kernel[1]
    if channels != weight.shape[1] * how.groups or len(weight) % how.groups or channels % how.deform_groups:
        raise ValueError(
            f'deformable convolution: a weight of shape {tuple(weight.shape)} with groups={how.groups} and '
            f'deform_groups={how.deform_groups} does not fit {channels} channels'
        )
    places = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(input.shape[2:], *how[:4])
    ]
    for name, values, each in (('offset', offset, 2), ('mask', mask, 1)):
        expected = (len(input), how.deform_groups * taps * each, *places)
        if values is not None and tuple(values.shape) != expected:
            raise ValueError(f'deformable convolution: {name} has shape {tuple(values.shape)}, but needs {expected}')


def _deform_forward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, output: Tensor,
    how: _Deform,
) -> None:  # fmt: skip
    _check_deform(input, offset, mask, weight, how)
    filters = _filters(weight, how.groups)
    with torch.autocast(input.device.type, enabled=False):
        for n in range(len(input)):
            reads = _deform_reads(_at_least_fp32(input[n]), offset[n], how)
            factor = 1 if mask is None else _by_read(mask[n].to(filters), how)
            columns = _columns(reads.sum(reads.weight * factor), how)
            out = (filters @ columns.transpose(1, 2)).view(output.shape[1:])
            output[n].copy_(out if bias is None else out + bias[:, None, None])


def _deform_backward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, grad_output: Tensor, how: _Deform,
    grad_input: Tensor | None, grad_offset: Tensor | None, grad_mask: Tensor | None, grad_weight: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients asked for."""
    _check_deform(input, offset, mask, weight, how)
    filters = _filters(weight, how.groups)
    grad_filters = torch.zeros_like(filters)
    with torch.autocast(input.device.type, enabled=False):
        for n in range(len(input)):
            reads = _deform_reads(_at_least_fp32(input[n]), offset[n], how)
            factor = 1 if mask is None else _by_read(mask[n].to(filters), how)
            grads = grad_output[n].to(filters).reshape(how.groups, filters.shape[1], -1)
            if grad_weight is not None:
                grad_filters += grads @ _columns(reads.sum(reads.weight * factor), how)
            if grad_input is None:
                continue
            grad_reads = _reads_of_columns(grads.transpose(1, 2) @ filters, how)
            pixels = reads.spread(reads.weight * factor, grad_reads)
            grad_input[n].copy_(pixels.view(*input.shape[2:], -1).permute(2, 0, 1))
            by_place = torch.stack([reads.sum(slope).mul_(grad_reads).sum(1) for slope in reads.slopes], 1)
            grad_offset[n].copy_(_by_channel(by_place * factor, how, offset.shape[1:]))
            if mask is not None:
                by_factor = reads.sum(reads.weight).mul_(grad_reads).sum(1)
                grad_mask[n].copy_(_by_channel(by_factor, how, mask.shape[1:]))
    if grad_weight is not None:
        out_channels, in_channels, *kernel = grad_weight.shape
        grad_weight.copy_(grad_filters.view(out_channels, *kernel, in_channels).permute(0, 3, 1, 2))


@torch.no_grad()
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution: every tap reads the input bilinearly, at its place plus an offset of its own.

    A place less than one pixel off the image is interpolated with zeros; further off, and where an offset is not a
    number, 0 is read. Half precision is computed in fp32 and rounded once. All reads of one image are in memory at a
    time: H_out * W_out * kH * kW * C numbers.

    Args:
        input: (N, C, H, W). ``weight``: (C_out, C / group, kH, kW).
        offset: (N, deformable_group * kH * kW * 2, H_out, W_out), last y and x.
        output: (N, C_out, H_out, W_out), written in place.
        columns, ones, im2col_step: Of the compiled op; unused.
        dW, dH: Stride.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    how = _Deform((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _deform_forward(input, offset, None, weight, None, output, how)


@torch.no_grad()
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients of :func:`deform_conv_forward` by ``input`` and ``offset``, written in place."""
    how = _Deform((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _deform_backward(input, offset, None, weight, grad_output, how, grad_input, grad_offset, None, None)


@torch.no_grad()
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Gradient of :func:`deform_conv_forward` by ``weight``, times ``scale``, written in place."""
    how = _Deform((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _deform_backward(input, offset, None, grad_weight, scale * grad_output, how, None, None, None, grad_weight)


@torch.no_grad()
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """:func:`deform_conv_forward` with a factor for everything that is read, and a bias.

    Args:
        mask: The factors, (N, deformable_group * kernel_h * kernel_w, H_out, W_out).
        bias: (C_out,), used if ``with_bias``.
    """
    how = _Deform(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    _deform_forward(input, offset, mask, weight, bias if with_bias else None, output, how)


@torch.no_grad()
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Gradients of :func:`modulated_deform_conv_forward`, written in place."""
    how = _Deform(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    _deform_backward(input, offset, mask, weight, grad_output, how, grad_input, grad_offset, grad_mask, grad_weight)
    if with_bias:
        grad_bias.copy_(_at_least_fp32(grad_output).sum((0, 2, 3)))


# --- The stand-in for mmcv._ext ---
SUPPLIED = {
    op.__name__: op
    for op in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
    )
}


class _PyTorchExt(types.ModuleType):
    """Has every op, since mmcv checks that all exist on import; those not supplied raise."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith('_'):
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')

        def op(*args, **kwargs):
            if name in SUPPLIED:
                announce()
                return SUPPLIED[name](*args, **kwargs)
            if name in ('get_compiler_version', 'get_compiling_cuda_version'):
                return 'N/A'
            raise NotImplementedError(
                f'mmcv op {name!r} is not available: mmcv-lite has no compiled ops and mmdet_norms '
                f'supplies only {", ".join(SUPPLIED)} in PyTorch. {_REMEDY}'
            )

        op.__name__ = name
        setattr(self, name, op)
        return op


@functools.cache
def announce() -> None:
    """Log :func:`describe`: once, on rank 0; at the start of a run or on first use, not on a mere import."""
    if os.environ.get('RANK', '0') == '0':
        print_log(describe(), logger='current', level=logging.INFO)


def active() -> str:
    """``'compiled'`` where mmcv has its extension, else ``'pytorch'`` (the ops of this module)."""
    spec = importlib.util.find_spec(EXT_NAME)
    # The stand-in is found too once it is installed; it has no loader.
    return 'pytorch' if spec is None or spec.loader is None else 'compiled'


def describe() -> str:
    """One line that says which mmcv ops are active."""
    if active() == 'compiled':
        return f'mmcv ops: compiled (mmcv {mmcv.__version__})'
    return (
        f'mmcv ops: PyTorch, from mmdet_norms (mmcv-lite {mmcv.__version__} has none): '
        f'{", ".join(SUPPLIED)}; others raise NotImplementedError'
    )


def install() -> str:
    """Make ``mmcv.ops`` importable without compiled ops; returns :func:`active`.

    Does nothing where mmcv is compiled or a stand-in is in place. Call it before anything
    imports ``mmcv.ops`` or ``mmdet.models``.
    """
    which = active()
    if which == 'pytorch' and EXT_NAME not in sys.modules:
        ext = _PyTorchExt(EXT_NAME, 'PyTorch stand-in for the compiled ops; see mmdet_norms.')
        ext.__spec__ = ModuleSpec(EXT_NAME, loader=None)
        sys.modules[EXT_NAME] = mmcv._ext = ext
    return which
