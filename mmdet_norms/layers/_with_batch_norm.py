"""Norms around a batch norm: its statistics stand in the state dict as those of a plain one."""

from itertools import takewhile

import torch
from torch import Tensor, nn

from ..compat.torch_internals import on_state_dict
from ._loading import check_kind
from ._replay import in_backward
from ._running_statistics import running_statistics, take_if_finite


class WithBatchNorm(nn.Module):
    """Base of norms that keep running statistics in a child ``bn`` and save them as a plain batch norm would.

    The child is what ``norm_eval``, SyncBN conversion and precise-BN tools find. It says whether batch statistics
    (``bn.training``) or the running ones are to be used.

    Args:
        num_features: C.
        bn: the child; None for a norm without running statistics, which then has no ``bn``.
    """

    def __init__(self, num_features: int, bn: nn.BatchNorm2d | None):
        super().__init__()
        self.num_features = num_features
        if bn is not None:
            self.bn = bn
        on_state_dict(self, _publish_keys)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: int | None = None, bn=None) -> None:
        """Move the running statistics towards those of a batch, unless the forward is repeated and was counted.

        A batch with an inf or nan changes nothing and is not counted: its step will be skipped.

        Args:
            mean, var: ``(C,)``; of groups of images ``(G, C)``, of which the average counts.
            count: over how many values ``var`` is biased: it moves unbiased, and not at all for a single value. None:
                it moves as it is.
            bn: has the statistics; by default the child.
        """
        if in_backward():
            return
        bn = bn or self.bn
        mean, var = (rows.mean(0) if rows.dim() > 1 else rows for rows in (mean, var))
        if count is not None:
            var = var * (count / (count - 1)) if count > 1 else None
        tracked = bn.num_batches_tracked + 1
        factor = 1 / tracked.to(mean.dtype) if bn.momentum is None else bn.momentum
        new = dict(num_batches_tracked=tracked, running_mean=bn.running_mean + (mean - bn.running_mean) * factor)
        if var is not None:
            new['running_var'] = bn.running_var + (var - bn.running_var) * factor
        take_if_finite(bn, **new)

    def _running(self) -> tuple[Tensor, Tensor]:
        """The running statistics, for a forward that normalizes with them; when it is repeated, those of then."""
        return running_statistics(self.bn) if self.bn.training else (self.bn.running_mean, self.bn.running_var)

    def _take_over(self, state: dict[str, Tensor], prefix: str, errors: list[str]) -> None:
        """Turn what ``state`` has under ``prefix`` of a norm in ``contract.loads`` into a state of this one."""

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        check_kind(self, state, prefix)
        self._take_over(state, prefix, errors)
        for name, value in _statistics(self).items():
            if prefix + name in state:
                state[f'{prefix}bn.{name}'] = state.pop(prefix + name)
            elif f'{prefix}bn.{name}' not in state:
                # Report the key as users know it; the child then finds its own value.
                state[f'{prefix}bn.{name}'] = value
                if strict and name != 'num_batches_tracked':
                    missing.append(prefix + name)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


def _publish_keys(module: WithBatchNorm, state: dict, prefix: str, metadata) -> None:
    """Save the child's values under the names of a plain batch norm. Also called by mmengine's own saving code."""
    names = {f'{prefix}bn.{name}': prefix + name for name in _statistics(module)}
    # In place, so to speak: the published keys keep their order. The module's own are the last ones of a state dict.
    own = list(takewhile(lambda key: key.startswith(prefix), reversed(state))) if names else []
    for key in reversed(own):
        state[names.get(key, key)] = state.pop(key)


def _statistics(module: WithBatchNorm) -> dict[str, Tensor]:
    """What the child saves, by its own names."""
    return module.bn.state_dict() if hasattr(module, 'bn') else {}
