"""Triton kernels of the map operations (:mod:`mmdet_norms.kernels.map_ops`), which has their formulas and shapes.

Of the eight times that batch norm's training reads or writes a map, each is here once: the statistics read x;
:func:`affine` reads x and writes y; :func:`gradient_sums` reads x and its gradient; :func:`gradient` reads both and
writes one. Statistics of each image are as cheap as those of each channel, which follow from them.

Arguments of the kernels:

* ``x``, ``grad``, ``y``, ``out``: maps of N images of C channels and ``UNIT * S`` positions (H W), in channels_last if
  LAST.
* ``centre``, ``scale``, ``shift``, ``gain``, ``slope``: ``(C,)``, or ``(N, C)`` if PER_INSTANCE; ``mean``, ``var``,
  ``total``, ``centred_total``, too.
* ``origins``, ``sums``, ``squares``, ``centred_sums``: ``(N * parts, C)``, of each piece of an image.
* ``parts``: pieces of an image. ``turns``: tiles of a piece. ``length``: positions of a piece. ``rows``: pieces that
  are joined.
* BLOCK_S positions of BLOCK_C channels are a tile, BLOCK_P pieces are joined at a time, ACC is the dtype of sums.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..groups import groups_of, moments_of_groups, of_images, sums_of_groups
from ..layouts import dense, is_channels_last, like
from .common import launch, pieces, pointwise_tile, power_of_two, wide


@triton.jit
def _place(C, S, parts, LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Instance, first channel and piece of this program; neighbours in memory belong to neighbouring programs."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    if LAST:
        n, piece, block = pid // blocks // parts, pid // blocks % parts, pid % blocks
    else:
        n, piece, block = pid // parts // blocks, pid % parts, pid // parts % blocks
    return n, block * BLOCK_C, piece


@triton.jit
def _offsets(s, c, C, S, LAST: tl.constexpr):
    """Places of positions times channels within an instance."""
    if LAST:
        return s[:, None] * C + c[None, :]
    return s[:, None] + c[None, :] * S


@triton.jit(do_not_specialize=('S', 'parts', 'turns'))
def _moments_kernel(
    x, origins, sums, squares, C, S, parts, turns,
    CENTRED: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sums of ``x - origin`` and of its square over the positions of ``turns`` tiles; not CENTRED: of the square of x.

    The origin is the mean of the first tile. The digits that the difference of the two then loses are few, whatever x
    is: how far it may be from the mean of all tiles is limited by their variance, of which it is a part.
    """
    S *= UNIT
    n, first, piece = _place(C, S, parts, LAST, BLOCK_C)
    c, lane = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    x += n.to(tl.int64) * C * S
    begin = piece * (turns * BLOCK_S)
    end = tl.minimum(begin + turns * BLOCK_S, S)
    out = (n * parts + piece).to(tl.int64) * C + c
    origin = tl.zeros((BLOCK_C,), ACC)
    if CENTRED:
        mask = (begin + lane < end)[:, None] & (c < C)[None, :]
        value = tl.load(x + _offsets(begin + lane, c, C, S, LAST), mask, other=0).to(ACC)
        origin = tl.sum(value, 0) / tl.full((), tl.minimum(BLOCK_S, end - begin), ACC)
        tl.store(origins + out, origin, c < C)
    plain = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    square = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    for start in range(begin, end, BLOCK_S):
        s = start + lane
        mask = (s < end)[:, None] & (c < C)[None, :]
        value = tl.load(x + _offsets(s, c, C, S, LAST), mask, other=0).to(ACC)
        if CENTRED:
            value = tl.where(mask, value - origin[None, :], 0)
            plain += value
        square += value * value
    if CENTRED:
        tl.store(sums + out, tl.sum(plain, 0), c < C)
    tl.store(squares + out, tl.sum(square, 0), c < C)


@triton.jit(do_not_specialize=('S', 'parts', 'length', 'rows', 'total'))
def _join_moments_kernel(
    origins, sums, squares, mean, var, C, S, parts, length, rows, total,
    CENTRED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Moments of ``rows`` pieces of ``length`` positions, or what is left of S, from the sums of each."""
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_P)
    total = tl.full((), total, ACC)
    centre = tl.zeros((BLOCK_C,), ACC)
    if CENTRED:
        joined = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        for start in range(0, rows, BLOCK_P):
            p = start + lane
            mask, place = (p < rows)[:, None] & (c < C)[None, :], (row * rows + p)[:, None] * C + c[None, :]
            count = tl.minimum(length, S - p % parts * length).to(ACC)[:, None]
            joined += count * tl.load(origins + place, mask, other=0) + tl.load(sums + place, mask, other=0)
        centre = tl.sum(joined, 0) / total
    plain = tl.zeros((BLOCK_P, BLOCK_C), ACC)  # what rounding left of the sum of x - centre
    square = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for start in range(0, rows, BLOCK_P):
        p = start + lane
        mask, place = (p < rows)[:, None] & (c < C)[None, :], (row * rows + p)[:, None] * C + c[None, :]
        square += tl.load(squares + place, mask, other=0)
        if CENTRED:
            count = tl.minimum(length, S - p % parts * length).to(ACC)[:, None]
            away = tl.where(mask, tl.load(origins + place, mask, other=0) - centre[None, :], 0)
            moved = tl.load(sums + place, mask, other=0)
            plain += moved + count * away
            square += (2 * moved + count * away) * away
    rest = tl.sum(plain, 0) / total
    if CENTRED:
        tl.store(mean + row * C + c, centre + rest, c < C)
    spread = tl.sum(square, 0) / total - rest * rest
    tl.store(var + row * C + c, tl.where(spread < 0, 0, spread), c < C)  # nan stays


@triton.jit(do_not_specialize=('S', 'parts'))
def _affine_kernel(
    x, centre, scale, shift, y, C, S, parts,
    PER_INSTANCE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """``y = scale * (x - centre) + shift``, a tile of it."""
    S *= UNIT
    n, first, piece = _place(C, S, parts, LAST, BLOCK_C)
    c, s = first + tl.arange(0, BLOCK_C), piece * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (s < S)[:, None] & (c < C)[None, :]
    place = n.to(tl.int64) * C * S + _offsets(s, c, C, S, LAST)
    row = n * C + c if PER_INSTANCE else c
    a = tl.load(centre + row, c < C, other=0).to(ACC)[None, :]
    b = tl.load(scale + row, c < C, other=0).to(ACC)[None, :]
    d = tl.load(shift + row, c < C, other=0).to(ACC)[None, :]
    value = tl.load(x + place, mask, other=0).to(ACC)
    tl.store(y + place, (value - a) * b + d, mask)


@triton.jit(do_not_specialize=('S', 'parts', 'turns'))
def _gradient_sums_kernel(
    grad, x, centre, sums, centred_sums, C, S, parts, turns,
    PER_INSTANCE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sums of ``grad`` and of ``grad * (x - centre)`` over a piece."""
    S *= UNIT
    n, first, piece = _place(C, S, parts, LAST, BLOCK_C)
    c, lane = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    middle = tl.load(centre + (n * C + c if PER_INSTANCE else c), c < C, other=0).to(ACC)[None, :]
    begin = piece * (turns * BLOCK_S)
    end = tl.minimum(begin + turns * BLOCK_S, S)
    plain = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    centred = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    for start in range(begin, end, BLOCK_S):
        s = start + lane
        mask = (s < end)[:, None] & (c < C)[None, :]
        place = n.to(tl.int64) * C * S + _offsets(s, c, C, S, LAST)
        g = tl.load(grad + place, mask, other=0).to(ACC)
        plain += g
        centred += g * (tl.load(x + place, mask, other=0).to(ACC) - middle)
    out = (n * parts + piece).to(tl.int64) * C + c
    tl.store(sums + out, tl.sum(plain, 0), c < C)
    tl.store(centred_sums + out, tl.sum(centred, 0), c < C)


@triton.jit(do_not_specialize=('C', 'rows'))
def _join_sums_kernel(
    sums, centred_sums, total, centred_total, C, rows,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Two sums, each of ``rows`` pieces."""
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    plain = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    centred = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for start in range(0, rows, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < rows)[:, None] & (c < C)[None, :]
        place = (row * rows + p)[:, None] * C + c[None, :]
        plain += tl.load(sums + place, mask, other=0)
        centred += tl.load(centred_sums + place, mask, other=0)
    tl.store(total + row * C + c, tl.sum(plain, 0), c < C)
    tl.store(centred_total + row * C + c, tl.sum(centred, 0), c < C)


@triton.jit(do_not_specialize=('S', 'parts'))
def _gradient_kernel(
    grad, x, gain, centre, slope, shift, out, C, S, parts,
    PER_INSTANCE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """``out = gain * grad + slope * (x - centre) + shift``, a tile of it."""
    S *= UNIT
    n, first, piece = _place(C, S, parts, LAST, BLOCK_C)
    c, s = first + tl.arange(0, BLOCK_C), piece * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (s < S)[:, None] & (c < C)[None, :]
    place = n.to(tl.int64) * C * S + _offsets(s, c, C, S, LAST)
    row = n * C + c if PER_INSTANCE else c
    a = tl.load(gain + row, c < C, other=0).to(ACC)[None, :]
    b = tl.load(centre + row, c < C, other=0).to(ACC)[None, :]
    d = tl.load(slope + row, c < C, other=0).to(ACC)[None, :]
    e = tl.load(shift + row, c < C, other=0).to(ACC)[None, :]
    g = tl.load(grad + place, mask, other=0).to(ACC)
    value = tl.load(x + place, mask, other=0).to(ACC)
    tl.store(out + place, g * a + (value - b) * d + e, mask)


def _reduction(x: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Arguments of a kernel that reads an instance in pieces of several tiles: (how to cut, the tile)."""
    tile = pointwise_tile(x)
    count = triton.cdiv(x.shape[2] * x.shape[3], tile['BLOCK_S'])
    turns = triton.cdiv(count, pieces(count, 4 * _programs(x, 1, tile), 1))
    return dict(parts=triton.cdiv(count, turns), turns=turns), tile


def _sizes(x: Tensor) -> dict[str, int]:
    """Of a kernel that reads a map: ``UNIT * S`` positions, which tells the compiler how channels are aligned."""
    last, positions = is_channels_last(x), x.shape[2] * x.shape[3]
    unit = 1 if last else math.gcd(positions, 16 // x.element_size())
    return dict(C=x.shape[1], S=positions // unit, UNIT=unit, LAST=last)


def _programs(x: Tensor, parts: int, tile: dict[str, int]) -> int:
    return x.shape[0] * parts * triton.cdiv(x.shape[1], tile['BLOCK_C'])


def _join_tile(x: Tensor, rows: int) -> dict[str, int]:
    """Many pieces at a time, as few programs have to wait for each other's; at least 32 bytes of each."""
    block_p = power_of_two(rows, 1, 256)
    return dict(BLOCK_P=block_p, BLOCK_C=power_of_two(x.shape[1], 1, max(8, min(32, 2048 // block_p))))


def _joined_moments(x: Tensor, per_instance: bool, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, ``(C,)`` or ``(N, C)``; not centred: no mean, and ``E[x^2]`` for the variance."""
    x = dense(x)
    cut, tile = _reduction(x)
    options = dict(dtype=wide(x.dtype), device=x.device)
    parts = torch.empty(3, x.shape[0] * cut['parts'], x.shape[1], **options)
    launch(
        _moments_kernel, _programs(x, cut['parts'], tile), x, x, *parts, **_sizes(x), **cut, CENTRED=centred, **tile,
    )  # fmt: skip
    rows = cut['parts'] if per_instance else parts.shape[1]
    shape = x.shape[:2] if per_instance else x.shape[1:2]
    mean, var = torch.empty(shape, **options), torch.empty(shape, **options)
    join = _join_tile(x, rows)
    launch(
        _join_moments_kernel, mean.numel() // x.shape[1] * triton.cdiv(x.shape[1], join['BLOCK_C']), x, *parts, mean,
        var, x.shape[1], x.shape[2] * x.shape[3], parts=cut['parts'], length=cut['turns'] * tile['BLOCK_S'], rows=rows,
        total=x.numel() // mean.numel(), CENTRED=centred, **join, per_instance=per_instance,
    )  # fmt: skip
    return mean, var


def _pointwise(kernel, x: Tensor, *args: Tensor, vector: Tensor) -> None:
    tile = pointwise_tile(x)
    parts = triton.cdiv(x.shape[2] * x.shape[3], tile['BLOCK_S'])
    launch(
        kernel, _programs(x, parts, tile), x, *args, **_sizes(x), parts=parts, PER_INSTANCE=vector.dim() == 2,
        **tile, per_instance=vector.dim() == 2,
    )  # fmt: skip


def second_moment(x: Tensor, groups: int | None = None) -> Tensor:
    if groups is None:
        return _joined_moments(x, False, False)[1]
    return sums_of_groups(_joined_moments(x, True, False)[1], groups) / (len(x) // groups)


def moments(x: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
    if groups is None:
        return _joined_moments(x, False, True)
    return moments_of_groups(*_joined_moments(x, True, True), groups)


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    vectors = _vectors(x, centre, scale, shift)
    _pointwise(_affine_kernel, x, x, *vectors, y, vector=vectors[0])
    return y


def gradient_sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    x, groups = dense(x), groups_of(centre)
    grad, (centre,) = like(grad, x), _vectors(x, centre)
    cut, tile = _reduction(x)
    per_instance = centre.dim() == 2
    sums = torch.empty(2, x.shape[0] * cut['parts'], x.shape[1], dtype=wide(x.dtype), device=x.device)
    launch(
        _gradient_sums_kernel, _programs(x, cut['parts'], tile), x, grad, x, centre, *sums, **_sizes(x), **cut,
        PER_INSTANCE=per_instance, **tile, per_instance=per_instance,
    )  # fmt: skip
    rows = cut['parts'] if per_instance else sums.shape[1]
    total, centred = sums.new_empty(centre.shape), sums.new_empty(centre.shape)
    join = _join_tile(x, rows)
    launch(
        _join_sums_kernel, total.numel() // x.shape[1] * triton.cdiv(x.shape[1], join['BLOCK_C']), x, *sums, total,
        centred, x.shape[1], rows, **join, per_instance=per_instance,
    )  # fmt: skip
    if groups is None:
        return total, centred
    return sums_of_groups(total, groups), sums_of_groups(centred, groups)


def gradient(grad: Tensor, x: Tensor, gain: Tensor, centre: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    x = dense(x)
    out = torch.empty_like(x)
    vectors = _vectors(x, gain, centre, slope, shift)
    _pointwise(_gradient_kernel, x, like(grad, x), x, *vectors, out, vector=vectors[0])
    return out


def _vectors(x: Tensor, *vectors: Tensor) -> list[Tensor]:
    """As kernels read them: ``(C,)``, or ``(N, C)`` from those of groups ``(G, C)``."""
    return [(of_images(v, x.shape[0]) if v.dim() == 2 else v).contiguous() for v in vectors]
