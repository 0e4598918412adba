"""The operations of :mod:`.depthwise` by the C library: channel by channel, so that each is read from memory once.

For dense maps in fp32 or fp64 on a CPU, and everything else in their dtype: see :func:`.compiled.is_plain`.
"""

import torch
from torch import Tensor

from . import compiled
from .double_backward import bnet_gradients_of, is_wanted
from .layouts import dense, like


def normalize_and_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor | None = None, var: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return _Compiled.apply(x, weight, bias, eps, mean, var)


def inference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, inplace: bool
) -> Tensor:  # fmt: skip
    # A row of x is overwritten before the residual's next ones are read, which may be parts of x.
    apart = residual is None or residual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    y = x if inplace and apart else torch.empty_like(x)
    mean, var = torch.zeros_like(bias), torch.ones_like(bias)
    tensors = dict(x=x, weight=weight, bias=bias, residual=residual, y=y, mean=mean, var=var)
    compiled.call('bnet_forward', tensors, 0.0, False, relu=relu)
    return y


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, mean, var):
        of_batch = mean is None
        if of_batch:
            mean, var = torch.empty_like(bias), torch.empty_like(bias)
        y = torch.empty_like(x)
        tensors = dict(x=x, weight=weight, bias=bias, y=y, mean=mean, var=var)
        compiled.call('bnet_forward', tensors, eps, of_batch)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.of_batch, ctx.eps = of_batch, eps
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, var = ctx.saved_tensors
        if is_wanted(grad):
            return bnet_gradients_of(ctx, grad, x, weight, mean, (var + ctx.eps).rsqrt())
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Whoever keeps saved tensors elsewhere meanwhile may give them back in another layout.
        x, (weight, mean, var) = dense(x), (t.contiguous() for t in (weight, mean, var))
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(mean)
        grad = like(grad.resolve_neg(), x)
        tensors = dict(x=x, weight=weight, grad=grad, mean=mean, var=var)
        tensors |= dict(grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias)
        compiled.call('bnet_backward', tensors, ctx.eps, ctx.of_batch, needs_x=needs_x, needs_weight=needs_weight)
        return grad_x, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None, None
