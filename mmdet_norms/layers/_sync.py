"""Batch norm over the maps of all processes: one all_gather forward, one all_reduce backward, on any backend."""

import torch
from torch import Tensor
from torch import distributed as dist

from ._numerics import per_channel, statistics_dtype

_DIMS = (0, 2, 3)


def batch_norm_of_all(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm whose statistics are those of the maps of all processes together, differentiable any number of times.

    Which collectives run never depends on values or sizes. Every process of the group has to call it.

    Args:
        x: ``(N, C, H, W)``; N, H and W may differ between processes, and be 0.
        weight, bias: ``(C,)``, or None for both.
        eps: added to the variance inside the root.
        group: the process group; None for all processes.

    Returns:
        y, in the dtype of x; mean and biased variance ``(C,)`` and the number of values per channel ``()`` in all
        processes, which carry no gradient.
    """
    return _BatchNormOfAll.apply(x, weight, bias, eps, group)


class _BatchNormOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        wide = x.to(statistics_dtype(x))
        mean, var, count = _moments_of_all(wide, group)
        rstd = torch.rsqrt(var + eps)
        y = (wide - per_channel(mean)) * per_channel(rstd)
        if weight is not None:
            y = y * per_channel(weight.to(y.dtype)) + per_channel(bias.to(y.dtype))
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, rstd, count = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants to differentiate this: as functions of every process's x
            mean, rstd = _statistics_again(x.to(mean.dtype), mean, rstd, count, ctx.group)
        wide = grad.to(mean.dtype)
        normalized = (x.to(mean.dtype) - per_channel(mean)) * per_channel(rstd)
        grad_bias, grad_weight = wide.sum(_DIMS), (wide * normalized).sum(_DIMS)
        grad_x = None
        if ctx.needs_input_grad[0]:
            total = _Sum.apply(torch.cat([grad_bias, grad_weight]), ctx.group)
            mean_grad, mean_projection = (total / count.clamp(min=1)).chunk(2)
            scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
            grad_x = wide - per_channel(mean_grad) - normalized * per_channel(mean_projection)
            grad_x = (grad_x * per_channel(scale)).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None, None
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


def _moments_of_all(x: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` over all processes, and of how many values ``()``."""
    channels = x.shape[1]
    local = x.new_zeros(2 * channels + 1)
    if x.numel():
        var, mean = torch.var_mean(x, _DIMS, correction=0)
        count = x.numel() // channels
        local = torch.cat([mean, var * count, mean.new_tensor([count])])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group)
    means, squares, counts = torch.stack(gathered).split([channels, channels, 1], dim=1)
    # Deviations from the common mean, not E[x^2] - E[x]^2, which cancels for large means.
    count = counts.sum()
    mean = (means * counts).sum(0) / count.clamp(min=1)
    var = (squares + counts * (means - mean).square()).sum(0) / count.clamp(min=1)
    return mean, var, count


class _Sum(torch.autograd.Function):
    """Sum over all processes, in place. As often differentiable: every process's gradient adds to every input's."""

    @staticmethod
    def forward(ctx, vector, group):
        ctx.group = group
        dist.all_reduce(vector, group=group)
        ctx.mark_dirty(vector)
        return vector

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad.clone(), ctx.group), None


def _statistics_again(x: Tensor, mean: Tensor, rstd: Tensor, count: Tensor, group) -> tuple[Tensor, Tensor]:
    """``mean`` and ``rstd``, whose values are known, as differentiable functions of the x of all processes."""
    here, mean, rstd = x.detach(), mean.detach(), rstd.detach()
    centred, about = x - per_channel(mean), here - per_channel(mean)
    changes = torch.cat([(x - here).sum(_DIMS), (centred.square() - about.square()).sum(_DIMS)])
    shift, squares = (_Sum.apply(changes, group) / count.clamp(min=1)).chunk(2)
    return mean + shift, (rstd.pow(-2) + squares - shift.square()).rsqrt()
