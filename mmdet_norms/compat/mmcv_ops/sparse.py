"""What RoIAlign and deformable convolution in PyTorch share: sums over a few of many rows."""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` as it is if fp64, else as fp32."""
    return x if x.dtype == torch.float64 else x.float()


def expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For groups of ``counts`` members: the group of each member and its number in the group."""
    group = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return group, torch.arange(len(group), device=counts.device) - first[group]


def sparse_matmul(row: Tensor, column: Tensor, weight: Tensor, rows: int, dense: Tensor) -> Tensor:
    """``out[i] = sum of weight * dense[column] where row == i``; ``row`` must be sorted."""
    counts = torch.bincount(row, minlength=rows)
    return F.embedding_bag(column, dense, counts.cumsum(0) - counts, mode='sum', per_sample_weights=weight)
