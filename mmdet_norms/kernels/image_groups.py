"""An affine step whose parameters depend on the statistics of each image or group of images, in few passes.

That of AN, and of norms with a simulated normalization batch.
"""

import torch
from torch import Tensor

from . import choose, map_formula
from .double_backward import is_wanted


class ImageGroups:
    """The groups of images in a map: their moments, and an affine step of each that may be made of the moments.

    Such steps are AN, and also batch and group norm, since ``E[x] = E[mean]`` and
    ``E[(x - E[x])^2] = E[var + (mean - E[x])^2]`` over images or channels.

    One pass for the moments, one for y; backward one for the sums over the gradient, one or two for that of x. Saves
    x and vectors. Gradients flow through everything, the moments included. Where that is not supported it is computed
    by its formula.

    Args:
        x: ``(N, C, H, W)``, not empty, any floating dtype.
        groups: G, of ``N / G`` consecutive images each; None: every image by itself.

    Attributes:
        mean, var: mean and biased variance of the groups ``(G, C)``, in fp32, or fp64 for fp64 maps.
    """

    def __init__(self, x: Tensor, groups: int | None = None):
        groups = x.shape[0] if groups is None else groups  # not len(x), which fixes the batch of an export
        self._x, self._supported = x, is_supported(x)
        if self._supported:
            self._computed_by = choose.map_operations(x)
            self._stand_in, self._gain, self.mean, self.var = _Moments.apply(x, groups, self._computed_by)
        else:
            self.mean, self.var = map_formula.moments(x, groups)

    def affine(self, scale: Tensor, origin: Tensor, shift: Tensor) -> Tensor:
        """``y = scale * (x - origin) + shift``, once. Scale and shift are ``(G, C)``, origin may be ``(C,)``."""
        if not self._supported:
            return map_formula.affine(self._x, origin, scale, shift)
        # The constant centre keeps the digits of the sums in backward where the mean is large.
        centre = self.mean.detach()
        shift = shift + scale * (centre - origin)
        return _Affine.apply(self._x, self._stand_in, self._gain, centre, scale, shift, self._computed_by)


def is_supported(x: Tensor) -> bool:
    """Is this a case for the kernels: eager, on a CPU or CUDA, not empty, a tensor as it is?

    Compiled code gets the plain formulas, which the compiler fuses; exported graphs get standard operators.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type in ('cpu', 'cuda')
        and x.dim() == 4
        and x.numel() > 0
        and choose.is_eager()
    )


# The gradient of x has a part through y and one through the moments, which is known later. Computed each by its own
# function they would be two maps and a third pass to add them. So _Affine does not compute its part: it sends
# the gradient of y on as it came, as gradient of a stand-in for x, and its factor as gradient of ``gain``. Both only
# exist for that, and are seen by nobody else.


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, computed_by):
        mean, var = computed_by.moments(x, groups)
        ctx.save_for_backward(x, mean)
        ctx.computed_by = computed_by
        return x.new_zeros(()).expand(x.shape), torch.empty_like(mean), mean, var

    @staticmethod
    def backward(ctx, grad, gain, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        count = x.numel() // mean.numel()
        computed_by = map_formula if is_wanted(grad) else ctx.computed_by
        return computed_by.gradient(grad, x, gain, mean, grad_var * (2 / count), grad_mean / count), None, None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stand_in, gain, centre, scale, shift, computed_by):
        ctx.save_for_backward(x, centre, scale)
        ctx.computed_by = computed_by
        return computed_by.affine(x, centre, scale, shift)

    @staticmethod
    def backward(ctx, grad):
        x, centre, scale = ctx.saved_tensors
        computed_by = map_formula if is_wanted(grad) else ctx.computed_by
        total, centred = computed_by.gradient_sums(grad, x, centre)
        return None, grad, scale, None, centred, total, None
