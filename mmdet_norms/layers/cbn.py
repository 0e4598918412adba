"""CBN: batch norm over the last few iterations, corrected for the weight updates in between.

The method in 70 lines: ``reference/cbn.py``; here exact, fast and resumable. How it goes with checkpointing, DDP, EMA,
accumulation and compilation: docs/norms.md.
"""

import re
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.torch_internals import Convolution, disable_dynamo
from ..kernels import map_ops
from ._args import ConfigError, check_at_least, check_count, check_map, check_number, is_count, reject_unknown
from ._averaging import AveragesOnRequest
from ._cbn_history import HISTORY_KEYS, History, drop_history
from ._cbn_normalize import Normalize, Used
from ._contract import Contract
from ._conv_in_front import BehindConv
from ._conv_in_front import link_convs as link_convs
from ._fold import batch_norm_affine, float64, fold_affine
from ._loading import check_kind
from ._numerics import no_autocast, statistics_dtype
from ._replay import Calls, in_backward
from ._running_statistics import take_if_finite


class CBN(BehindConv, AveragesOnRequest):
    r"""Cross-iteration batch norm: each iteration normalizes with the statistics of itself and of a few before it.

    For ``x = conv(z; W)`` and each remembered iteration t, with mean :math:`m_t` and biased variance :math:`v_t` of its
    batch under the weights :math:`W_t` of its time, per output channel, by first-order Taylor expansion

    .. math::
        \hat m_t &= m_t + \rho \langle \partial m_t, W - W_t \rangle, \qquad
        \hat v_t = v_t + \rho \langle \partial v_t, W - W_t \rangle - \rho^2 \langle \partial m_t, W - W_t \rangle^2 \\
        \mu &= \tfrac1k \sum \hat m_t, \quad \sigma^2 = \tfrac1k \sum (\hat v_t + \hat m_t^2) - \mu^2, \quad
        y = \gamma \frac{x - \mu}{\sigma + \epsilon} + \beta

    where the sums are over the current batch and the remembered ones that have :math:`\hat v_t \ge 0`, together k.
    Gradients flow through the current batch's part of both. Before the end of burn-in: batch norm with the unbiased
    variance. Eval: batch norm with running statistics, which follow the current batch (:meth:`to_batch_norm`).

    Shapes: x and y ``(N, C, H, W)``, behind a convolution; weight, bias, running statistics ``(C,)``.

    Args:
        num_features: C.
        buffer_num: remembered iterations besides the current one. Default 3, as published; 0 is batch norm.
        burnin: training forwards of plain batch norm before, while weights still move fast. Default 8, as the published
            code *runs*; its configs mean 8 epochs: ``'8e'``, for which :meth:`resolve_burnin` has to be called.
        two_stage: the window goes from 0 to ``buffer_num`` at the end of burn-in, as published; False lets it grow.
        rho: weight of the correction. 1 (default, as published) is the Taylor expansion, 0 averages uncorrected.
        eps: default 1e-5, as published; with ``eps_in_sqrt`` it is added to the variance, not to its root.
        momentum: weight of the newest batch in the running statistics. Default 0.1, as published.

    Raises:
        ValueError, TypeError: an argument out of range or unknown; an input that is not ``(N, C, H, W)``.
        RuntimeError: in training, an x that requires grad and does not come from a convolution.

    Source: Yao et al., "Cross-Iteration Batch Normalization", CVPR 2021, arXiv:2002.05712, section 3.
    """

    _abbr_ = 'bn'  # mmcv names the attribute after it, as in the published checkpoints
    contract = Contract(
        'CBN',
        marks=('iter_count', *HISTORY_KEYS),
        loads=('BN',),
        as_in_bn=('eps',),
        behind='Conv2d',
        counters=('iter_count',),
    )

    def __init__(
        self,
        num_features: int,
        buffer_num: int = 3,
        burnin: int | str = 8,
        two_stage: bool = True,
        rho: float = 1.0,
        eps: float = 1e-5,
        eps_in_sqrt: bool = False,
        momentum: float = 0.1,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        check_number(type(self), 'eps', eps, 0)
        check_number(type(self), 'momentum', momentum, 0, 1)
        check_at_least(type(self), 'rho', rho, 0, '; the paper uses 1')
        check_count(type(self), 'buffer_num', buffer_num, 0, '; the paper uses 3')
        super().__init__(num_features, eps, momentum)
        self.num_features = num_features
        self.buffer_num = buffer_num
        self.burnin = burnin
        self.burnin_iters = _parse_burnin(burnin)
        self.two_stage = two_stage
        self.rho = rho
        self.eps = eps
        self.eps_in_sqrt = eps_in_sqrt
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))
        self.register_buffer('iter_count', torch.zeros((), dtype=torch.long))
        # The window depends on the counter, and reading a device buffer each step would stall the GPU. So this copy
        # runs along on the host; the buffer is what is saved, and read again after a load (None).
        self._count: int | None = None
        # In no buffers(): its shape is unknown until the first use, and tools that pair the buffers of two models (EMA,
        # DDP) must not meet ones that come late.
        self._history: History | None = None
        self._calls = Calls()

    # ------------------------------------------------------------------------------------------------ training

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        return self._forward_train(x) if self.training else self._forward_eval(x)

    @disable_dynamo  # grad_fn and the host counter do not exist inside a compiled graph
    def _forward_train(self, x: Tensor) -> Tensor:
        linked = self._take_linked_call()
        if x.numel() == 0:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)
        with torch.no_grad(), no_autocast(x):
            mean, var = map_ops.moments(x.detach())
            used = self._calls.once(mean, lambda: self._iterate(x, mean, var, linked))
        return Normalize.apply(x, self.weight, self.bias, *used, 0.0 if self.eps_in_sqrt else self.eps)

    def _iterate(self, x: Tensor, mean: Tensor, var: Tensor, linked: tuple | None) -> Used:
        """A new iteration, with these moments of the batch: count it, look back, remember it."""
        if in_backward():
            raise RuntimeError(
                f'{self._called()} is recomputed by activation checkpointing but has no forward to recompute'
            )
        positions = x.numel() // self.num_features
        unbiased = var * (positions / max(positions - 1, 1))
        window = 0 if self.averages else self._next_window()
        conv = None if self.averages else self._conv_in_front(x, linked, may_be_bare=not window)
        if window and conv is not None:
            used_mean, used_var, entries = self._look_back(x, mean, var, conv, window)
            mean_share = var_share = 1 / (entries * positions)
        else:
            used_mean, used_var = mean, unbiased
            mean_share = torch.full_like(mean, 1 / positions)
            var_share = torch.full_like(mean, 1 / max(positions - 1, 1))
        self._update_running(mean, unbiased, positions)
        return Used.of(used_mean, used_var, mean_share, var_share, self.eps, self.eps_in_sqrt)

    def _look_back(
        self, x: Tensor, mean: Tensor, var: Tensor, conv: Convolution, window: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of entries of this batch with those remembered, to which it is added."""
        weight = conv.weight.to(mean.dtype).flatten(1)
        if self._history is None:
            self._history = History.empty(self.buffer_num, weight, conv.groups)
        history = self._history
        history.check(self.buffer_num, weight, conv.groups, self._called())
        history.to(mean)
        combined = mean, var, torch.ones_like(mean)
        if history.length:
            combined = history.combine(mean, var, weight, self.rho)
        history.push(conv, x.detach(), mean, var, weight, keep=window)
        return combined

    def _update_running(self, mean: Tensor, unbiased: Tensor, positions: int) -> None:
        """Towards this batch. One value per channel has no variance: that of before stays."""
        if self.averages:
            if positions > 1:
                self._average([(self.running_mean, mean), (self.running_var, unbiased)])
            return
        new = dict(running_mean=self.running_mean.lerp(mean.to(self.running_mean), self.momentum))
        if positions > 1:
            new['running_var'] = self.running_var.lerp(unbiased.to(self.running_var), self.momentum)
        take_if_finite(self, **new)

    # ------------------------------------------------------------------------------------------------ burn-in

    def resolve_burnin(self, iters_per_epoch: int) -> None:
        """Turn a burn-in of epochs into iterations. Call before training with the length of the loader.

        Nothing happens where ``burnin`` is given in iterations already.
        """
        if isinstance(self.burnin, str):
            self.burnin_iters = round(float(self.burnin[:-1]) * iters_per_epoch)

    def _next_window(self) -> int:
        """Count one iteration; how many earlier ones to look back on."""
        if self.burnin_iters == 0:
            return self.buffer_num
        if self._count is None:
            self._count = int(self.iter_count)
        self._count += 1
        self.iter_count.add_(1)
        if self.burnin_iters is None:
            warnings.warn(
                f'CBN: burnin={self.burnin!r} is in epochs and nobody has said how long one is, so burn-in does not '
                'end: call resolve_burnin(len(train_dataloader)) on every CBN, or write a number of iterations',
                stacklevel=2,
            )
            return 0
        return self._window(self._count)

    def _window(self, count: int) -> int:
        if self.two_stage:
            return self.buffer_num if count > self.burnin_iters else 0
        return int(self.buffer_num * min(count / self.burnin_iters, 1))

    def coming_window(self) -> int:
        """How many earlier iterations the next training forward will look back on."""
        if self.burnin_iters == 0:
            return self.buffer_num
        return 0 if self.burnin_iters is None else self._window(int(self.iter_count) + 1)

    # ------------------------------------------------------------------------------------------------ inference

    def _forward_eval(self, x: Tensor) -> Tensor:
        dtype = statistics_dtype(x)
        var = self._batch_norm_var(self.running_var.to(dtype))
        mean, weight, bias = (v.to(dtype) for v in (self.running_mean, self.weight, self.bias))
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=self.eps)

    def _batch_norm_var(self, var: Tensor) -> Tensor:
        """The variance that batch norm, with eps inside its root, needs for the same denominator."""
        return var if self.eps_in_sqrt else (var.sqrt() + self.eps).square() - self.eps

    def _from_batch_norm_var(self, var: Tensor) -> Tensor:
        """The other way round."""
        return var if self.eps_in_sqrt else ((var + self.eps).sqrt() - self.eps).square()

    def to_batch_norm(self) -> nn.BatchNorm2d:
        """An ``nn.BatchNorm2d`` in eval mode that computes what this layer computes in eval mode."""
        plain = nn.BatchNorm2d(self.num_features, eps=self.eps, momentum=self.momentum).to(self.running_mean)
        with torch.no_grad():
            plain.weight.copy_(self.weight)
            plain.bias.copy_(self.bias)
            plain.running_mean.copy_(self.running_mean)
            plain.running_var.copy_(self._batch_norm_var(float64(self.running_var)))
        return plain.eval()

    def fold_into(self, conv: nn.Module) -> None:
        """See :mod:`._fold`: nothing of the layer remains."""
        var = self._batch_norm_var(float64(self.running_var))
        fold_affine(conv, *batch_norm_affine(self.weight, self.bias, self.running_mean, var, self.eps))

    # ------------------------------------------------------------------------------------------------ state

    drop_history = staticmethod(drop_history)

    def extra_repr(self) -> str:
        return f'{self.num_features}, buffer_num={self.buffer_num}, burnin={self.burnin!r}, eps={self.eps}'

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        if self._history is not None:
            self._history.apply(fn)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._history is not None:
            destination.update((prefix + name, value) for name, value in zip(HISTORY_KEYS, self._history.tensors()))

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        check_kind(self, state, prefix)
        key = prefix + 'running_var'
        # a plain batch norm's counter, which counts something else
        if state.pop(prefix + 'num_batches_tracked', None) is not None and key in state and not self.eps_in_sqrt:
            state[key] = self._from_batch_norm_var(state[key].double()).to(state[key].dtype)
        ours = any(prefix + name in state for name in ('weight', 'bias', 'running_mean', 'running_var', 'iter_count'))
        if prefix + 'iter_count' not in state:
            state[prefix + 'iter_count'] = torch.zeros_like(self.iter_count) if ours else self.iter_count
        history = {name: state.pop(prefix + name) for name in HISTORY_KEYS if prefix + name in state}
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        self._count = None
        if history and len(history) < len(HISTORY_KEYS):
            missing.extend(prefix + name for name in HISTORY_KEYS if name not in history)
        elif history:
            self._history = History.load(*history.values(), self.buffer_num, self.running_mean.device)
        elif ours:
            self._history = None


def _parse_burnin(burnin) -> int | None:
    """Iterations, or None for epochs that are not resolved yet."""
    if is_count(burnin, 0):
        return burnin
    if isinstance(burnin, str) and re.fullmatch(r'\d+(\.\d+)?e', burnin):
        return None
    raise ConfigError(
        f"norm_cfg of type 'CBN': burnin={burnin!r} must be a number of iterations (an integer of at least 0) or of "
        "epochs (a string such as '8e')"
    )
