"""BNET on a CPU in the passes over the map that the maths needs, saving its input only.

Backward needs no reduction for the second term of batch norm, because per channel
``sum(grad_xhat * xhat) = sum over the taps of (taps * grad_taps)``. Two ways to compute it:

* compiled (``csrc/bnet.h``): channel by channel, so that the map is read once forward and once backward;
* in torch, for installations without a C compiler, a few channels at a time, so that what is computed of them stays in
  the cache. There, the convolution sees ``x - mean`` and ``1 / std`` is multiplied into its taps: zero padding means
  the same in both spaces, and statistics cost a sum and a norm instead of torch's slow variance. oneDNN has a fast
  weight gradient for depthwise kernels up to three columns wide, ten times faster per tap than its wider ones, so the
  taps' gradient is computed a few columns at a time.

On a GPU, :mod:`.triton` has a third.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat.torch_internals import is_functorch_active
from ..compat.torch_versions import autocast_is_on, is_compiling
from . import compiled, gpu, pointers, second

_CHANNEL = (1, -1, 1, 1)
_IN_CACHE = 1 << 19  # values a thread: what is computed of them, some maps as large, fits into the last cache


def normalize_and_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor | None = None, var: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution of the normalized map, with statistics of the batch unless some are given.

    Args:
        x: (N, C, H, W), as :func:`is_supported` wants it, with two values per channel or more unless statistics
            are given.
        weight: taps (C, 1, k, k), k odd.
        bias: (C,).
        eps: added to the variance inside the root.
        mean, var: (C,), constants to normalize with.

    Returns:
        y (N, C, H, W), and the mean and biased variance (C,) that were used, which carry no gradient.
    """
    if gpu.is_supported(x, weight, bias):
        return gpu.normalize_and_convolve(x, weight, bias, eps, mean, var)
    way = _Compiled if compiled.library() and compiled.is_plain(x, weight, bias, mean, var) else _InTorch
    return way.apply(x, weight, bias, eps, mean, var)


def is_supported(x: Tensor, *others: Tensor) -> bool:
    """Is it a case for :func:`normalize_and_convolve`: eager, fp32 or fp64 on a CPU, not under autocast; or a GPU?"""
    return gpu.is_supported(x, *others) or (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.dtype in (torch.float32, torch.float64)
        and all(t.dtype == x.dtype and t.device.type == 'cpu' for t in (x, *others))
        and not autocast_is_on('cpu')
        and not is_compiling()
        and not torch.jit.is_tracing()
        and not is_functorch_active()
    )


def inference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    inplace: bool = False,
) -> Tensor:
    r"""What is left of BNET behind a folded convolution, and the end of a residual block with it.

    .. math::
        y_c = \mathrm{relu}(K_c * x_c + b_c + r_c)

    One pass by the compiled library on a CPU (contiguous fp32 or fp64) and by Triton on a GPU; by torch's own operators
    everywhere else, in compiled and exported code, and where a gradient is wanted.

    Args:
        x: (N, C, H, W), normalized by the convolution in front; padded with zeros.
        weight: taps (C, 1, k, k), k odd.
        bias: (C,).
        residual: (N, C, H, W), added; None for none.
        relu: whether to end with it.
        inplace: whether y may take the memory of x.

    Returns:
        y (N, C, H, W) in the dtype of x, accumulated in fp32 for halves.
    """
    tensors = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors if isinstance(t, Tensor))):
        if gpu.is_supported(x, weight, bias) and _is_like(residual, x):
            return gpu.bnet_inference(x, weight, bias, residual, relu)
        if is_supported(x, weight, bias) and _is_like(residual, x) and _suits_the_library(*tensors):
            return _compiled_inference(x, weight, bias, residual, relu, inplace)
    y = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), 1, weight.shape[-1] // 2, 1, weight.shape[0]).to(x.dtype)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y


def _is_like(residual: Tensor | None, x: Tensor) -> bool:
    """The same but for its values and layout; plain, as a subclass may not be what kernels would read."""
    return residual is None or (
        type(residual) is Tensor
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def _suits_the_library(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> bool:
    """In channels_last, torch's own convolution is the faster."""
    return (
        x.numel() > 0
        and compiled.library() is not None
        and compiled.is_plain(x, weight, bias, *residual)
        and all(t.is_contiguous() for t in (x, *residual))
    )


def _compiled_inference(x, weight, bias, residual, relu, inplace) -> Tensor:
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
        if second.is_wanted(grad):
            return _second(ctx, grad, x, weight, mean, (var + ctx.eps).rsqrt())
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Whoever keeps saved tensors elsewhere meanwhile may give them back in another layout.
        x, *others = x if _layout(x) == torch.channels_last else x.contiguous(), weight, mean, var
        weight, mean, var = (t.contiguous() for t in others)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(mean)
        grad = grad.resolve_neg().contiguous(memory_format=_layout(x))
        tensors = dict(x=x, weight=weight, grad=grad, mean=mean, var=var)
        tensors |= dict(grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias)
        compiled.call('bnet_backward', tensors, ctx.eps, ctx.of_batch, needs_x=needs_x, needs_weight=needs_weight)
        return grad_x, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None, None


class _InTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, mean, var):
        ctx.of_batch, ctx.eps = mean is None, eps
        if ctx.of_batch:
            mean, var = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        y = torch.empty_like(x, memory_format=_layout(x))
        rstd = torch.empty_like(mean)
        for part in _parts(x):
            piece = x[:, part]
            if ctx.of_batch:
                mean[part] = _sum(piece) / (x.numel() // x.shape[1])
            centred = _dense(piece - mean[part].view(_CHANNEL), x)
            if ctx.of_batch:
                var[part] = _mean_square(centred)
            rstd[part] = torch.rsqrt(var[part] + eps)
            y[:, part] = _depthwise(centred, weight[part] * rstd[part].view(-1, 1, 1, 1), bias[part])
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, rstd = ctx.saved_tensors
        if second.is_wanted(grad):
            return _second(ctx, grad, x, weight, mean, rstd)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x, memory_format=_layout(x)) if needs_x else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(mean) if needs_bias else None
        for part in _parts(x):
            taps, of_y = weight[part], _dense(grad[:, part], x)
            if needs_bias:
                grad_bias[part] = _sum(of_y)
            if needs_weight or (needs_x and ctx.of_batch):
                centred, of_taps = _centred_and_taps_gradient(of_y, x[:, part], mean[part], taps)
                of_taps *= rstd[part].view(-1, 1, 1, 1)
            if needs_weight:
                grad_weight[part] = of_taps
            if needs_x:
                of_x = _depthwise(of_y, (taps * rstd[part].view(-1, 1, 1, 1)).flip(2, 3), None)
                if ctx.of_batch:
                    count = x.numel() // x.shape[1]
                    projection = (taps * of_taps).sum((1, 2, 3)) * rstd[part].square() / count
                    average = _sum(of_x) / count
                    of_x.addcmul_(centred, projection.view(_CHANNEL), value=-1).sub_(average.view(_CHANNEL))
                grad_x[:, part] = of_x
        return grad_x, grad_weight, grad_bias, None, None, None


def _second(ctx, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple:
    """Somebody wants to differentiate the gradient."""
    statistics = () if ctx.of_batch else (mean, rstd)
    gradients = second.bnet_gradients(grad, x, weight, ctx.eps, *statistics)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), None, None, None)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if pointers.is_channels_last(x) else torch.contiguous_format


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3))


def _mean_square(centred: Tensor) -> Tensor:
    """The biased variance. From deviations, as ``E[x^2] - E[x]^2`` cancels for large means."""
    count = centred.numel() // centred.shape[1]
    if _layout(centred) == torch.channels_last:  # a norm is slow there
        return _sum(centred.square()) / count
    return torch.linalg.vector_norm(centred, dim=(2, 3)).square().sum(0) / count


def _parts(x: Tensor) -> list[slice]:
    """Channels that are computed together: so few that what is computed of them stays in the cache.

    Multiples of 16, as oneDNN pads to that; channels-last, of 32, as a pixel's are read together.
    """
    values = max(1, x.numel() // x.shape[1])
    least = 32 if _layout(x) == torch.channels_last else 16
    step = max(1, _IN_CACHE * torch.get_num_threads() // values // least) * least
    return [slice(first, first + step) for first in range(0, x.shape[1], step)]


def _dense(piece: Tensor, x: Tensor) -> Tensor:
    return piece.contiguous(memory_format=_layout(x))


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, 1, weight.shape[-1] // 2, 1, weight.shape[0])


def _centred_and_taps_gradient(grad: Tensor, x: Tensor, mean: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``x - mean``, and the gradient of the taps of its depthwise convolution: at most three columns at a time."""
    channels, _, size, _ = weight.shape
    n, c, h, w = x.shape
    half = size // 2
    padded = grad.new_empty((n, c, h, w + 2 * half)).contiguous(memory_format=_layout(grad))
    padded[..., :half] = 0
    padded[..., half + w :] = 0
    centred = torch.sub(x, mean.view(_CHANNEL), out=padded[..., half : half + w])
    parts = []
    for first, columns in _column_groups(size):
        shifted = _dense(padded[..., first : first + w + columns - 1], grad)
        taps = weight.new_empty(channels, 1, size, columns)
        parts.append(_convolution_weight_gradient(grad, shifted, taps, half))
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


def _convolution_weight_gradient(grad: Tensor, x: Tensor, taps: Tensor, half: int) -> Tensor:
    return torch.ops.aten.convolution_backward(
        grad, x, taps, None, [1, 1], [half, 0], [1, 1], False, [0, 0], taps.shape[0], [False, True, False]
    )[1]
