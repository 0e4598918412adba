"""The two layouts of a map ``(N, C, H, W)`` that kernels know, and the shape of vectors beside it.

In contiguous and channels_last maps every value of an image has a simple address. Others are copied.
"""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """In that layout, and not in the contiguous one, which single pixels, channels and empty maps have as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def layout(x: Tensor) -> torch.memory_format:
    """channels_last, or contiguous for all else."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """``x``, copied unless it is in one of the layouts."""
    return x if is_channels_last(x) else x.contiguous()


def like(other: Tensor, x: Tensor) -> Tensor:
    """``other``, shaped as the dense ``x``, in its layout."""
    return other.contiguous(memory_format=layout(x))


def per_channel(vector: Tensor) -> Tensor:
    """``(C,)``, or ``(N, C)``, as ``(1, C, 1, 1)`` or ``(N, C, 1, 1)``: for broadcasting over a map."""
    return vector.view(-1, vector.shape[-1], 1, 1)
