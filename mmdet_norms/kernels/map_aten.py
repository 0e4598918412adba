"""The operations of :mod:`.map_ops` by kernels of torch's batch norm, whatever they compute there.

Those read a map once, write nothing in between, take half precision maps with fp32 vectors, and are fast in both
layouts. Of ``torch.var_mean`` (20 times as slow on a CPU), products followed by sums, and ``addcmul`` with two vectors
none is. They know vectors ``(C,)`` only: see :func:`_parts` for groups. Where one of them fails, the formula is used.
"""

import torch
from torch import Tensor

from ..compat.torch_internals import affine_into, centred_sums, channel_moments, or_plain, row_moments
from . import map_formula
from .groups import groups_of, moments_of_groups, of_images, sums_of_groups
from .layouts import dense, is_channels_last, like

_HALVES = (torch.float16, torch.bfloat16)
_CHUNK = 2**21  # values; few enough to stay in a large cache, and to take little memory
_PIECE = 2**14  # positions; some kernels add one after the other, which over a million costs fp32 four digits


@or_plain(map_formula.second_moment)
def second_moment(x: Tensor, groups: int | None = None) -> Tensor:
    x = dense(x)
    size = x.shape[2] * x.shape[3]
    if not _has_slow_moments(x):
        mean, var = moments(x, groups)
        return mean.square() + var
    squares = torch.linalg.vector_norm(x, 2, 3 if size > _PIECE else (2, 3)).square()
    return sums_of_groups(squares.view(*x.shape[:2], -1).sum(2), groups) / (len(x) // (groups or 1) * size)


@or_plain(map_formula.moments)
def moments(x: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
    x = dense(x)
    if _has_slow_moments(x):
        return moments_of_groups(*_plane_moments(x), groups)
    means, variances = zip(*(_channel_moments(part) for (part,) in _parts(groups, x)))
    if groups is None:
        return means[0], variances[0]
    return moments_of_groups(*(torch.cat(rows).view(-1, x.shape[1]) for rows in (means, variances)), groups)


@or_plain(map_formula.affine)
def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x, groups = dense(x), groups_of(scale)
    if groups and groups > 4 and is_channels_last(x) and x.dtype not in _HALVES:  # where it is fast
        shift, scale = map_formula.spread(x, shift - scale * centre, scale)
        return torch.addcmul(shift, x, scale)
    # Written into y, rather than returned: the result must be no view, or nobody could work on it in place.
    y = torch.empty_like(x)
    for part, into, *vectors in _parts(groups, x, y, vectors=(scale, shift, centre)):
        affine_into(into, part, *vectors)
    return y


@or_plain(map_formula.gradient_sums)
def gradient_sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    x, groups = dense(x), groups_of(centre)
    sums, centred = zip(*(centred_sums(*part) for part in _parts(groups, like(grad, x), x, vectors=(centre,))))
    if groups is None:
        return sums[0], centred[0]
    return tuple(sums_of_groups(torch.cat(rows).view(-1, x.shape[1]), groups) for rows in (sums, centred))


@or_plain(map_formula.gradient)
def gradient(grad: Tensor, x: Tensor, gain: Tensor, centre: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    x = dense(x)
    grad, y = like(grad, x), affine(x, centre, slope, shift)
    if x.dtype in _HALVES and x.device.type == 'cpu':  # where mixed dtypes take 10 to 50 times as long
        zero = torch.zeros_like(gain)
        return y.add_(affine(grad, zero, gain, zero))
    return y.addcmul_(grad, *map_formula.spread(x, gain))


def _parts(groups: int | None, *maps: Tensor, vectors: tuple[Tensor, ...] = ()) -> list[tuple[Tensor, ...]]:
    """Views of dense maps of one layout, and of vectors, in which every channel has one value of a vector.

    In channels_last each group is a part. Contiguous maps are one part: an image that has the channels of all images.
    """
    if groups is None:
        return [(*maps, *vectors)]
    images = len(maps[0])
    if is_channels_last(maps[0]):
        return list(zip(*(x.split(images // groups) for x in maps), *vectors))
    flat = (x.view(1, -1, *x.shape[2:]) for x in maps)
    return [(*flat, *(of_images(vector, images).flatten() for vector in vectors))]


def _has_slow_moments(x: Tensor) -> bool:
    """Batch norm's statistics take 7 times as long there as in channels_last or in half precision."""
    return x.device.type == 'cpu' and x.is_contiguous() and x.dtype not in _HALVES


def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of a dense map."""
    pieces = _pieces(x)
    if len(pieces) == 1:
        return channel_moments(x)
    means, variances = map(torch.stack, zip(*map(channel_moments, pieces)))
    share = means.new_tensor([[piece.numel() / x.numel()] for piece in pieces])
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _pieces(x: Tensor) -> list[Tensor]:
    """Views of at most about ``_PIECE`` positions where the kernel adds one after the other."""
    height, width = x.shape[2:]
    if x.device.type != 'cpu' or not is_channels_last(x):
        return [x]
    images = x.split(max(1, _PIECE // (height * width)))
    return [piece for part in images for piece in part.split(max(1, _PIECE // (width * len(part))), 2)]


def _plane_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(N, C)`` of the images of a contiguous map."""
    size = x.shape[2] * x.shape[3]
    chunks = x.view(-1, size).split(max(1, _CHUNK // size))
    means, variances = zip(*map(row_moments, chunks))
    return torch.cat(means).view(x.shape[:2]), torch.cat(variances).view(x.shape[:2])
