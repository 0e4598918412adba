"""Operations on a map that training a norm consists of: statistics, an affine step, and what their gradients need.

Shapes:

* maps (x, grad): ``(N, C, H, W)``, any floating dtype, not empty; a resulting map has dtype and layout of x.
* vectors (everything else): ``(C,)``, one value a channel; or ``(G, C)``, one value a channel of each of G groups of
  ``N / G`` consecutive images, so that ``G = N`` is one of each image. They are fp32, or fp64 for fp64 maps.

``groups`` asks for vectors ``(G, C)``; None for ``(C,)``. Nothing here is known to autograd: layers call these in the
forward and backward of their functions. :mod:`.choose` says who computes them.
"""

from torch import Tensor

from .choose import map_operations


def second_moment(x: Tensor, groups: int | None = None) -> Tensor:
    """``E[x^2]``."""
    return map_operations(x).second_moment(x, groups)


def moments(x: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """``E[x]`` and ``E[(x - E[x])^2]``. From deviations: a mean that is large against them is fine."""
    return map_operations(x).moments(x, groups)


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * (x - centre) + shift``."""
    return map_operations(x).affine(x, centre, scale, shift)


def gradient_sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """``sum grad`` and ``sum grad * (x - centre)``, shaped as centre: gradients by the shift and scale of an affine."""
    return map_operations(x).gradient_sums(grad, x, centre)


def gradient(grad: Tensor, x: Tensor, gain: Tensor, centre: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """``gain * grad + slope * (x - centre) + shift``: of this form is the gradient by a norm's input."""
    return map_operations(x).gradient(grad, x, gain, centre, slope, shift)
