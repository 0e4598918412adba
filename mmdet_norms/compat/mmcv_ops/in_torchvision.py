"""The ops that torchvision has compiled, with the signatures of mmcv's; on a GPU many times faster than plain PyTorch.

Where torchvision's convention differs, the result here is that of the ops of this package in PyTorch. What torchvision
does not know, NotImplemented is returned for.
"""

import functools

import torch
from torch import Tensor

from ..torch_internals import has_kernel
from .deform_signatures import Computation, Deform, check_deform, deformable_convolutions
from .sparse import at_least_fp32

# Private names of torchvision begin with an underscore; the wrappers of mmcv call the backward passes themselves.
OPERATORS = ('nms', 'roi_align', '_roi_align_backward', 'deform_conv2d', '_deform_conv2d_backward')


@functools.cache
def load() -> str:
    """``''`` where torchvision imports and has its compiled ops, else what is wrong."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == 'torchvision':
            return 'torchvision is not installed'
        return f'torchvision does not import: {error}'
    except Exception as error:  # beside another torch than its own it fails in many ways
        return f'torchvision does not import: {type(error).__name__}: {error}'
    missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    return f'torchvision has no compiled {", ".join(missing)}' if missing else ''


def knows(device: str) -> bool:
    """Whether its ops were compiled for this type of device; after :func:`load` said that they are there."""
    key = {'cpu': 'CPU', 'cuda': 'CUDA'}.get(device)
    return key is not None and all(has_kernel(f'torchvision::{name}', key) for name in OPERATORS)


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """As :func:`.nms.nms`, for ``offset=0``."""
    boxes = at_least_fp32(boxes)
    if offset or torch.promote_types(boxes.dtype, scores.dtype) != boxes.dtype:
        return NotImplemented
    # PyTorch compares with the threshold in the precision of the boxes, torchvision on a CPU in fp64.
    threshold = torch.tensor(iou_threshold, dtype=boxes.dtype).item()
    return torch.ops.torchvision.nms(boxes, scores.to(boxes), threshold)


def _with_samples(rois: Tensor, spatial_scale: float, sampling_ratio: int, aligned: bool) -> Tensor:
    """``rois``, with those that have no samples moved off the map, where everything is 0.

    torchvision makes integers of numbers that are none, and negative sizes of inverted RoIs.
    """
    there = rois.isfinite().all(1)
    if aligned and sampling_ratio <= 0:
        there &= (rois[:, 3:] > rois[:, 1:3]).all(1)
    off = rois.new_tensor([0, -16, -16, -8, -8]) / spatial_scale
    return torch.where(there[:, None], rois, off)


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
    """As :func:`.roi_align.roi_align_forward`, for ``pool_mode=1``."""
    if pool_mode != 1 or not output.numel():
        return NotImplemented
    x = at_least_fp32(input)
    rois = _with_samples(rois.to(x), spatial_scale, sampling_ratio, aligned)
    with torch.autocast(x.device.type, enabled=False):
        pooled = torch.ops.torchvision.roi_align(
            x, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    output.copy_(pooled)


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
    """As :func:`.roi_align.roi_align_backward`, for ``pool_mode=1``; on a GPU not to the bit the same in each run."""
    if pool_mode != 1 or not grad_output.numel():
        return NotImplemented
    grad = at_least_fp32(grad_output).contiguous()
    rois = _with_samples(rois.to(grad), spatial_scale, sampling_ratio, aligned)
    with torch.autocast(grad.device.type, enabled=False):
        by_input = torch.ops.torchvision._roi_align_backward(
            grad, rois, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
        )
    grad_input.copy_(by_input)


def _arguments(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, how: Deform
) -> tuple:
    x = at_least_fp32(input)
    tensors = [
        x,
        weight.to(x),
        # Not a number: off the map, where 0 is read.
        offset.to(x).nan_to_num(nan=-1e6, posinf=1e6, neginf=-1e6),
        x.new_zeros(len(x), 1) if mask is None else mask.to(x),
        x.new_zeros(len(weight)) if bias is None else bias.to(x),
    ]
    settings = (*how.stride, *how.padding, *how.dilation, how.groups, how.deform_groups)
    return *(tensor.contiguous() for tensor in tensors), *settings, mask is not None


def _is_read(offset: Tensor, size: torch.Size, how: Deform) -> Tensor:
    """(N, deform_groups, kH, kW, 1, H_out, W_out): where the place is less than a pixel off a map of ``size``."""
    moved = offset.unflatten(1, (how.deform_groups, *how.kernel, 2))
    there = True
    for axis, (places, taps) in enumerate(zip(offset.shape[2:], how.kernel)):
        tap = torch.arange(taps, device=offset.device) * how.dilation[axis]
        place = torch.arange(places, device=offset.device) * how.stride[axis] - how.padding[axis]
        start = tap[:, None] + place
        start = start[:, None, :, None] if axis == 0 else start[None, :, None, :]
        at = start + moved[:, :, :, :, axis]
        there = there & (at > -1) & (at < size[axis])
    return there[:, :, :, :, None]


def _deform_forward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, output: Tensor,
    how: Deform,
) -> None:  # fmt: skip
    check_deform(input, offset, mask, weight, how)
    if not output.numel():
        return NotImplemented
    with torch.autocast(input.device.type, enabled=False):
        output.copy_(torch.ops.torchvision.deform_conv2d(*_arguments(input, offset, mask, weight, bias, how)))


def _deform_backward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, grad_output: Tensor, how: Deform,
    grad_input: Tensor | None, grad_offset: Tensor | None, grad_mask: Tensor | None, grad_weight: Tensor | None,
) -> None:  # fmt: skip
    """All gradients are computed, whichever are asked for: torchvision has one op for them."""
    check_deform(input, offset, mask, weight, how)
    if not grad_output.numel():
        return NotImplemented
    arguments = _arguments(input, offset, mask, weight, None, how)
    with torch.autocast(input.device.type, enabled=False):
        by_input, by_weight, by_offset, by_mask, _ = torch.ops.torchvision._deform_conv2d_backward(
            grad_output.to(arguments[0]).contiguous(), *arguments
        )
    if grad_offset is not None:
        # torchvision's derivative goes on for one more place off the map, where offsets of 0 often are.
        read = _is_read(arguments[2], input.shape[2:], how)
        by_offset = by_offset.unflatten(1, (how.deform_groups, *how.kernel, 2)).where(read, 0).view_as(by_offset)
    for found, asked in (
        (by_input, grad_input), (by_weight, grad_weight), (by_offset, grad_offset), (by_mask, grad_mask)
    ):  # fmt: skip
        if asked is not None:
            asked.copy_(found)


OPS = dict(
    nms=nms,
    roi_align_forward=roi_align_forward,
    roi_align_backward=roi_align_backward,
    **deformable_convolutions(Computation(_deform_forward, _deform_backward)),
)
