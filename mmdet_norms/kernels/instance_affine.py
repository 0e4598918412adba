"""An affine step whose parameters depend on the statistics of each instance: AN, in few passes over the map."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..compat.torch_internals import is_functorch_active
from ..compat.torch_versions import is_compiling
from . import map_ops
from .second import is_wanted

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def instance_affine(x: Tensor, rule: Rule) -> Tensor:
    """``y = scale * (x - origin) + shift`` with parameters that ``rule`` computes from the moments of every instance.

    One pass for the moments, one for y; backward one for the sums over the gradient, one or two for that of x. Saves
    x and vectors. Gradients flow through everything, the moments included.

    Args:
        x: ``(N, C, H, W)``, not empty, any floating dtype.
        rule: ``(mean, var) -> (scale, origin, shift)``; mean and biased variance of the instances over ``(H, W)``, all
            ``(N, C)`` and in fp32, or fp64 for fp64 maps. Batch and group norm are such rules, since
            ``E[x] = E[mean]`` and ``E[(x - E[x])^2] = E[var + (mean - E[x])^2]`` over instances or channels.
    """
    stand_in, gain, mean, var = _Moments.apply(x)
    scale, origin, shift = rule(mean, var)
    # The constant centre keeps the digits of the sums in backward where the mean is large.
    centre = mean.detach()
    return _Affine.apply(x, stand_in, gain, centre, scale, shift + scale * (centre - origin))


def is_supported(x: Tensor) -> bool:
    """Is this a case for :func:`instance_affine`: eager, on a CPU or CUDA, not empty, a tensor as it is?

    Compiled code gets the plain formulas, which the compiler fuses; exported graphs get standard operators.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type in ('cpu', 'cuda')
        and x.dim() == 4
        and x.numel() > 0
        and not is_compiling()
        and not torch.jit.is_tracing()
        and not is_functorch_active()
    )


# The gradient of x has a part through y and one through the moments, which is known later. Computed each by its own
# function they would be two maps and a third pass to add them. So _Affine does not compute its part: it sends
# the gradient of y on as it came, as gradient of a stand-in for x, and its factor as gradient of ``gain``. Both only
# exist for that, and are seen by nobody else.


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        mean, var = map_ops.moments(x, per_instance=True)
        ctx.save_for_backward(x, mean)
        return x.new_zeros(()).expand(x.shape), torch.empty_like(mean), mean, var

    @staticmethod
    def backward(ctx, grad, gain, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        size = x.shape[2] * x.shape[3]
        slope, shift = grad_var * (2 / size), grad_mean / size
        if is_wanted(grad):
            gain, mean, slope, shift = (v[..., None, None] for v in (gain, mean, slope, shift))
            return (gain * grad + slope * (x - mean) + shift).to(x.dtype)
        return map_ops.gradient(grad, x, gain, mean, slope, shift)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stand_in, gain, centre, scale, shift):
        ctx.save_for_backward(x, centre, scale)
        return map_ops.affine(x, centre, scale, shift)

    @staticmethod
    def backward(ctx, grad):
        x, centre, scale = ctx.saved_tensors
        if is_wanted(grad):
            wide = grad.to(scale.dtype)
            total, centred = wide.sum((2, 3)), (wide * (x - centre[..., None, None])).sum((2, 3))
        else:
            total, centred = map_ops.gradient_sums(grad, x, centre)
        return None, grad, scale, None, centred, total
