"""Synchronized batch norm that also runs where nothing can be synchronized."""

import logging

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..compat.torch_internals import name_of_own_backend
from ..compat.torch_versions import is_compiling
from ._args import check_batch_norm, check_map, reject_unknown
from ._contract import Contract
from ._fold import fold_batch_norm
from ._loading import check_kind
from ._numerics import statistics_dtype
from ._running_statistics import copied_statistics, go_back_if_not_finite, in_backward, statistics_kept, take_if_finite
from ._sync import batch_norm_of_all

_LOG = logging.getLogger(__name__)
_said: set[str] = set()


class SyncBN(_BatchNorm):
    r"""Batch norm over the union of all processes' batches.

    .. math::
        y_c = \gamma_c \frac{x_c - \mathrm E[x_c]}{\sqrt{\mathrm{Var}[x_c] + \epsilon}} + \beta_c

    with mean and biased variance over ``(N, H, W)`` of all processes together in training, the running ones in eval.
    With one process, or no process group, it is ``nn.BatchNorm2d`` bit for bit, and one log line says so. With several,
    ``nn.SyncBatchNorm`` computes it on the devices that it serves, such as GPUs, and :mod:`._sync` on all others.

    Shapes: x and y ``(N, C, H, W)``; ``weight``, ``bias``, ``running_mean``, ``running_var`` ``(C,)``. Processes may
    have maps of different sizes, and N = 0. State dict as ``nn.SyncBatchNorm``'s.

    A subclass of what ``norm_eval`` and conv-BN fusion look for, but not of ``nn.SyncBatchNorm``:
    ``DistributedDataParallel`` refuses that on a CPU.

    Args:
        num_features: C.
        eps: added to the variance inside the root. Default 1e-5.
        momentum: weight of the newest batch in the running statistics; ``None`` averages over all. Default 0.1.
        affine: with weight and bias. Default True.
        track_running_stats: keep running statistics; without them eval uses the batch's. Default True.
        process_group: whose batches form the union. Default ``None``: all processes.

    Raises:
        ValueError: ``eps`` or ``momentum`` out of range; not ``(N, C, H, W)``; one value per channel in one process.
        TypeError: an unknown key.

    Source: Peng et al., "MegDet", arXiv:1711.07240, section 3.3.
    """

    contract = Contract('SyncBN', loads=('BN',), as_in_bn=('eps', 'momentum'), counters=('num_batches_tracked',))

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group=None,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        check_batch_norm(type(self), eps, momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        if not self.training:
            # As torch does it, but without looking at x, so that symbolic tracing passes through.
            running = (self.running_mean, self.running_var)
            return F.batch_norm(x, *running, self.weight, self.bias, running[0] is None, 0.0, self.eps)
        self._check_input_dim(x)
        if self._world_size() <= 1:
            _say_once('SyncBN: training is not distributed, so it acts as BN on the batch of this process')
            return self._local(x)
        if x.device.type in _served_by_torch():
            return self._synced_by_torch(x)
        return self._synced(x)

    # What torch's forward calls on itself.
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def fold_into(self, conv: nn.Module) -> None:
        """See :mod:`._fold`: nothing of the layer remains."""
        fold_batch_norm(conv, self)

    def _load_from_state_dict(self, state, prefix, *args):
        check_kind(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args)

    def _world_size(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    def _local(self, x: Tensor) -> Tensor:
        if not (self.track_running_stats and x.numel()):
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked + 1)
        # Copies, which autograd remembers; the layer's own are written below.
        new = copied_statistics(self)
        y = F.batch_norm(x, new['running_mean'], new['running_var'], self.weight, self.bias, True, factor, self.eps)
        if not in_backward():  # not before: a batch that is refused leaves no trace
            new['num_batches_tracked'] += 1
            take_if_finite(self, **new)
        return y

    def _synced_by_torch(self, x: Tensor) -> Tensor:
        # Peers exchange fp32 numbers; for an empty half input torch would send half ones, which hangs or corrupts.
        wide = x if x.numel() else x.to(statistics_dtype(x))
        if in_backward():
            with statistics_kept(self):
                return nn.SyncBatchNorm.forward(self, wide).to(x.dtype)
        before = copied_statistics(self)
        y = nn.SyncBatchNorm.forward(self, wide).to(x.dtype)
        go_back_if_not_finite(self, before)
        return y

    def _synced(self, x: Tensor) -> Tensor:
        y, *moments = batch_norm_of_all(x, self.weight, self.bias, self.eps, self.process_group)
        if self.track_running_stats and not in_backward():
            self._update(*moments)
        return y

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of ``count`` values, which may be none."""
        tracked = self.num_batches_tracked + (count > 0)
        batches = tracked.clamp(min=1).to(mean.dtype)
        factor = torch.full_like(batches, self.momentum) if self.momentum is not None else 1 / batches
        unbiased = var * count / (count - 1).clamp(min=1)
        take_if_finite(
            self,
            running_mean=self.running_mean + (mean - self.running_mean) * factor * (count > 0),
            running_var=self.running_var + (unbiased - self.running_var) * factor * (count > 1),
            num_batches_tracked=tracked,
        )


def _served_by_torch() -> tuple[str, ...]:
    """Device types on which ``nn.SyncBatchNorm`` synchronizes."""
    return ('cuda', 'hpu', 'xpu', name_of_own_backend())


def _say_once(line: str) -> None:
    if not is_compiling() and line not in _said:
        _said.add(line)
        _LOG.warning(line)
