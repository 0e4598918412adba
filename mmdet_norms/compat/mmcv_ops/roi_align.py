"""RoIAlign in plain PyTorch, with the signatures of mmcv's compiled ops."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .remedy import remedy
from .sparse import at_least_fp32, expand, sparse_matmul

# Non-zeros of the RoIAlign matrix held at a time; one takes about 100 bytes in temporaries.
ROI_ALIGN_BUDGET = 4_000_000


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
        line_bin, y_at = expand(ys.count[part, :, None].expand(-1, -1, bins_w).reshape(-1))
        y_at += line_bin // bins_w * ys.pixel.shape[2]
        line_pixel = ((image_row[part] + ys.pixel[part]) * width).view(-1)[y_at]
        line_weight = ys.weight[part].view(-1)[y_at]
        line_x = line_bin // (bins_h * bins_w) * bins_w + line_bin % bins_w
        line, x_at = expand(xs.count[part].view(-1)[line_x])
        x_at += (line_x * xs.pixel.shape[2])[line]
        yield (
            part,
            line_bin[line],
            line_pixel[line] + xs.pixel[part].view(-1)[x_at],
            line_weight[line] * xs.weight[part].view(-1)[x_at],
        )


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "roi_align with pool_mode='max' is not among the PyTorch ops of mmdet_norms, which "
            f"know pool_mode='avg'. {remedy()}"
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
    pixels = at_least_fp32(input).permute(0, 2, 3, 1).reshape(-1, channels)
    for part, bin_, pixel, weight in _roi_align_matrix(
        rois.to(pixels), input.shape, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned
    ):
        out = output[part].permute(0, 2, 3, 1)
        out.copy_(sparse_matmul(bin_, pixel, weight, out[..., 0].numel(), pixels).view(out.shape))


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
    grads = at_least_fp32(grad_output).permute(0, 2, 3, 1)
    total = grads.new_zeros(grad_input[:, 0].numel(), channels)
    for part, bin_, pixel, weight in _roi_align_matrix(
        rois.to(grads), grad_input.shape, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned
    ):
        # The transposed product. Sorted sums, not atomic adds, so runs repeat exactly on a GPU.
        pixel, order = pixel.sort(stable=True)
        total += sparse_matmul(pixel, bin_[order], weight[order], len(total), grads[part].reshape(-1, channels))
    image = grad_input.permute(0, 2, 3, 1)
    image.copy_(total.view(image.shape))
