"""Synchronized batch norm that also runs where nothing can be synchronized."""

import logging

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..compat.torch_internals import name_of_own_backend
from ..compat.torch_versions import is_compiling
from ._args import check_map, check_number, reject_unknown
from ._contract import Contract
from ._fold import fold_batch_norm
from ._loading import check_kind
from ._recompute import all_finite, copied_statistics, in_backward, statistics_kept, take_if_finite

_LOG = logging.getLogger(__name__)
_said: set[str] = set()


class SyncBN(_BatchNorm):
    r"""Batch norm over the union of all processes' batches.

    .. math::
        y_c = \gamma_c \frac{x_c - \mathrm E[x_c]}{\sqrt{\mathrm{Var}[x_c] + \epsilon}} + \beta_c

    with mean and biased variance over ``(N, H, W)`` of all processes together in training, the running ones in eval.

    Which statistics it uses in training:

    - one process, or no process group: those of the batch, i.e. ``nn.BatchNorm2d`` bit for bit, on any device. One
      log line per process says so;
    - several processes, GPU: those of all, by ``nn.SyncBatchNorm``, whose kernels are faster;
    - several processes, CPU or another device that ``nn.SyncBatchNorm`` refuses: the same computation here, on any
      backend (gloo). Exact for batches of different sizes.

    A process may have N = 0: it takes part in the exchange, returns an empty map and has zero gradients. If all have,
    the state stays as it is (on GPUs, torch's kernels still move the running statistics towards 0 then). Which
    collectives run never depends on values or sizes. Two values per channel in all processes together are the
    minimum; with one, the local norm raises torch's ``ValueError`` and the synchronized one returns ``bias``.

    Under activation checkpointing the recomputed forward does not update the running statistics a second time.

    Shapes: x and y ``(N, C, H, W)``; ``weight``, ``bias``, ``running_*`` ``(C,)``. State dict
    as ``nn.SyncBatchNorm``. A batch norm to ``norm_eval`` and conv-BN fusion, but no subclass of ``nn.SyncBatchNorm``,
    because ``DistributedDataParallel`` refuses every one of those on a CPU.

    Args:
        num_features: C.
        eps: added to the variance inside the root. Default 1e-5.
        momentum: weight of the newest batch in the running statistics; ``None`` averages over all. Default 0.1.
        affine: with weight and bias. Default True.
        track_running_stats: keep running statistics; without them eval uses the batch's. Default True.
        process_group: whose batches form the union. Default ``None``: all processes.

    Raises:
        ValueError: ``eps`` or ``momentum`` out of range; an input that is not ``(N, C, H, W)``; one value per channel
            in local training.
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
        check_number(type(self), 'eps', eps, 0)
        if momentum is not None:
            check_number(type(self), 'momentum', momentum, 0, 1)
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
        tracks = self.track_running_stats and x.numel() > 0
        factor = 0.0
        if tracks:
            factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked + 1)
        # Copies, which autograd remembers; the layer's own are written below.
        new = copied_statistics(self) if tracks else dict(running_mean=None, running_var=None)
        running = (new['running_mean'], new['running_var'])
        y = F.batch_norm(x, *running, self.weight, self.bias, True, factor, self.eps)
        if tracks and not in_backward():  # not before: a batch that is refused leaves no trace
            new['num_batches_tracked'] += 1
            take_if_finite(self, **new)
        return y

    def _synced_by_torch(self, x: Tensor) -> Tensor:
        # Peers exchange fp32 numbers; for an empty half input torch would send half ones, which hangs or corrupts.
        wide = x if x.numel() else x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if in_backward():
            with statistics_kept(self):
                return nn.SyncBatchNorm.forward(self, wide).to(x.dtype)
        before = copied_statistics(self)
        y = nn.SyncBatchNorm.forward(self, wide).to(x.dtype)
        if before:
            self._go_back_if_not_finite(before)
        return y

    @torch.no_grad()
    def _go_back_if_not_finite(self, before: dict[str, Tensor]) -> None:
        good = all_finite(self.running_mean, self.running_var)
        for name, old in before.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.where(good, buffer, old))

    def _synced(self, x: Tensor) -> Tensor:
        y, mean, var, count = _SyncedBatchNorm.apply(
            x, self.weight, self.bias, self.eps, self.process_group, self._world_size()
        )
        if self.track_running_stats and not in_backward():
            with torch.no_grad():
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
        return y


def _served_by_torch() -> tuple[str, ...]:
    """Device types on which ``nn.SyncBatchNorm`` synchronizes."""
    return ('cuda', 'hpu', 'xpu', name_of_own_backend())


def _say_once(line: str) -> None:
    if not is_compiling() and line not in _said:
        _said.add(line)
        _LOG.warning(line)


class _SyncedBatchNorm(torch.autograd.Function):
    """Batch norm over all processes with one all_gather forward and one all_reduce backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group, world_size):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        dims, shape = _dims_and_shape(x)
        wide, channels = x.to(dtype), x.shape[1]
        local = wide.new_zeros(2 * channels + 1)
        if x.numel():
            var, mean = torch.var_mean(wide, dims, correction=0)
            count = x.numel() // channels
            local = torch.cat([mean, var * count, mean.new_tensor([count])])
        gathered = [torch.empty_like(local) for _ in range(world_size)]
        dist.all_gather(gathered, local, group)
        means, squares, counts = torch.stack(gathered).split([channels, channels, 1], dim=1)
        # Deviations from the common mean, not E[x^2] - E[x]^2, which cancels for large means.
        count = counts.sum()
        mean = (means * counts).sum(0) / count.clamp(min=1)
        var = (squares + counts * (means - mean).square()).sum(0) / count.clamp(min=1)
        rstd = torch.rsqrt(var + eps)
        y = (wide - mean.view(shape)) * rstd.view(shape)
        if weight is not None:
            y = y * weight.to(dtype).view(shape) + bias.to(dtype).view(shape)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, rstd, count = ctx.saved_tensors
        dims, shape = _dims_and_shape(x)
        if torch.is_grad_enabled():  # somebody wants to differentiate this: as functions of every process's x
            mean, rstd = _statistics_again(x.to(mean.dtype), mean, rstd, count, ctx.group)
        wide = grad.to(mean.dtype)
        normalized = (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
        grad_bias, grad_weight = wide.sum(dims), (wide * normalized).sum(dims)
        grad_x = None
        if ctx.needs_input_grad[0]:
            total = _Sum.apply(torch.cat([grad_bias, grad_weight]), ctx.group)
            mean_grad, mean_projection = (total / count.clamp(min=1)).view(2, *shape)
            scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
            grad_x = (wide - mean_grad - normalized * mean_projection) * scale.view(shape)
            grad_x = grad_x.to(x.dtype)
        if weight is None:
            return grad_x, None, None, None, None, None
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None


class _Sum(torch.autograd.Function):
    """Sum over all processes, in place. As often differentiable: every process's gradient adds to every input's."""

    @staticmethod
    def forward(ctx, vector, group):
        ctx.group = group
        dist.all_reduce(vector, group=group)
        ctx.mark_dirty(vector)
        return vector

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad.clone(), ctx.group), None


def _statistics_again(x: Tensor, mean: Tensor, rstd: Tensor, count: Tensor, group) -> tuple[Tensor, Tensor]:
    """``mean`` and ``rstd``, whose values are known, as differentiable functions of the x of all processes."""
    dims, shape = _dims_and_shape(x)
    here, mean, rstd = x.detach(), mean.detach(), rstd.detach()
    centred, about = x - mean.view(shape), here - mean.view(shape)
    changes = torch.cat([(x - here).sum(dims), (centred.square() - about.square()).sum(dims)])
    shift, squares = (_Sum.apply(changes, group) / count.clamp(min=1)).chunk(2)
    return mean + shift, (rstd.pow(-2) + squares - shift.square()).rsqrt()


def _dims_and_shape(x: Tensor) -> tuple[list[int], tuple[int, ...]]:
    return [0, *range(2, x.dim())], (1, -1) + (1,) * (x.dim() - 2)
