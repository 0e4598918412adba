"""Triton kernels of BNET (:mod:`mmdet_norms.kernels.depthwise`): batch norm applied while a tile is loaded.

Of the eight times that batch norm's training reads or writes a map, each is here once: statistics read x; the
convolution reads x and writes y; one kernel reads x and the gradient for those of weight and bias and for both sums of
batch norm's backward; one reads both and writes the gradient of x. x is all they save.

A program owns some columns of some channels and walks down the rows: each row of x adds to the k rows of results that
it is part of. A thread has STEP neighbouring columns of one channel or two, and keeps their kernels, or sums of
products, in registers. So a value of the map is loaded about 1 + k / STEP times in place of k^2, mostly from the cache.
The lanes of a warp have neighbouring channels in channels_last, else neighbouring columns.

Arguments of the kernels:

* ``x``, ``grad``, ``other``, ``y``: maps ``(N, C, H, W)``, in channels_last if LAST. UNIT: the width is UNIT W, or,
  LAST, there are UNIT C channels, which tells the compiler what is aligned.
* ``weight``, ``grad_weight``: ``(C, 1, K, K)``. ``bias``, ``mean``, ``var``, ``slope``, ``shift``, ``grad_bias``:
  ``(C,)``.
* ``parts``: ``(count, C, K^2 + 2)``, partial sums: see :func:`_sums_kernel`. ``eps``: in units of x squared.
* ``rows``: of y, for a program; ``strips`` of so many make a map; ``instances``: images of a program.
* LANES times STEP columns of BLOCK_C channels are a tile, UNROLL rows are loaded at a time, ACC is the dtype of sums.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...compat.torch_versions import is_compiling
from ..double_backward import bnet_gradients, is_wanted
from ..layouts import dense, is_channels_last, like
from .common import launch, least_padding, pieces, power_of_two, wide
from .map_triton import moments


@triton.jit
def _place(C, W, strips, LAST: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Instance (or group of them), first channel and column and strip of this program; neighbours share the cache."""
    pid = tl.program_id(0)
    blocks, columns = tl.cdiv(C, BLOCK_C), tl.cdiv(W, BLOCK_W)
    if LAST:
        block, column, strip = pid % blocks, pid // blocks % columns, pid // blocks // columns % strips
    else:
        column, strip, block = pid % columns, pid // columns % strips, pid // columns // strips % blocks
    return pid // blocks // columns // strips, block * BLOCK_C, column * BLOCK_W, strip


@triton.jit
def _row(
    x, w, limit, centre, by_column, BEFORE: tl.constexpr, COUNT: tl.constexpr, NORMALIZE: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tuple of the columns ``w - BEFORE`` and so on, less ``centre`` if NORMALIZE; 0 outside of 0 to ``limit``.

    VECTOR: so many columns are loaded by one instruction.
    """
    values = ()
    for i in tl.static_range(0, COUNT, VECTOR):
        at, column = x + (i - BEFORE) * by_column, w + (i - BEFORE)
        inside = column < limit
        if i < BEFORE:
            inside = inside & (column >= 0)
        if VECTOR == 1 and (NORMALIZE and x.dtype.element_ty == ACC):
            values += (tl.load(at, inside, other=centre) - centre,)
        elif VECTOR == 1:
            values += (_centred(tl.load(at, inside, other=0), inside, centre, NORMALIZE, ACC),)
        else:
            several = tl.load(at[:, :, None] + tl.arange(0, VECTOR)[None, None, :], inside[:, :, None], other=0)
            if VECTOR == 2:
                first, second = tl.split(several)
                several = (first, second)
            else:
                even, odd = tl.split(several.reshape(several.shape[0], several.shape[1], 2, 2))
                first, third = tl.split(even)
                second, fourth = tl.split(odd)
                several = (first, second, third, fourth)
            for j in tl.static_range(VECTOR):
                values += (_centred(several[j], inside, centre, NORMALIZE, ACC),)
    return values


@triton.jit
def _centred(value, inside, centre, NORMALIZE: tl.constexpr, ACC: tl.constexpr):
    if NORMALIZE:
        return tl.where(inside, value.to(ACC) - centre, 0)
    return value.to(ACC)


@triton.jit(do_not_specialize=('C', 'H', 'W', 'rows', 'strips'))
def _depthwise_kernel(
    x, weight, bias, mean, var, other, slope, shift, y, C, H, W, eps, rows, strips,
    K: tl.constexpr, NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Convolution of ``rows`` rows. NORMALIZE: of the normalized map. ADD: plus ``other``.

    BACKWARD: x is the gradient, the convolution transposed; minus ``slope * (other - mean) + shift`` if ADD.
    """
    HALF: tl.constexpr = K // 2
    VECTOR: tl.constexpr = 1 if LAST else UNIT
    BEFORE: tl.constexpr = (HALF + VECTOR - 1) // VECTOR * VECTOR
    WIDE: tl.constexpr = STEP + 2 * BEFORE
    if LAST:
        C *= UNIT
    else:
        W *= UNIT
    n, first_c, first_w, strip = _place(C, W, strips, LAST, LANES * STEP, BLOCK_C)
    c, w = (first_c + tl.arange(0, BLOCK_C))[None, :], (first_w + STEP * tl.arange(0, LANES))[:, None]
    place = n.to(tl.int64) * C * H * W + (w * C + c if LAST else c * H * W + w)
    by_row, by_column = (W * C, C) if LAST else (W, 1)
    x += place
    y += place
    if ADD:
        other += place
    limit = tl.where(c < C, W, 0)

    scale = tl.full((1, BLOCK_C), 1, ACC)
    centre = tl.zeros((1, BLOCK_C), ACC)
    if NORMALIZE or BACKWARD:
        scale = 1 / tl.sqrt(tl.load(var + c, c < C, other=1).to(ACC) + eps)
    if NORMALIZE or (BACKWARD and ADD):
        centre = tl.load(mean + c, c < C, other=0).to(ACC)
    first = tl.zeros((1, BLOCK_C), ACC)  # of a sum
    tilt = first
    if not BACKWARD:
        first = tl.load(bias + c, c < C, other=0).to(ACC)
    elif ADD:
        first, tilt = -tl.load(shift + c, c < C, other=0), tl.load(slope + c, c < C, other=0)
    kernel = ()
    for i in tl.static_range(K * K):
        value = tl.load(weight + c * (K * K) + (K * K - 1 - i if BACKWARD else i), c < C, other=0).to(ACC)
        kernel += (value * scale,)

    empty = tl.zeros((LANES, BLOCK_C), ACC) + first
    pending = ()  # sums of the rows row + HALF, ..., row - HALF of y, to which rows above x's row were added
    for _ in tl.static_range(K * STEP):
        pending += (empty,)
    begin = strip * rows
    end = tl.minimum(begin + rows, H)
    for start in range(begin - HALF, end + HALF, UNROLL):
        # All loads of a turn before its first store, which the compiler does not move them over.
        values = ()
        others = ()
        for u in tl.static_range(UNROLL):
            row = start + u
            row_of_x = x + row * by_row
            right = tl.where((row >= 0) & (row < H), limit, 0)
            values += _row(row_of_x, w, right, centre, by_column, BEFORE, WIDE, NORMALIZE, VECTOR, ACC)
            if ADD:
                row_of_other = other + (row - HALF) * by_row
                right = tl.where((row - HALF >= begin) & (row - HALF < end), limit, 0)
                others += _row(row_of_other, w, right, centre, by_column, 0, STEP, BACKWARD, VECTOR, ACC)
        for u in tl.static_range(UNROLL):
            row = start + u - HALF  # of y, which has got all it gets after this turn
            sums = ()
            for _ in tl.static_range(STEP):
                sums += (empty,)
            for dy in tl.static_range(K):
                for j in tl.static_range(STEP):
                    total = pending[dy * STEP + j]
                    for dx in tl.static_range(K):
                        total = tl.fma(kernel[dy * K + dx], values[u * WIDE + BEFORE - HALF + j + dx], total)
                    sums += (total,)
            row_of_y = y + row * by_row
            right = tl.where((row >= begin) & (row < end), limit, 0)
            results = ()
            for j in tl.static_range(STEP):
                out = sums[K * STEP + j]
                if ADD:
                    out = out - others[u * STEP + j] * tilt if BACKWARD else out + others[u * STEP + j]
                if RELU:
                    out = tl.where(out < 0, 0, out)  # nan stays
                results += (out,)
            for j in tl.static_range(0, STEP, VECTOR):
                if VECTOR == 1:
                    several = results[j]
                    tl.store(row_of_y + j * by_column, several, w + j < right)
                else:
                    if VECTOR == 2:
                        several = tl.join(results[j], results[j + 1])
                    else:
                        four = tl.join(tl.join(results[j], results[j + 2]), tl.join(results[j + 1], results[j + 3]))
                        several = four.reshape(LANES, BLOCK_C, 4)
                    at = row_of_y[:, :, None] + (j + tl.arange(0, VECTOR))[None, None, :]
                    tl.store(at, several, (w + j < right)[:, :, None])
            pending = ()
            for i in tl.static_range(K * STEP):
                pending += (sums[i],)


@triton.jit(do_not_specialize=('N', 'C', 'H', 'W', 'rows', 'strips', 'instances'))
def _sums_kernel(
    grad, x, weight, mean, parts, N, C, H, W, rows, strips, instances,
    K: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial sums ``(part, C, K^2 + 2)``: the gradient of weight times the deviation, ``sum grad``, and the sum of the
    gradient of the normalized map, in which ``grad`` counts with the values of a kernel that do not reach over the
    border."""
    HALF: tl.constexpr = K // 2
    VECTOR: tl.constexpr = 1 if LAST else UNIT
    BEFORE: tl.constexpr = (HALF + VECTOR - 1) // VECTOR * VECTOR
    WIDE: tl.constexpr = STEP + 2 * BEFORE
    if LAST:
        C *= UNIT
    else:
        W *= UNIT
    group, first_c, first_w, strip = _place(C, W, strips, LAST, LANES * STEP, BLOCK_C)
    c, w = (first_c + tl.arange(0, BLOCK_C))[None, :], (first_w + STEP * tl.arange(0, LANES))[:, None]
    place = w * C + c if LAST else c * H * W + w
    by_row, by_column = (W * C, C) if LAST else (W, 1)
    limit = tl.where(c < C, W, 0)
    centre = tl.load(mean + c, c < C, other=0).to(ACC)
    zero = tl.zeros((LANES, BLOCK_C), ACC)
    begin = strip * rows
    end = tl.minimum(begin + rows, H)
    stop = tl.minimum(group * instances + instances, N)

    # Not all of a kernel reaches x from the first and last rows. What the rest would add below is taken off before.
    within = zero
    if (begin < HALF) | (end > H - HALF):
        for n in range(group * instances, stop):
            here = tl.full((), n, tl.int64) * C * H * W + place
            for i in range(2 * HALF):
                row = tl.where(i < HALF, i, H - 2 * HALF + i)
                if (row >= begin) & (row < end) & ((i < HALF) | (row >= HALF)):
                    some = _row(grad + here + row * by_row, w, limit, centre, by_column, 0, STEP, False, VECTOR, ACC)
                    for dx in range(K):
                        off = tl.zeros((1, BLOCK_C), ACC)
                        for dy in range(K):
                            value = tl.load(weight + c * (K * K) + dy * K + dx, c < C, other=0).to(ACC)
                            off += tl.where((row + dy < HALF) | (row + dy >= H + HALF), value, 0)
                        for j in tl.static_range(STEP):
                            within -= tl.where((w + j + dx >= HALF) & (w + j + dx < W + HALF), off, 0) * some[j]

    products = ()
    for _ in tl.static_range(K * K):
        products += (zero,)
    columns = ()
    for _ in tl.static_range(STEP):
        columns += (zero,)
    for n in range(group * instances, stop):
        here = tl.full((), n, tl.int64) * C * H * W + place
        held = ()  # rows row + HALF, ..., row - HALF of grad, where row is that of x
        for _ in tl.static_range(K * STEP):
            held += (zero,)
        for start in range(begin - HALF, end + HALF, UNROLL):
            values = ()
            grads = ()
            for u in tl.static_range(UNROLL):
                row = start + u
                row_of_grad = grad + here + (row + HALF) * by_row
                right = tl.where((row + HALF >= begin) & (row + HALF < end), limit, 0)
                grads += _row(row_of_grad, w, right, centre, by_column, 0, STEP, False, VECTOR, ACC)
                row_of_x = x + here + row * by_row
                right = tl.where((row >= 0) & (row < H), limit, 0)
                values += _row(row_of_x, w, right, centre, by_column, BEFORE, WIDE, True, VECTOR, ACC)
            for u in tl.static_range(UNROLL):
                newer = ()
                added = ()
                for j in tl.static_range(STEP):
                    newer += (grads[u * STEP + j],)
                    added += (columns[j] + grads[u * STEP + j],)
                for i in tl.static_range((K - 1) * STEP):
                    newer += (held[i],)
                held = newer
                columns = added
                sums = ()
                for dy in tl.static_range(K):
                    for dx in tl.static_range(K):
                        total = products[dy * K + dx]
                        for j in tl.static_range(STEP):
                            total = tl.fma(held[dy * STEP + j], values[u * WIDE + BEFORE - HALF + j + dx], total)
                        sums += (total,)
                products = sums

    part = (group * strips + strip) * tl.cdiv(W, LANES * STEP) + first_w // (LANES * STEP)
    lane = first_c + tl.arange(0, BLOCK_C)
    out = parts + (part.to(tl.int64) * C + lane) * (K * K + 2)
    for i in tl.static_range(K * K):
        tl.store(out + i, tl.sum(products[i], 0), lane < C)
    for dx in range(K):
        column = tl.zeros((1, BLOCK_C), ACC)
        for dy in range(K):
            column += tl.load(weight + c * (K * K) + dy * K + dx, c < C, other=0).to(ACC)
        for j in tl.static_range(STEP):
            within += tl.where((w + j + dx >= HALF) & (w + j + dx < W + HALF), column, 0) * columns[j]
    plain = zero
    for j in tl.static_range(STEP):
        plain += columns[j]
    tl.store(out + K * K, tl.sum(plain, 0), lane < C)
    tl.store(out + (K * K + 1), tl.sum(within, 0), lane < C)


@triton.jit(do_not_specialize=('C', 'count', 'total'))
def _join_kernel(
    parts, weight, var, grad_weight, grad_bias, slope, shift, C, count, eps, total,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one channel: the gradients of weight and bias, and what batch norm's backward subtracts. SIZE: K^2."""
    c, j = tl.program_id(0), tl.arange(0, BLOCK)
    joined = tl.zeros((BLOCK_P, BLOCK), ACC)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        place = (p.to(tl.int64) * C + c)[:, None] * (SIZE + 2) + j[None, :]
        joined += tl.load(parts + place, (p < count)[:, None] & (j < SIZE + 2)[None, :], other=0)
    sums = tl.sum(joined, 0)
    scale = 1 / tl.sqrt(tl.load(var + c).to(ACC) + eps)
    kernel = tl.load(weight + c * SIZE + j, j < SIZE, other=0).to(ACC)
    tl.store(grad_weight + c * SIZE + j, sums * scale, j < SIZE)
    tl.store(grad_bias + c + j * 0, sums, j == SIZE)
    values = tl.full((), total, ACC)
    tl.store(slope + c, tl.sum(kernel * sums, 0) * scale * scale * scale / values)
    tl.store(shift + c, tl.sum(tl.where(j == SIZE + 1, sums, 0), 0) * scale / values)


def _tile(x: Tensor, size: int) -> dict[str, int]:
    """Lanes along the columns, columns of a lane, channels, rows that are loaded at a time, and warps.

    Rows at a time and two channels in a thread put more bytes on their way, and take fewer instructions for each, as
    long as registers last: tests/kernels/test_triton_resources.py.
    """
    channels, width, double = x.shape[1], x.shape[3], x.dtype == torch.float64
    if is_channels_last(x):
        step = 4 if width > 2 else 1
        unit = 2 if size <= 3 and channels % 64 == 0 and not double else 1
        lanes = power_of_two(triton.cdiv(width, step), 1, 4)
        return dict(LANES=lanes, STEP=step, UNIT=unit, BLOCK_C=32 * unit, UNROLL=1 if double else 2, num_warps=lanes)
    step = 4 if width > 8 else 1
    # One warp, which more columns than the map has would leave idle, and more channels make read from more places.
    # If it has one channel only, then its kernel is in the registers that the lanes share.
    lanes = least_padding(triton.cdiv(width, step), [4, 8, 16, 32])
    unroll = 1 if double else 4 if size <= 3 else 2
    return dict(LANES=lanes, STEP=step, UNIT=math.gcd(width, step), BLOCK_C=32 // lanes, UNROLL=unroll, num_warps=1)


def _cut(x: Tensor, tile: dict[str, int], size: int, overhead: float) -> dict[str, int]:
    """Rows of a program, and the strips that they make. ``overhead``: of each, in rows."""
    height, unroll = x.shape[2], tile['UNROLL']
    count = pieces(height, tile['num_warps'] * x.shape[0] * _columns(x, tile), overhead)
    border = size // 2 * 2
    rows = triton.cdiv(triton.cdiv(height, count) + border, unroll) * unroll - border  # no turn with less to do
    return dict(rows=rows, strips=triton.cdiv(height, rows))


def _columns(x: Tensor, tile: dict[str, int]) -> int:
    """Programs of one strip of one instance."""
    return triton.cdiv(x.shape[1], tile['BLOCK_C']) * triton.cdiv(x.shape[3], tile['LANES'] * tile['STEP'])


def _sizes(x: Tensor, tile: dict[str, int]) -> dict[str, int]:
    by_channel, by_column = (tile['UNIT'], 1) if is_channels_last(x) else (1, tile['UNIT'])
    return dict(C=x.shape[1] // by_channel, H=x.shape[2], W=x.shape[3] // by_column)


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 0.0, mean: Tensor | None = None,
    var: Tensor | None = None, other: Tensor | None = None, slope: Tensor | None = None, shift: Tensor | None = None,
    normalize: bool = False, backward: bool = False, relu: bool = False,
) -> Tensor:  # fmt: skip
    size, tile = weight.shape[-1], _tile(x, weight.shape[-1])
    cut = _cut(x, tile, size, size + 1)
    y = torch.empty_like(x)
    launch(
        _depthwise_kernel, x.shape[0] * cut['strips'] * _columns(x, tile), x, x, weight, bias, mean, var, other, slope,
        shift, y, **_sizes(x, tile), eps=eps, **cut, K=size, NORMALIZE=normalize, BACKWARD=backward,
        ADD=other is not None, RELU=relu, LAST=is_channels_last(x), **tile,
    )  # fmt: skip
    return y


def _sums(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """``(parts, C, k^2 + 2)``, see :func:`_sums_kernel`."""
    size, tile = weight.shape[-1], _tile(x, weight.shape[-1])
    # Sums within a warp, and partial sums that are written and read, cost as much as some rows.
    overhead = size + 8 + 2 * size * size / (tile['LANES'] * tile['STEP'])
    cut = _cut(x, tile, size, overhead)
    columns = cut['strips'] * _columns(x, tile)
    groups = pieces(x.shape[0], tile['num_warps'] * columns, overhead / (cut['rows'] + size))
    instances = triton.cdiv(x.shape[0], groups)
    groups = triton.cdiv(x.shape[0], instances)
    count = groups * cut['strips'] * triton.cdiv(x.shape[3], tile['LANES'] * tile['STEP'])
    parts = torch.empty(count, x.shape[1], size * size + 2, dtype=wide(x.dtype), device=x.device)
    launch(
        _sums_kernel, groups * columns, x, grad, x, weight, mean, parts, x.shape[0], **_sizes(x, tile), **cut,
        instances=instances, K=size, LAST=is_channels_last(x), **tile,
    )  # fmt: skip
    return parts


def _join(parts: Tensor, x: Tensor, weight: Tensor, var: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Gradients of weight and bias, slope and shift of the gradient of x."""
    channels, values = x.shape[1], weight.shape[-1] ** 2
    grad_weight, grad_bias = parts.new_empty(weight.shape), parts.new_empty(channels)
    slope, shift = parts.new_empty(2, channels)
    launch(
        _join_kernel, channels, x, parts, weight, var, grad_weight, grad_bias, slope, shift, channels, len(parts), eps,
        x.numel() // channels, SIZE=values, BLOCK=triton.next_power_of_2(values + 2),
        BLOCK_P=power_of_two(len(parts), 1, 4096 // triton.next_power_of_2(values + 2)),
    )  # fmt: skip
    return grad_weight, grad_bias, slope, shift


def normalize_and_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor | None = None, var: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, sums and gradients of parameters are accumulated in fp32 for halves.

    In compiled code, gradients are not differentiable themselves.
    """
    x, compiling = dense(x), is_compiling()
    if mean is not None:
        run = torch.ops.mmdet_norms.bnet_given if compiling else EagerBNETGiven.apply
        return run(x, weight, bias, mean, var, eps), mean, var
    run = torch.ops.mmdet_norms.bnet if compiling else EagerBNET.apply
    y, mean, var = run(x, weight, bias, eps)
    return y, mean.detach(), var.detach()


def inference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, inplace: bool
) -> Tensor:  # fmt: skip
    run = torch.ops.mmdet_norms.bnet_inference if is_compiling() else bnet_inference
    return run(x, weight, bias, residual, relu)


# What follows are the operators of torch (torch.ops.mmdet_norms), known to the compiler and to autograd.


def bnet(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution of the map, normalized with its own statistics; their mean and biased variance ``(C,)``.

    x ``(N, C, H, W)`` with two values a channel or more, weight ``(C, 1, k, k)``, k odd, bias ``(C,)``.
    """
    x = dense(x)
    mean, var = moments(x)
    y = _depthwise(x, weight.contiguous(), bias.contiguous(), eps=eps, mean=mean, var=var, normalize=True)
    return y, mean, var


def bnet_given(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """:func:`bnet` with the statistics ``mean`` and ``var`` ``(C,)``, which are constants: ``norm_eval``."""
    x, (weight, bias, mean, var) = dense(x), (t.contiguous() for t in (weight, bias, mean, var))
    return _depthwise(x, weight, bias, eps=eps, mean=mean, var=var, normalize=True)


def bnet_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, of_batch: bool, needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and, in fp32 or fp64, of weight and bias; those not needed are empty.

    ``of_batch``: mean and var are those of x itself, through which its gradient flows, too.
    """
    x, (weight, mean, var) = dense(x), (t.contiguous() for t in (weight, mean, var))
    grad = like(grad, x)
    grad_x, grad_weight, grad_bias, slope, shift = x.new_empty(0), *_nothing(x), None, None
    if needs_weight or (needs_x and of_batch):
        grad_weight, grad_bias, slope, shift = _join(_sums(grad, x, weight, mean), x, weight, var, eps)
    if needs_x:
        through = dict(other=x, mean=mean, slope=slope, shift=shift) if of_batch else {}
        grad_x = _depthwise(grad, weight, None, eps=eps, var=var, backward=True, **through)
    return (grad_x, grad_weight, grad_bias) if needs_weight else (grad_x, *_nothing(x))


def bnet_inference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu(depthwise(x) + bias + residual)`` in one pass: what is left of BNET, and the end of a residual block.

    residual: like x, or None; relu: False leaves it out. Accumulates in fp32, result in the dtype of x.
    """
    x = dense(x)
    other = None if residual is None else like(residual, x)
    return _depthwise(x, weight.contiguous(), bias.contiguous(), other=other, relu=relu)


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two, as operators must not return one tensor twice."""
    return x.new_empty(0, dtype=wide(x.dtype)), x.new_empty(0, dtype=wide(x.dtype))


bnet_op, bnet_given_op, bnet_backward_op, bnet_inference_op = (
    torch.library.custom_op(f'mmdet_norms::{function.__name__}', function, mutates_args=())
    for function in (bnet, bnet_given, bnet_backward, bnet_inference)
)


@bnet_op.register_fake
def _(x, weight, bias, eps):
    mean, var = (x.new_empty(x.shape[1], dtype=wide(x.dtype)) for _ in range(2))
    return torch.empty_like(dense(x)), mean, var


@bnet_given_op.register_fake
def _(x, weight, bias, mean, var, eps):
    return torch.empty_like(dense(x))


@bnet_backward_op.register_fake
def _(grad, x, weight, mean, var, eps, of_batch, needs_x, needs_weight):
    grad_x = torch.empty_like(dense(x)) if needs_x else x.new_empty(0)
    if not needs_weight:
        return grad_x, *_nothing(x)
    return grad_x, *(x.new_empty(shape, dtype=wide(x.dtype)) for shape in (weight.shape, x.shape[1]))


@bnet_inference_op.register_fake
def _(x, weight, bias, residual, relu):
    return torch.empty_like(dense(x))


def _save(ctx, inputs, output):
    x, weight, *_, eps = inputs
    ctx.of_batch, ctx.eps = len(inputs) == 4, eps
    mean, var = output[1:] if ctx.of_batch else inputs[3:5]
    ctx.save_for_backward(x, weight, mean, var)


def _backward_by(function):
    def backward(ctx, grad, *_):
        x, weight, mean, var = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if not is_compiling() and is_wanted(grad):
            statistics = () if ctx.of_batch else (mean, (var + ctx.eps).rsqrt())
            grad_x, grad_weight, grad_bias = bnet_gradients(grad, x, weight, ctx.eps, *statistics)
        else:
            grad_x, grad_weight, grad_bias = function(
                grad, x, weight, mean, var, ctx.eps, ctx.of_batch, needs_x, needs_weight or needs_bias
            )
        constants = (None,) * (1 if ctx.of_batch else 3)
        return (
            grad_x if needs_x else None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(weight.dtype) if needs_bias else None,
            *constants,
        )

    return backward


bnet_op.register_autograd(_backward_by(bnet_backward_op), setup_context=_save)
bnet_given_op.register_autograd(_backward_by(bnet_backward_op), setup_context=_save)


class EagerBNET(torch.autograd.Function):
    """``torch.ops.mmdet_norms.bnet`` in half the time that the operator takes besides its kernels."""

    forward = staticmethod(bnet)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward_by(bnet_backward))


class EagerBNETGiven(torch.autograd.Function):
    """The same of ``torch.ops.mmdet_norms.bnet_given``."""

    forward = staticmethod(bnet_given)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward_by(bnet_backward))
