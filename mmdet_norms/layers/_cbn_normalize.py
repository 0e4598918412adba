"""The last step of CBN's training forward, and its gradient through the current batch's part of the statistics."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import map_ops
from ..kernels.double_backward import is_wanted
from ._numerics import per_channel


class Used(NamedTuple):
    """What one forward normalizes with; vectors ``(C,)``.

    The shares say how much one value of x moves mean and variance: 1 / M each in batch norm, 1 / (k M) with k entries
    in the window. ``var_share`` carries the slope of the root where eps is outside, and is 0 where x is constant.
    """

    mean: Tensor
    denominator: Tensor
    mean_share: Tensor
    var_share: Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, mean_share: Tensor, var_share: Tensor, eps: float, in_sqrt: bool) -> 'Used':
        """From the variance and how much a value of x moves that."""
        if in_sqrt:
            denominator, slope = (var + eps).sqrt(), 1
        else:
            std = var.sqrt()
            denominator, slope = std + eps, (std + eps) / std
        # The slope of the root is infinite at zero variance; there x is constant and the variance has no gradient.
        return cls(mean, denominator, mean_share, torch.where(var > 0, var_share * slope, 0))


class Normalize(torch.autograd.Function):
    """``y = weight * (x - mean) / denominator + bias``; the gradient by x, with g that by y,

    ``weight / denominator * (g - mean_share * sum(g) - var_share * (x - mean) / denominator^2 * sum(g (x - mean)))``.

    Args:
        x: ``(N, C, H, W)``.
        weight, bias: ``(C,)``.
        used: the fields of :class:`Used`.
        outer: eps outside of the root.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, denominator, mean_share, var_share, outer):
        ctx.save_for_backward(x, weight, mean, denominator, mean_share, var_share)
        ctx.outer = outer
        # A constant channel becomes the bias exactly, not 1 / eps times what rounding leaves of x - mean.
        scale = torch.where(var_share > 0, weight.to(mean.dtype) / denominator, 0)
        return map_ops.affine(x, mean, scale, bias.to(mean.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight, *used = ctx.saved_tensors
        if is_wanted(grad):
            gradients = _differentiable(grad, x, weight, Used(*used), ctx.outer)
        else:
            gradients = _gradients(grad, x, weight, Used(*used), ctx.needs_input_grad[0])
        return *gradients, *[None] * 5


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, used: Used, of_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """By x, weight and bias."""
    mean, denominator, mean_share, var_share = used
    grad_bias, centred = map_ops.gradient_sums(grad, x, mean)
    grad_weight = centred / denominator
    grad_x = None
    if of_x:
        scale = weight.to(mean.dtype) / denominator
        through_var = -scale * var_share * grad_weight / denominator
        through_mean = -scale * mean_share * grad_bias
        grad_x = map_ops.gradient(grad, x, scale, mean, through_var, through_mean)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _differentiable(grad: Tensor, x: Tensor, weight: Tensor, used: Used, outer: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same as a differentiable function of ``grad``, ``x`` and ``weight``.

    Mean and root of the variance are written as functions of x, with the values that they have at this x. What earlier
    iterations put into them is constant, as it is in the gradient itself.
    """
    mean, denominator, mean_share, var_share = used
    over = (0, 2, 3)
    grad, here, x_dtype = grad.to(mean.dtype), x.detach().to(mean.dtype), x.dtype
    x = x.to(mean.dtype)
    root = denominator - outer
    varies = (var_share > 0) & (root > 0)
    share = torch.where(varies, var_share * root / denominator, 0)  # without the slope of the root
    about, moved = here - per_channel(mean), (x - here).sum(over) * mean_share
    squares = ((x - per_channel(mean)).square() - about.square()).sum(over)
    variance = torch.where(varies, root.square(), 1) + share * squares - (share / mean_share) * moved.square()
    root = variance.sqrt()
    denominator = torch.where(varies, root + outer, denominator)
    centred = x - per_channel(mean + moved)
    grad_bias, grad_weight = grad.sum(over), (grad * centred).sum(over) / denominator
    scale = weight.to(mean.dtype) / denominator
    through_var, through_mean = -scale * share * grad_weight / root, -scale * mean_share * grad_bias
    grad_x = per_channel(scale) * grad + per_channel(through_var) * centred + per_channel(through_mean)
    return grad_x.to(x_dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
