"""What CBN remembers of its last iterations: statistics, and how they move with the weights of the convolution."""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat.torch_internals import Convolution
from ..kernels import map_ops
from ._numerics import all_finite, is_channels_last, statistics_dtype

HISTORY_KEYS = ('history_patch', 'history_grad', 'history_moments', 'history_index')
"""In a state dict, after the layer's prefix: the tensors of :meth:`History.tensors`."""


class History:
    """Ring of the last iterations; one row of each tensor per iteration, ``length`` rows up to ``next`` are filled.

    Old weights are not kept: ``<P, W - W_t> = <P, W> - <P, W_t>``, so a number per channel stands in for ``W_t``.

    Args:
        patch: ``(K, groups, F)`` mean input patch P, the gradient of the mean: the same for all channels of a group.
        grad: ``(K, C, F)`` gradient G of the variance by the weight.
        moments: ``(K, 4, C)`` mean, variance, ``<P, W_t>``, ``<G, W_t>``.

    K rows, C channels of the output, F values of one filter.
    """

    def __init__(self, patch: Tensor, grad: Tensor, moments: Tensor, next_row: int = 0, length: int = 0):
        self.patch, self.grad, self.moments = patch, grad, moments
        self.next, self.length = next_row, length

    @classmethod
    def empty(cls, rows: int, weight: Tensor, groups: int) -> 'History':
        """For a weight ``(C, F)``."""
        channels, size = weight.shape
        shapes = (rows, groups, size), (rows, channels, size), (rows, 4, channels)
        return cls(*(weight.new_zeros(shape) for shape in shapes))

    # ------------------------------------------------------------------------------------------------ the method

    def combine(self, mean: Tensor, var: Tensor, weight: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of entries over this batch and the remembered ones under ``weight``."""
        # Products by hand: a matmul would be at the mercy of TF32 settings.
        by_group = weight.unflatten(0, (self.patch.shape[1], -1))
        patch_now = (self.patch.unsqueeze(2) * by_group).sum(-1).flatten(1)
        grad_now = (self.grad * weight).sum(-1)
        old_mean, old_var, patch_then, grad_then = self.moments.unbind(1)
        mean_move = rho * (patch_now - patch_then)
        moved_mean = old_mean + mean_move
        moved_var = old_var + rho * (grad_now - grad_then) - mean_move.square()
        # Newest first wherever the ring stands, so that sums round alike.
        newest = self._newest(self.length)
        moved_mean, moved_var = (torch.stack([t[row] for row in newest]) for t in (moved_mean, moved_var))

        valid = (moved_var >= 0) & (moved_var < float('inf'))
        entries = 1 + valid.sum(0, dtype=mean.dtype)
        offset = torch.where(valid, moved_mean - mean, 0)
        shift = offset.sum(0) / entries
        within = (var + torch.where(valid, moved_var, 0).sum(0)) / entries
        between = offset.square().sum(0) / entries - shift.square()
        return mean + shift, (within + between).clamp_(min=0), entries

    def push(self, conv: Convolution, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, keep: int) -> None:
        """Remember this iteration, of which ``conv`` made ``x``; ``keep`` rows count from now on."""
        patch = mean_patch(conv, x).view(self.patch.shape[1:])
        grad = variance_gradient(conv, x, mean, var)
        by_group = weight.unflatten(0, (len(patch), -1))
        moments = torch.stack((mean, var, (patch.unsqueeze(1) * by_group).sum(-1).flatten(), (grad * weight).sum(-1)))
        # An iteration with an inf or nan becomes a row that no later one counts: its variance stays negative.
        good = all_finite(patch, grad, moments)
        self.patch[self.next].copy_(torch.where(good, patch, 0))
        self.grad[self.next].copy_(torch.where(good, grad, 0))
        self.moments[self.next].copy_(torch.where(good, moments, -1))
        self.next = (self.next + 1) % len(self.grad)
        self.length = min(self.length + 1, keep)

    def _newest(self, rows: int) -> list[int]:
        """Where the last ``rows`` iterations lie, from the newest on."""
        return [(self.next - 1 - i) % len(self.grad) for i in range(rows)]

    # ------------------------------------------------------------------------------------------------ state

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.patch, self.grad, self.moments

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self._rows(), torch.tensor([self.next, self.length])

    @classmethod
    def load(cls, patch, grad, moments, index, rows: int, device) -> 'History':
        """From copies of :meth:`tensors`. Of a history with another number of rows, the newest are kept."""
        saved = cls(*(t.detach().to(device, copy=True) for t in (patch, grad, moments)), *index.tolist())
        if len(saved.grad) == rows:
            return saved
        kept = saved._newest(min(saved.length, rows))[::-1]
        grown = [t.new_zeros(rows, *t.shape[1:]) for t in saved._rows()]
        for new, old in zip(grown, saved._rows()):
            new[: len(kept)] = old[kept]
        return cls(*grown, len(kept) % max(rows, 1), len(kept))

    def apply(self, fn) -> None:
        """``module.to(...)``: follow the device and float64, but never go below fp32."""
        moved = [(old, fn(old)) for old in self._rows()]
        kept = (torch.float32, torch.float64)
        self.patch, self.grad, self.moments = (t if t.dtype in kept else old.to(t.device) for old, t in moved)

    def to(self, like: Tensor) -> None:
        self.patch, self.grad, self.moments = (t.to(like) for t in self._rows())

    def check(self, rows: int, weight: Tensor, groups: int, owner: str) -> None:
        """Raise a RuntimeError unless it is of a weight ``(C, F)`` of this shape."""
        expected = (rows, *weight.shape), (rows, groups, weight.shape[1])
        if (tuple(self.grad.shape), tuple(self.patch.shape)) != expected:
            raise RuntimeError(
                f'{owner} remembers a convolution of other shape: its history is {tuple(self.grad.shape)} and '
                f'{tuple(self.patch.shape)}, this convolution needs {expected[0]} and {expected[1]}. A CBN belongs to '
                'one convolution; load the checkpoint into the model it was saved from, or drop its history'
            )


def drop_history(state: dict) -> dict:
    """``state`` without the counters and histories of CBN layers: the published keys, for inference.

    Args:
        state: a model's state dict. Not changed.
    """
    marks = '|'.join(('iter_count', HISTORY_KEYS[-1]))
    owners = {found[1] for key in state if (found := re.fullmatch(rf'(|.*\.)({marks})', key))}
    # 'iter_count' alone could be anybody's
    dropped = {
        owner + name for owner in owners if owner + 'running_var' in state for name in ('iter_count', *HISTORY_KEYS)
    }
    kept = type(state)((key, value) for key, value in state.items() if key not in dropped)
    if hasattr(state, '_metadata'):
        kept._metadata = state._metadata
    return kept


def mean_patch(conv: Convolution, x: Tensor) -> Tensor:
    """Mean over all positions of the output x of the input patch there, ``(C_in, kh, kw)``; padding counts as zeros."""
    # Positions that one place of the kernel meets form a strided window of the padded map, so sums of windows do: over
    # the batch first.
    pad_h, pad_w = conv.padding
    if is_channels_last(conv.input):  # of which sum(0) takes 10 times as long
        total = conv.input.permute(0, 2, 3, 1).sum(0, dtype=statistics_dtype(x)).permute(2, 0, 1)
    else:
        total = conv.input.sum(0, dtype=statistics_dtype(x))
    total = F.pad(total, (pad_w, pad_w, pad_h, pad_h))
    for axis in (1, 0):  # columns, then rows: each sum goes and the places of the kernel come last
        size, stride, dilation = conv.weight.shape[2 + axis], conv.stride[axis], conv.dilation[axis]
        span = (x.shape[2 + axis] - 1) * stride + 1
        windows = total.unfold(1 + axis, span, dilation).narrow(1 + axis, 0, size)
        total = windows[..., ::stride].sum(-1)
    return total / (len(x) * x.shape[2] * x.shape[3])


def variance_gradient(conv: Convolution, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Gradient of each channel's biased variance by its filter, ``(C, F)``: the weight gradient under 2 (x - mean) / M.

    The upstream gradient is scaled to about M^-3/4, where neither it nor the result leaves fp16's range.
    """
    positions = x.numel() // x.shape[1]
    std = (var + 1e-12).sqrt()
    upstream = map_ops.affine(x, mean, positions**-0.75 / std, torch.zeros_like(mean))
    grad = torch.nn.grad.conv2d_weight(conv.input, conv.weight.shape, upstream, *conv[2:])
    return grad.to(mean.dtype).flatten(1) * (2 * positions**-0.25 * std).unsqueeze(1)
