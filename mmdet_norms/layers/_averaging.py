"""Running statistics that are recomputed as an average over batches, in norms that are no batch norms."""

import torch
from torch import Tensor, nn

from ._numerics import all_finite


class AveragesOnRequest(nn.Module):
    """Base of norms with running statistics of their own, which tools for batch norms recompute all the same.

    Such a tool (``torch.optim.swa_utils.update_bn``) looks for batch norms, sets their momentum to None, runs batches
    in training mode and sets it back. It finds the child ``statistics``, which holds no values; while the momentum of
    that is None, training forwards average and leave everything else (counters, windows, history) alone.

    Args:
        num_features: C.
        eps, momentum: for people who print the child.
    """

    def __init__(self, num_features: int, eps: float, momentum: float):
        super().__init__()
        self.statistics = nn.BatchNorm2d(num_features, eps, momentum, affine=False, track_running_stats=False)
        self._averaged: Tensor | None = None  # number of batches so far

    def train(self, mode: bool = True):
        self._averaged = None  # such tools begin by this
        return super().train(mode)

    @property
    def averages(self) -> bool:
        """Whether the running statistics are being recomputed."""
        return self.statistics.momentum is None

    @torch.no_grad()
    def _average(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Take one batch into the average. Pairs of running and batch statistic; with an inf or nan it is left out."""
        if self._averaged is None:
            self._averaged = pairs[0][0].new_zeros((), dtype=torch.long)
        good = all_finite(*(now.to(old.dtype) for old, now in pairs))
        count = self._averaged + 1
        for old, now in pairs:
            moved = torch.where(count == 1, now, old + (now - old) / count).to(old.dtype)
            old.copy_(torch.where(good, moved, old))
        self._averaged = self._averaged + good
