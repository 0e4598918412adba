"""Folding at inference: what a norm adds to the convolution in front of it, and what is left in its place.

A layer that folds has one of two methods, which :func:`mmdet_norms.fuse` calls:

* ``fold_into(conv)`` changes ``conv``, whose output the layer gets, and returns the module that remains of the layer,
  or None if nothing does (:class:`CannotFoldError`: nothing was changed);
* ``folded()`` returns the layer as inference needs it, without a convolution to fold into.

Both speak of eval mode and leave the layer itself as it is. All arithmetic is in float64.
"""

import torch
from torch import Tensor, nn


class CannotFoldError(ValueError):
    """Why a norm cannot be folded."""


class InferenceOnly:
    """Mixin for what remains of a norm: refuses training mode, and the state dict of the norm that it was."""

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError(
                'this model is fused for inference: its norms are part of its convolutions, so it cannot be put into '
                'training mode. Train the model that it was made from; mmdet_norms.fuse(model) returns a copy'
            )
        return super().train(mode)

    def _load_from_state_dict(self, state, prefix, *args):
        own = self.state_dict()
        foreign = [key for key in state if key.startswith(prefix) and key[len(prefix) :] not in own]
        if foreign:  # raised, not reported: mmengine's loader would only log it, and detect with garbage
            raise RuntimeError(
                f'this model is fused for inference, but the state dict has the norm {foreign[0]!r} of a model that is '
                'not: load it into the unfused model and call mmdet_norms.fuse(model) after that'
            )
        super()._load_from_state_dict(state, prefix, *args)


class Folded(InferenceOnly, nn.Identity):
    """Where a norm was that is part of its convolution now. The identity.

    Args:
        was: the norm's type, for people.
    """

    def __init__(self, was: str = ''):
        super().__init__()
        self.was = was

    def extra_repr(self) -> str:
        return self.was


def float64(tensor: Tensor) -> Tensor:
    """A float64 copy on the CPU, since not every device has that type."""
    return tensor.detach().to('cpu', torch.float64)


def batch_norm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift ``(C,)`` of a batch norm with running statistics; no weight or bias means 1 or 0."""
    scale = (float64(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * float64(weight)
    shift = -scale * float64(mean)
    return scale, shift if bias is None else shift + float64(bias)


@torch.no_grad()
def fold_affine(conv: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make ``conv(x)`` what ``scale * conv(x) + shift`` was, per output channel. ``conv`` gets a bias if it has none.

    Exact for any stride, dilation, groups and padding (it acts on outputs), transposed convolutions included.

    Args:
        conv: a convolution of torch, changed in place; dtype, device and memory format stay.
        scale, shift: ``(C_out,)``.
    """
    weight = float64(conv.weight)
    if conv.transposed:  # (C_in, C_out / groups, ...)
        by_group = weight.unflatten(0, (conv.groups, -1))
        factor = scale.view(conv.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (by_group * factor).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    conv.weight.copy_(weight)
    if conv.bias is None:
        conv.bias = nn.Parameter(shift.to(conv.weight), requires_grad=conv.weight.requires_grad)
    else:
        conv.bias.copy_(scale * float64(conv.bias) + shift)


def fold_batch_norm(conv: nn.Module, bn: nn.Module) -> None:
    """:func:`fold_affine` of a batch norm with running statistics.

    Raises:
        CannotFoldError: it has none, so eval uses those of the batch.
    """
    if getattr(bn, 'running_mean', None) is None:
        raise CannotFoldError('it has no running statistics')
    fold_affine(conv, *batch_norm_affine(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps))
