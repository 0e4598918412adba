"""The operations of :mod:`.map_ops` as their formulas say, by torch's operators."""

import torch
from torch import Tensor

from .groups import by_group, groups_of, of_images
from .layouts import per_channel


def second_moment(x: Tensor, groups: int | None = None) -> Tensor:
    return _grouped(_wide(x), groups).square().mean(_over(groups))


def moments(x: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(_grouped(_wide(x), groups), _over(groups), correction=0)
    return mean, var


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centre, scale, shift = spread(x, centre, scale, shift)
    return ((_wide(x) - centre) * scale + shift).to(x.dtype)


def gradient_sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    groups, grad = groups_of(centre), _wide(grad)
    product = grad * (x - spread(x, centre)[0])
    return _grouped(grad, groups).sum(_over(groups)), _grouped(product, groups).sum(_over(groups))


def gradient(grad: Tensor, x: Tensor, gain: Tensor, centre: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    gain, centre, slope, shift = spread(x, gain, centre, slope, shift)
    return (grad * gain + (_wide(x) - centre) * slope + shift).to(x.dtype)


def spread(x: Tensor, *vectors: Tensor) -> list[Tensor]:
    """Vectors ``(C,)`` or ``(G, C)`` for broadcasting over the map ``x``."""
    return [per_channel(vector if vector.dim() == 1 else of_images(vector, x.shape[0])) for vector in vectors]


def _grouped(x: Tensor, groups: int | None) -> Tensor:
    return x if groups is None else by_group(x, groups)


def _over(groups: int | None) -> tuple[int, ...]:
    """All dimensions of a grouped map but groups and channels."""
    return (0, 2, 3) if groups is None else (1, 3, 4)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
