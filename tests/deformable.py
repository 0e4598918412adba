"""Deformable convolution in plain PyTorch, with the signatures of mmcv's, for tests of detectors that need one."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair


def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, *_
) -> Tensor:
    """Each tap reads x at its place plus an offset (dy, dx), bilinearly; outside there are zeros."""
    return _convolve(_sample(x, offset, None, weight, stride, padding, dilation, deform_groups), weight, groups)


def modulated_deform_conv2d(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, stride=1, padding=0, dilation=1,
    groups=1, deform_groups=1,
) -> Tensor:  # fmt: skip
    """The same with a factor for each tap."""
    out = _convolve(_sample(x, offset, mask, weight, stride, padding, dilation, deform_groups), weight, groups)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def _sample(x, offset, mask, weight, stride, padding, dilation, deform_groups) -> Tensor:
    """What each tap reads: (N, C, taps, H, W)."""
    (n, c, h, w), (kh, kw), (rows, columns) = x.shape, weight.shape[2:], offset.shape[2:]
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    offset = offset.reshape(n * deform_groups, kh * kw, 2, rows, columns)
    y = torch.arange(rows).view(-1, 1) * sh - ph
    z = torch.arange(columns).view(1, -1) * sw - pw
    x = x.reshape(n * deform_groups, c // deform_groups, h, w)
    taps = []
    for k in range(kh * kw):
        at_y = y + k // kw * dh + offset[:, k, 0]
        at_x = z + k % kw * dw + offset[:, k, 1]
        grid = torch.stack(((2 * at_x + 1) / w - 1, (2 * at_y + 1) / h - 1), -1)
        tap = F.grid_sample(x, grid, align_corners=False)
        if mask is not None:
            tap = tap * mask.reshape(n * deform_groups, kh * kw, 1, rows, columns)[:, k]
        taps.append(tap.view(n, c, rows, columns))
    return torch.stack(taps, 2)


def _convolve(taps: Tensor, weight: Tensor, groups: int) -> Tensor:
    n, c, k, h, w = taps.shape
    taps = taps.view(n, groups, c // groups, k, h, w)
    return torch.einsum('ngckhw,gock->ngohw', taps, weight.reshape(groups, -1, c // groups, k)).flatten(1, 2)
