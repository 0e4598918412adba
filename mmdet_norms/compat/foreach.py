"""Many tensors in one call of torch."""

from collections.abc import Iterable

import torch
from torch import Tensor


def any_nonfinite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether a number among all of these is NaN or infinite, as a tensor: nothing waits for the device."""
    largest = []
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        tensor = tensor.detach()
        if tensor.is_sparse:
            tensor = tensor.coalesce().values()
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault(tensor.device, []).append(tensor)
    for device, group in groups.items():
        if device.type == 'cpu':  # where a norm of this kind takes ten times as long
            extremes = [extreme for tensor in group for extreme in tensor.aminmax()]
        else:
            extremes = torch._foreach_norm(group, float('inf'))
        largest.append(torch.stack([extreme.float() for extreme in extremes]).abs().max())
    if not largest:
        return torch.zeros((), dtype=torch.bool)
    bad = [~value.isfinite() for value in largest]
    return torch.stack([value.to(bad[0].device) for value in bad]).any()


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """``target.copy_(source)`` for each pair."""
    if targets:
        torch._foreach_copy_(targets, sources)
