"""What the kernels share: sizes of the work of one program, and how they are launched.

Maps ``(N, C, H, W)`` are contiguous or channels_last (:mod:`..layouts`), vectors ``(C,)`` or ``(N, C)``. Sums are
accumulated in fp32 (fp64 for fp64 maps). A sum over a map is made of partial sums that a second kernel adds in a fixed
order, instead of atomics: results are the same in every run.

Sizes are functions of the shape alone, not of timings of candidates (``triton.autotune``): detectors meet a new image
size in almost every batch, each of which would be timed again, and other sizes of the partial sums are other results.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layouts import is_channels_last
from ..pointers import check
from . import _DTYPES, _LARGEST_INSTANCE

_TAIL = 1024  # warps that a large GPU could run in place of those it waits for in the end, 8 a multiprocessor
_BYTES = 4096  # of a tile where each value is used once: 32 a thread
_PADDING = 1.15  # times as many values as there are may be in the tiles of a map


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of ``dtype`` are accumulated in."""
    return torch.promote_types(dtype, torch.float32)


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def launch(kernel: Callable, programs: int, x: Tensor, *args, per_instance: bool = False, **sizes) -> None:
    """Run ``kernel`` on the device of the map ``x``, which need not be the current one: the only way to a kernel.

    Args:
        per_instance: its vectors are ``(N, C)``; else ``(C,)``.

    Raises:
        ValueError: a tensor is not what the kernel takes it for, or places in it are no 32 bit numbers.
    """
    named = {**dict(zip(kernel.arg_names, args)), **sizes}
    owner = f'the Triton kernel {kernel.__name__}'
    tensors = {'x': x} | {name: value for name, value in named.items() if isinstance(value, Tensor)}
    check(owner, x, tensors, _DTYPES, per_instance)
    largest = max(programs, math.prod(x.shape[:2]), *(value for value in named.values() if isinstance(value, int)))
    if not 0 < x.numel() < _LARGEST_INSTANCE * x.shape[0] or largest >= 2**31:
        raise ValueError(
            f'{owner} got a map of shape {tuple(x.shape)}; places within an instance must be 32 bit numbers'
        )
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[(programs,)](*args, **sizes, ACC=accumulator(x), enable_fp_fusion=True)


def power_of_two(value: int, least: int, most: int) -> int:
    """The next power of two from ``value`` on, within limits."""
    return max(least, min(most, triton.next_power_of_2(value)))


def least_padding(size: int, tiles: list[int]) -> int:
    """The largest of ``tiles`` of which few values are outside of ``size``."""
    padded = {tile: triton.cdiv(size, tile) * tile for tile in tiles}
    return max(tile for tile in tiles if padded[tile] <= _PADDING * min(padded.values()))


def pointwise_tile(x: Tensor) -> dict[str, int]:
    """Positions and channels of a tile; the ones that are neighbours in memory first."""
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    size = _BYTES // max(2, x.element_size())
    if is_channels_last(x):
        block_c = power_of_two(channels, 1, 64)
        return dict(BLOCK_S=power_of_two(positions, 1, size // block_c), BLOCK_C=block_c)
    least = power_of_two(positions, 1, 32)
    block_s = least_padding(positions, [least << i for i in range(8) if least << i <= size])
    return dict(BLOCK_S=block_s, BLOCK_C=power_of_two(channels, 1, size // block_s))


def pieces(count: int, others: int, overhead: float) -> int:
    """Into how many pieces to cut ``count``, if there are ``others`` warps for each of them.

    A piece costs ``overhead`` besides its share of ``count``. Few pieces leave much of a GPU idle until the last warp
    is done, many do much besides: ``(count / pieces + overhead) * (others * pieces + _TAIL)`` is to be least.
    """
    return max(1, min(count, round(math.sqrt(count * _TAIL / (overhead * others)))))
