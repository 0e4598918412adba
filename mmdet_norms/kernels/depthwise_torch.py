"""The operations of :mod:`.depthwise` by torch's operators, for installations without a C compiler.

A few channels at a time, so that what is computed of them stays in the cache. The convolution sees ``x - mean``, and
``1 / std`` is multiplied into its kernels: zero padding means the same in both spaces, and statistics cost a sum and a
norm instead of torch's slow variance. oneDNN has a fast weight gradient for depthwise kernels up to three columns wide,
ten times faster per value than its wider ones, so the gradient is computed a few columns of the kernels at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .double_backward import bnet_gradients_of, is_wanted
from .layouts import is_channels_last, layout, like, per_channel

_IN_CACHE = 1 << 19  # values a thread: what is computed of them, some maps as large, fits into the last cache


def normalize_and_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor | None = None, var: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return _InTorch.apply(x, weight, bias, eps, mean, var)


def inference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, inplace: bool
) -> Tensor:  # fmt: skip
    """Differentiable, and of any dtype, device and layout."""
    y = _depthwise(x, weight.to(x.dtype), bias.to(x.dtype)).to(x.dtype)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y


class _InTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, mean, var):
        ctx.of_batch, ctx.eps = mean is None, eps
        if ctx.of_batch:
            mean, var = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        y = torch.empty_like(x, memory_format=layout(x))
        rstd = torch.empty_like(mean)
        for part in channels_at_a_time(x):
            piece = x[:, part]
            if ctx.of_batch:
                mean[part] = _sum(piece) / (x.numel() // x.shape[1])
            centred = like(piece - per_channel(mean[part]), x)
            if ctx.of_batch:
                var[part] = _mean_square(centred)
            rstd[part] = torch.rsqrt(var[part] + eps)
            y[:, part] = _depthwise(centred, weight[part] * _by_kernel(rstd[part]), bias[part])
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, rstd = ctx.saved_tensors
        if is_wanted(grad):
            return bnet_gradients_of(ctx, grad, x, weight, mean, rstd)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x, memory_format=layout(x)) if needs_x else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(mean) if needs_bias else None
        for part in channels_at_a_time(x):
            kernel, scale, of_y = weight[part], _by_kernel(rstd[part]), like(grad[:, part], x)
            if needs_bias:
                grad_bias[part] = _sum(of_y)
            if needs_weight or (needs_x and ctx.of_batch):
                centred, of_kernel = _centred_and_kernel_gradient(of_y, x[:, part], mean[part], kernel)
                of_kernel *= scale
            if needs_weight:
                grad_weight[part] = of_kernel
            if needs_x:
                of_x = _depthwise(of_y, (kernel * scale).flip(2, 3), None)
                if ctx.of_batch:
                    count = x.numel() // x.shape[1]
                    projection = (kernel * of_kernel).sum((1, 2, 3)) * rstd[part].square() / count
                    average = _sum(of_x) / count
                    of_x.addcmul_(centred, per_channel(projection), value=-1).sub_(per_channel(average))
                grad_x[:, part] = of_x
        return grad_x, grad_weight, grad_bias, None, None, None


def channels_at_a_time(x: Tensor) -> list[slice]:
    """Channels that are computed together: so few that what is computed of them stays in the cache.

    Multiples of 16, as oneDNN pads to that; channels-last, of 32, as a pixel's are read together.
    """
    values = max(1, x.numel() // x.shape[1])
    least = 32 if is_channels_last(x) else 16
    step = max(1, _IN_CACHE * torch.get_num_threads() // values // least) * least
    return [slice(first, first + step) for first in range(0, x.shape[1], step)]


def _sum(x: Tensor) -> Tensor:
    """Per channel ``(C,)``."""
    return x.sum((0, 2, 3))


def _mean_square(centred: Tensor) -> Tensor:
    """The biased variance ``(C,)``. From deviations, as ``E[x^2] - E[x]^2`` cancels for large means."""
    count = centred.numel() // centred.shape[1]
    if is_channels_last(centred):  # a norm is slow there
        return _sum(centred.square()) / count
    return torch.linalg.vector_norm(centred, dim=(2, 3)).square().sum(0) / count


def _by_kernel(vector: Tensor) -> Tensor:
    """``(C,)`` for broadcasting over ``(C, 1, k, k)``."""
    return vector.view(-1, 1, 1, 1)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, 1, weight.shape[-1] // 2, 1, weight.shape[0])


def _centred_and_kernel_gradient(grad: Tensor, x: Tensor, mean: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``x - mean``, and the gradient ``(C, 1, k, k)`` of the kernels of its depthwise convolution.

    At most three columns at a time: the convolution of such a part is that of the map, moved to the side.
    """
    n, c, h, w = x.shape
    size, half = weight.shape[-1], weight.shape[-1] // 2
    padded = like(grad.new_empty((n, c, h, w + 2 * half)), grad)
    padded[..., :half] = 0
    padded[..., half + w :] = 0
    centred = torch.sub(x, per_channel(mean), out=padded[..., half : half + w])
    parts = []
    for first, columns in _column_groups(size):
        moved = like(padded[..., first : first + w + columns - 1], grad)
        shape = (*weight.shape[:3], columns)
        parts.append(torch.nn.grad.conv2d_weight(moved, shape, grad, 1, (half, 0), 1, len(weight)))
    return centred, torch.cat(parts, 3) if len(parts) > 1 else parts[0]


def _column_groups(size: int) -> list[tuple[int, int]]:
    """(first column, how many): 3, 3 + 2, 3 + 2 + 2, ..., as a single column alone is slow again."""
    groups, first = [], 0
    while first < size:
        left = size - first
        columns = 3 if left % 2 else 2
        groups.append((first, min(columns, left)))
        first += columns
    return groups
