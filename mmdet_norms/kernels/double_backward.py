"""Double backward: gradients by torch's own operators, which can be differentiated again (``create_graph``).

Slower than the kernels, and autograd keeps what it needs of them. Only those who ask for it pay for that: see
:func:`is_wanted`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat.torch_internals import is_legacy_batched
from .layouts import per_channel

_OVER = (0, 2, 3)


def is_wanted(grad: Tensor) -> bool:
    """For a backward pass to ask: does its caller want to differentiate the result, or compute many at once by vmap?

    (``create_graph=True`` turns grad on, which is off in other backward passes. ``is_grads_batched=True`` and
    ``vectorize=True`` hand in tensors that kernels cannot read.)
    """
    return torch.is_grad_enabled() or is_legacy_batched(grad)


def bnet_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, mean: Tensor | None = None, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias of a depthwise convolution of the normalized map; differentiable to any order.

    Args:
        grad: gradient of the result ``(N, C, H, W)``.
        x, weight, eps: as in :func:`mmdet_norms.kernels.depthwise.normalize_and_convolve`.
        mean, rstd: constants ``(C,)`` that x was normalized with; None for those of x, through which x has a gradient,
            too.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size, of_batch = weight.shape[-1], mean is None
    grad, values, kernels = grad.to(wide), x.to(wide), weight.to(wide)
    if of_batch:
        var, mean = torch.var_mean(values, _OVER, correction=0)
        rstd = (var + eps).rsqrt()
    normalized = (values - per_channel(mean)) * per_channel(rstd)
    grad_weight = torch.nn.grad.conv2d_weight(normalized, weight.shape, grad, 1, size // 2, 1, len(weight))
    grad_x = F.conv2d(grad, kernels.flip(2, 3), None, 1, size // 2, 1, len(weight))  # of the normalized map so far
    if of_batch:
        average, projection = grad_x.mean(_OVER), (grad_x * normalized).mean(_OVER)
        grad_x = grad_x - per_channel(average) - normalized * per_channel(projection)
    return (grad_x * per_channel(rstd)).to(x.dtype), grad_weight.to(weight.dtype), grad.sum(_OVER).to(weight.dtype)


def bnet_gradients_of(ctx, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple:
    """The same as a function of ``(x, weight, bias, eps, mean, var)`` returns it that noted ``of_batch``, ``eps``."""
    statistics = () if ctx.of_batch else (mean, rstd)
    gradients = bnet_gradients(grad, x, weight, ctx.eps, *statistics)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), None, None, None)
