"""The signatures that mmcv's compiled deformable convolutions have, around whatever computes them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .sparse import at_least_fp32


class Deform(NamedTuple):
    """Settings of a deformable convolution; pairs are (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int


def check_deform(input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, how: Deform) -> None:
    """Raise ValueError unless the shapes fit each other."""
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


class Computation(NamedTuple):
    """What computes them. Both check the shapes and write in place; or they return NotImplemented."""

    forward: Callable  # input, offset, mask or None, weight, bias or None, output, how
    backward: Callable  # input, offset, mask or None, weight, grad_output, how, and four gradients or None


def deformable_convolutions(by: Computation) -> dict[str, Callable]:
    """The ops of mmcv's extension by name, computed by ``by``."""
    ops = (
        _deform_conv_forward,
        _deform_conv_backward_input,
        _deform_conv_backward_parameters,
        _modulated_deform_conv_forward,
        _modulated_deform_conv_backward,
    )
    return {op.__name__[1:]: functools.partial(op, by) for op in ops}


@torch.no_grad()
def _deform_conv_forward(
    by: Computation,
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
    how = Deform((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    return by.forward(input, offset, None, weight, None, output, how)


@torch.no_grad()
def _deform_conv_backward_input(
    by: Computation,
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
    """Gradients of :func:`_deform_conv_forward` by ``input`` and ``offset``, written in place."""
    how = Deform((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    return by.backward(input, offset, None, weight, grad_output, how, grad_input, grad_offset, None, None)


@torch.no_grad()
def _deform_conv_backward_parameters(
    by: Computation,
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
    """Gradient of :func:`_deform_conv_forward` by ``weight``, times ``scale``, written in place."""
    how = Deform((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    return by.backward(input, offset, None, grad_weight, scale * grad_output, how, None, None, None, grad_weight)


@torch.no_grad()
def _modulated_deform_conv_forward(
    by: Computation,
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
    """:func:`_deform_conv_forward` with a factor for everything that is read, and a bias.

    Args:
        mask: The factors, (N, deformable_group * kernel_h * kernel_w, H_out, W_out).
        bias: (C_out,), used if ``with_bias``.
    """
    how = Deform(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    return by.forward(input, offset, mask, weight, bias if with_bias else None, output, how)


@torch.no_grad()
def _modulated_deform_conv_backward(
    by: Computation,
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
    """Gradients of :func:`_modulated_deform_conv_forward`, written in place."""
    how = Deform(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    if with_bias:
        grad_bias.copy_(at_least_fp32(grad_output).sum((0, 2, 3)))
    return by.backward(input, offset, mask, weight, grad_output, how, grad_input, grad_offset, grad_mask, grad_weight)
