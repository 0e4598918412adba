"""What the kernels share: layouts, sizes of the work of one program, and how they are launched.

A map ``(N, C, H, W)`` is contiguous or channels_last, the two layouts in which every value of an instance has a simple
address; others are copied. Sums are accumulated in fp32 (fp64 for fp64 maps). A sum over a map is made of partial sums
that a second kernel adds in a fixed order, instead of atomics: results are the same in every run.

Sizes are functions of the shape alone, not of timings of candidates (``triton.autotune``): detectors meet a new image
size in almost every batch, each of which would be timed again, and other sizes of the partial sums are other results.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 4096  # enough to fill a large GPU several times over
_TILE = 1024  # values of a tile where each is used once


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of ``dtype`` are accumulated in."""
    return torch.promote_types(dtype, torch.float32)


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    return x if is_channels_last(x) else x.contiguous()


def like(grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` in the layout of the dense ``x``."""
    return grad.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def launch(kernel: Callable, programs: int, x: Tensor, *args, **sizes) -> None:
    """Run ``kernel`` on the device of ``x``, which need not be the current one."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[(programs,)](*args, **sizes, ACC=accumulator(x), enable_fp_fusion=True)


def power_of_two(value: int, least: int, most: int) -> int:
    """The next power of two from ``value`` on, within limits."""
    return max(least, min(most, triton.next_power_of_2(value)))


def pointwise_tile(x: Tensor) -> dict[str, int]:
    """Positions and channels of a tile; the ones that are neighbours in memory first."""
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    if is_channels_last(x):
        block_c = power_of_two(channels, 1, 64)
        return dict(BLOCK_S=power_of_two(positions, 1, _TILE // block_c), BLOCK_C=block_c)
    block_s = power_of_two(positions, 1, _TILE)
    return dict(BLOCK_S=block_s, BLOCK_C=power_of_two(channels, 1, _TILE // block_s))


def pieces(count: int, others: int, least: int) -> int:
    """Into how many pieces of ``least`` or more to cut ``count``, if there are ``others`` programs for each piece."""
    return max(1, min(-(-_PROGRAMS // others), count // least))
