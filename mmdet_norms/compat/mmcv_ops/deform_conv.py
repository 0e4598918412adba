"""Deformable convolution in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .deform_signatures import Computation, Deform, check_deform, deformable_convolutions
from .sparse import at_least_fp32, sparse_matmul


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
        return sparse_matmul(pixel, order // 4, weight.reshape(-1)[order], len(self.pixels), grad)


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


def _deform_reads(image: Tensor, offset: Tensor, how: Deform) -> _Reads:
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


def _by_read(values: Tensor, how: Deform) -> Tensor:
    """Offsets or factors of one image, (deform_groups * taps * M, H_out, W_out), as (R, M)."""
    taps = how.kernel[0] * how.kernel[1]
    return values.reshape(how.deform_groups, taps, -1, *values.shape[1:]).permute(3, 4, 1, 0, 2).flatten(0, 3)


def _by_channel(values: Tensor, how: Deform, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_by_read`, whose argument had this shape."""
    taps = how.kernel[0] * how.kernel[1]
    return values.view(*shape[1:], taps, how.deform_groups, -1).permute(3, 2, 4, 0, 1).reshape(shape)


def _columns(reads: Tensor, how: Deform) -> Tensor:
    """(R, C / deform_groups) as the matrices (groups, places, taps * C / groups) that meet the filters."""
    taps = how.kernel[0] * how.kernel[1]
    channels = reads.shape[1] * how.deform_groups // how.groups
    return reads.view(-1, taps, how.groups, channels).permute(2, 0, 1, 3).flatten(2)


def _reads_of_columns(columns: Tensor, how: Deform) -> Tensor:
    """The inverse of :func:`_columns`."""
    taps = how.kernel[0] * how.kernel[1]
    channels = columns.shape[2] // taps * how.groups // how.deform_groups
    return columns.unflatten(2, (taps, -1)).permute(1, 2, 0, 3).reshape(-1, channels)


def _filters(weight: Tensor, groups: int) -> Tensor:
    """The weight of a convolution as (groups, C_out / groups, taps * C_in / groups)."""
    return at_least_fp32(weight).flatten(2).transpose(1, 2).flatten(1).unflatten(0, (groups, -1))


def deform_forward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, output: Tensor,
    how: Deform,
) -> None:  # fmt: skip
    check_deform(input, offset, mask, weight, how)
    filters = _filters(weight, how.groups)
    with torch.autocast(input.device.type, enabled=False):
        for n in range(len(input)):
            reads = _deform_reads(at_least_fp32(input[n]), offset[n], how)
            factor = 1 if mask is None else _by_read(mask[n].to(filters), how)
            columns = _columns(reads.sum(reads.weight * factor), how)
            out = (filters @ columns.transpose(1, 2)).view(output.shape[1:])
            output[n].copy_(out if bias is None else out + bias[:, None, None])


def deform_backward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, grad_output: Tensor, how: Deform,
    grad_input: Tensor | None, grad_offset: Tensor | None, grad_mask: Tensor | None, grad_weight: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients asked for."""
    check_deform(input, offset, mask, weight, how)
    filters = _filters(weight, how.groups)
    grad_filters = torch.zeros_like(filters)
    with torch.autocast(input.device.type, enabled=False):
        for n in range(len(input)):
            reads = _deform_reads(at_least_fp32(input[n]), offset[n], how)
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


OPS = deformable_convolutions(Computation(deform_forward, deform_backward))
