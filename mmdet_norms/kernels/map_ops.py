"""The passes over a map that a norm's training consists of, each at about the speed of memory.

Vectors of ``(C,)`` mean one value a channel, of ``(N, C)`` one value a channel of each instance. They are fp32, or fp64
for fp64 maps. Maps are ``(N, C, H, W)`` of any floating dtype, not empty; results have dtype and layout of the map.

Most are kernels of torch's batch norm, whatever they compute there. Those read a map once, write nothing in between,
take half precision maps with fp32 vectors, and are fast in both layouts, of which ``torch.var_mean`` (20 times as slow
on a CPU), products followed by sums, and ``addcmul`` with two vectors are neither. Statistics of instances are those of
channels: a contiguous map is a map of one instance with ``N C`` channels, in channels_last each instance is one.

On a GPU where Triton works they are kernels of its own (:mod:`.triton`), and as many of instances as of channels.

Compiled code gets the plain formulas, which the compiler fuses better; so do devices other than CPU and CUDA.
"""

import torch
from torch import Tensor

from ..compat.torch_versions import is_compiling
from . import gpu
from .pointers import is_channels_last

_HALVES = (torch.float16, torch.bfloat16)
_CHUNK = 2**21  # values; few enough to stay in a large cache, and to take little memory
_PIECE = 2**14  # positions; some kernels add one after the other, which over a million costs fp32 four digits


def second_moment(x: Tensor) -> Tensor:
    """``E[x^2]`` per channel ``(C,)``."""
    if _has_triton(x):
        return gpu.second_moment(x)
    if not _has_kernels(x):
        return x.to(_wide(x)).square().mean((0, 2, 3))
    x = _dense(x)
    size = x.shape[2] * x.shape[3]
    if _has_slow_moments(x):
        parts = torch.linalg.vector_norm(x, 2, 3 if size > _PIECE else (2, 3)).square()
        return parts.view(*x.shape[:2], -1).sum(2).mean(0) / size
    mean, var = _channel_moments(x)
    return mean.square() + var


def moments(x: Tensor, per_instance: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, ``(C,)`` or ``(N, C)``. From deviations: a mean that is large against them is fine."""
    if _has_triton(x):
        return gpu.moments(x, per_instance)
    if not _has_kernels(x):
        var, mean = torch.var_mean(x.to(_wide(x)), (2, 3) if per_instance else (0, 2, 3), correction=0)
        return mean, var
    x = _dense(x)
    if not _has_slow_moments(x):
        return _each(_channel_moments, per_instance, x)
    mean, var = _plane_moments(x)
    if per_instance:
        return mean, var
    total = mean.mean(0)
    return total, (var + (mean - total).square()).mean(0)


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * (x - centre) + shift``; all vectors alike, ``(C,)`` or ``(N, C)``."""
    if _has_triton(x):
        return gpu.affine(x, centre, scale, shift)
    if not _has_kernels(x):
        y = (x.to(_wide(x)) - _spread(centre)) * _spread(scale) + _spread(shift)
        return y.to(x.dtype)
    x, one = _dense(x), torch.ones_like(scale)
    if scale.dim() == 2 and len(x) > 4 and is_channels_last(x) and x.dtype not in _HALVES:
        return torch.addcmul(_spread(shift - scale * centre), x, _spread(scale))  # fast in this layout and these dtypes
    # Written into y, rather than returned: the result must be no view, or nobody could work on it in place.
    y, unused = torch.empty_like(x), scale.new_empty(0)
    for part, into, *vectors in _parts((x, y), scale, shift, centre, one):
        torch.ops.aten.native_batch_norm.out(
            part, *vectors, False, 0.0, 0.0, out=into, save_mean=unused, save_invstd=unused
        )
    return y


def gradient_sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """``sum grad`` and ``sum grad * (x - centre)``, shaped as ``centre``: ``(C,)`` or ``(N, C)``."""
    if _has_triton(x):
        return gpu.gradient_sums(grad, x, centre)
    if not _has_kernels(x):
        grad, over = grad.to(_wide(x)), (2, 3) if centre.dim() == 2 else (0, 2, 3)
        return grad.sum(over), (grad * (x - _spread(centre))).sum(over)
    x, one = _dense(x), torch.ones_like(centre)
    grad = _like(grad, x)
    sums = []
    for part, of_part, mean, var in _parts((x, grad), centre, one):
        _, by_scale, by_shift = torch.ops.aten.native_batch_norm_backward(
            of_part, part, var, mean, var, mean, var, False, 0.0, [False, True, True]
        )
        sums.append((by_shift, by_scale))
    total, centred = (torch.cat(rows).view_as(centre) for rows in zip(*sums))
    return total, centred


def gradient(grad: Tensor, x: Tensor, gain: Tensor, centre: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """``gain * grad + slope * (x - centre) + shift``; all vectors alike, ``(C,)`` or ``(N, C)``."""
    if _has_triton(x):
        return gpu.gradient(grad, x, gain, centre, slope, shift)
    if not _has_kernels(x):
        y = grad * _spread(gain) + (x.to(_wide(x)) - _spread(centre)) * _spread(slope) + _spread(shift)
        return y.to(x.dtype)
    grad = _like(grad, _dense(x))
    y = affine(x, centre, slope, shift)
    if x.dtype in _HALVES and x.device.type == 'cpu':  # where mixed dtypes take 10 to 50 times as long
        return y.add_(affine(grad, torch.zeros_like(gain), gain, torch.zeros_like(gain)))
    return y.addcmul_(grad, _spread(gain))


def _has_triton(x: Tensor) -> bool:
    return not is_compiling() and gpu.is_supported(x)


def _has_kernels(x: Tensor) -> bool:
    return x.device.type in ('cpu', 'cuda') and not is_compiling()


def _has_slow_moments(x: Tensor) -> bool:
    """Batch norm's statistics take 7 times as long there as in channels_last or in half precision."""
    return x.device.type == 'cpu' and x.is_contiguous() and x.dtype not in _HALVES


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _spread(vector: Tensor) -> Tensor:
    """For broadcasting over a map."""
    return vector.view(*vector.shape, 1, 1)


def _dense(x: Tensor) -> Tensor:
    """x in one of the two layouts that the kernels know."""
    return x if is_channels_last(x) else x.contiguous()


def _like(grad: Tensor, x: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def _parts(maps: tuple[Tensor, ...], *vectors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of dense maps of one layout, and of the vectors, in which every channel has one value of a vector."""
    x = maps[0]
    if vectors[0].dim() == 1:
        return [(*maps, *vectors)]
    if is_channels_last(x):
        return list(zip(*(t.split(1) for t in maps), *vectors))
    return [(*(t.view(1, -1, *t.shape[2:]) for t in maps), *(v.reshape(-1) for v in vectors))]


def _each(function, per_instance: bool, x: Tensor):
    """``function`` of the map, or of its instances, stacked."""
    if not per_instance:
        return function(x)
    if not is_channels_last(x):
        return tuple(t.view(x.shape[:2]) for t in function(x.reshape(1, -1, *x.shape[2:])))
    return tuple(map(torch.stack, zip(*map(function, x.split(1)))))


def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    # Running statistics (dummies) make the kernel use their dtype for its results.
    dummies = torch.zeros(2, x.shape[1], dtype=_wide(x), device=x.device)
    pieces = _pieces(x)
    means, variances = zip(*(torch.batch_norm_update_stats(piece, dummies[0], dummies[1], 0.0) for piece in pieces))
    if len(pieces) == 1:
        return means[0], variances[0]
    share = torch.tensor([[piece.numel() / x.numel()] for piece in pieces], dtype=dummies.dtype)
    means, variances = torch.stack(means), torch.stack(variances)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _pieces(x: Tensor) -> list[Tensor]:
    height, width = x.shape[2:]
    if x.device.type != 'cpu' or not is_channels_last(x):
        return [x]
    instances = x.split(max(1, _PIECE // (height * width)))
    return [piece for part in instances for piece in part.split(max(1, _PIECE // (width * len(part))), 2)]


def _plane_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments ``(N, C)`` of a contiguous map by the kernel of group norm, whose normalized map is thrown away."""
    size = x.shape[2] * x.shape[3]
    means, rstds = [], []
    for planes in x.view(-1, size).split(max(1, _CHUNK // size)):
        _, mean, rstd = torch.native_group_norm(planes, None, None, 1, len(planes), size, len(planes), 0.0)
        means.append(mean.view(-1)), rstds.append(rstd.view(-1))
    return torch.cat(means).view(x.shape[:2]), torch.cat(rstds).reciprocal().square().view(x.shape[:2])
