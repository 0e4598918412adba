"""In which precision, layout and shape statistics are computed: the same for every norm."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..compat.torch_versions import autocast_is_on
from ..kernels.groups import pooled as pooled
from ..kernels.layouts import is_channels_last as is_channels_last
from ..kernels.layouts import per_channel as per_channel


def statistics_dtype(x: Tensor) -> torch.dtype:
    """fp32 for fp16 and bf16 maps, else the map's own: what statistics, and what is made of them, are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Inside, operators on the device of ``x`` keep the dtypes they are given; autocast would lower them.

    Entered only where it is on, so that exported graphs do not carry it; symbolic tracing has no device to ask.
    """
    if not isinstance(x, Tensor) or not autocast_is_on(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def all_finite(*statistics: Tensor) -> Tensor:
    """Whether all values are finite, as a tensor ``()`` on their device: nobody waits for it."""
    return sum(values.sum() for values in statistics).isfinite()


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(N, C)`` over ``(H, W)`` of a map ``(N, C, H, W)``, which may be empty."""
    if x.numel():
        var, mean = torch.var_mean(x, (2, 3), correction=0)
        return mean, var
    mean = x.sum((2, 3))  # empty, too; var_mean would warn
    return mean, mean
