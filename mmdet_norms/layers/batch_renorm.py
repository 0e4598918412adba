"""Batch renormalization: training normalizes, up to a bounded correction, as inference will."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..compat.torch_versions import is_compiling
from ._args import ConfigError, check_map, check_number, reject_unknown
from ._contract import Contract
from ._fold import fold_batch_norm
from ._groups import check_groups, check_norm_batch, normalize_groups
from ._recompute import in_backward
from ._replay import Calls, handle_of, layer_of
from ._with_batch_norm import WithBatchNorm


class BRN(WithBatchNorm):
    r"""Batch renormalization.

    .. math::
        \hat x = \frac{x - \mu_B}{\sigma_B}\, r + d, \qquad y = \gamma \hat x + \beta, \qquad
        r = \mathrm{clip}_{[1/r_{max},\, r_{max}]}\!\left(\frac{\sigma_B}{\sigma}\right), \qquad
        d = \mathrm{clip}_{[-d_{max},\, d_{max}]}\!\left(\frac{\mu_B - \mu}{\sigma}\right)

    per channel over ``(N, H, W)``, with :math:`\sigma^2` the (biased) variance plus :math:`\epsilon`; :math:`\mu`,
    :math:`\sigma` are the running ones *before* this batch. r and d count as constants in the backward pass. Where
    neither clips, :math:`\hat x = (x - \mu) / \sigma`: what eval computes.

    Schedule, in training batches counted by ``num_batches_tracked``: the first ``warmup_iters`` are batch norm (r = 1,
    d = 0); then the limits grow linearly from 1 and 0, that of r up to ``r_max`` at ``r_iters``, that of d up to
    ``d_max`` at ``d_iters``. The defaults are the paper's; a schedule shorter than 40k iterations needs shorter ones.

    Eval is plain batch norm. The running variance is batch norm's (an average of unbiased variances; the paper averages
    standard deviations), so that a batch norm checkpoint loads as the identical eval function. It also brings its
    count: a layer that loads one with ``num_batches_tracked`` past the warm-up starts with the full limits, as its
    statistics are good.

    Shapes: x and y ``(N, C, H, W)``; ``weight``, ``bias``, ``running_*`` ``(C,)``. N = 0 passes through and changes no
    state. A single value per channel gives :math:`\gamma d + \beta` and leaves the running variance, of which it says
    nothing. Statistics in fp32 for fp16/bf16 inputs; y has the dtype and layout of x. No host sync.

    Under activation checkpointing the recomputed forward finds r and d of the original one and does not update the
    statistics a second time.

    With ``norm_batch=B`` the batch is normalized in consecutive groups of B images, as B images alone would be: each
    group has its own statistics, r and d, the latter against the running statistics before this batch. These then take
    one step, towards the average over groups of mean and unbiased variance, and count one batch.

    ``norm_eval`` makes it plain batch norm with running statistics, which defeats the method.

    Args:
        num_features: C.
        r_max: limit of r, at least 1. Default 3.
        d_max: limit of d, at least 0. Default 5. With ``r_max=1, d_max=0`` the layer is batch norm.
        warmup_iters: training batches that are plain batch norm. Default 5000.
        r_iters: when ``r_max`` is reached. Default 40000.
        d_iters: when ``d_max`` is reached. Default 25000.
        eps: added to the variance inside the root. Default 1e-5.
        momentum: weight of the newest batch in the running statistics (torch's convention); ``None`` averages over
            all batches. Default 0.01, as published: the running statistics take part in training, so they must be
            steady.
        norm_batch: B. Default ``None``: the whole batch.

    Raises:
        ValueError: a number out of range, or ``r_iters`` or ``d_iters`` below ``warmup_iters``; an input that is not
            ``(N, C, H, W)``, or in training no multiple of ``norm_batch``.
        TypeError: an unknown key.

    Source: Ioffe, "Batch Renormalization", arXiv:1702.03275, sections 3 and 4.1.
    """

    _abbr_ = 'bn'  # the attribute name in host models: batch norm's, so that its checkpoints load by key
    contract = Contract(
        'BRN',
        loads=('BN',),
        as_in_bn=('eps',),
        batch_norm='bn',
        grouped_as='BRN',
        counters=('num_batches_tracked',),
    )

    def __init__(
        self,
        num_features: int,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_iters: int = 5000,
        r_iters: int = 40000,
        d_iters: int = 25000,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        norm_batch: int | None = None,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        check_number(type(self), 'eps', eps, 0)
        if momentum is not None:
            check_number(type(self), 'momentum', momentum, 0, 1)
        _check_at_least('r_max', r_max, 1, (int, float))
        _check_at_least('d_max', d_max, 0, (int, float))
        _check_at_least('warmup_iters', warmup_iters, 0, int)
        _check_at_least('r_iters', r_iters, warmup_iters, int, ' (warmup_iters)')
        _check_at_least('d_iters', d_iters, warmup_iters, int, ' (warmup_iters)')
        if norm_batch is not None:
            check_norm_batch('BRN', norm_batch)
        super().__init__(num_features, nn.BatchNorm2d(num_features, eps=eps, momentum=momentum))
        self.norm_batch = norm_batch
        self.momentum = momentum
        self.r_max, self.d_max = r_max, d_max
        self.warmup_iters, self.r_iters, self.d_iters = warmup_iters, r_iters, d_iters
        self._calls = Calls()
        self._handle = handle_of(self)

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        bn = self.bn
        if not bn.training:
            return bn(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = bn.weight.to(dtype), bn.bias.to(dtype)
        if not x.numel():
            return (x * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).to(x.dtype)
        if self.norm_batch is not None:
            return self._by_groups(x, weight, bias)
        with torch.no_grad():
            var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
            r, d = self._r_and_d(mean, var, x.numel() // x.shape[1])
        # Renormalization is affine, so it can share the step of weight and bias.
        # torch.batch_norm, since F.batch_norm refuses a single value per channel.
        weight, bias = weight * r, weight * d + bias
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, bn.eps, torch.backends.cudnn.enabled)

    def _by_groups(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        check_groups('BRN', self.norm_batch, x)
        count = self.norm_batch * x.shape[2] * x.shape[3]

        def affine_of(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                r, d = self._r_and_d(mean.detach(), var.detach(), count)
            return weight * r * (var + self.bn.eps).rsqrt(), mean, weight * d + bias

        return normalize_groups(x, self.norm_batch, affine_of)

    def _r_and_d(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """From moments over ``count`` values each, ``(C,)`` or of the groups ``(G, C)``."""
        bn = self.bn
        if is_compiling():
            state = bn.running_mean, bn.running_var, bn.num_batches_tracked
            return _compiled_call(mean, var, *state, self._handle, count)
        return self._call(mean, var, count, bn)

    def _call(self, mean: Tensor, var: Tensor, count: int, bn) -> tuple[Tensor, Tensor]:
        """r and d of this batch, which then counts; or of the call that is being repeated. ``bn`` has the state."""
        known = self._calls.recall(mean) if in_backward() else None
        r, d = known[1:] if known else self._correction(mean, var, bn)
        if not in_backward():
            self._calls.add((mean, r, d))
            mean, var = (t.mean(0) if t.dim() > 1 else t for t in (mean, var))
            self._update(mean, var * (count / (count - 1)) if count > 1 else None, bn)
        return r, d

    def fold_into(self, conv: nn.Module) -> None:
        """See :mod:`._fold`: eval is batch norm, of which nothing remains."""
        fold_batch_norm(conv, self.bn)

    def limits(self, dtype: torch.dtype = torch.float32, bn=None) -> tuple[Tensor, Tensor]:
        """r_max and d_max of the coming training batch, as tensors on the layer's device."""
        done = (bn or self.bn).num_batches_tracked.to(dtype) - self.warmup_iters
        grown_r = (done / max(self.r_iters - self.warmup_iters, 1)).clamp(0, 1)
        grown_d = (done / max(self.d_iters - self.warmup_iters, 1)).clamp(0, 1)
        return 1 + (self.r_max - 1) * grown_r, self.d_max * grown_d

    def _correction(self, mean: Tensor, var: Tensor, bn) -> tuple[Tensor, Tensor]:
        if bn.momentum is None and self.momentum is not None:  # the running statistics are being recomputed: not yet
            return torch.ones_like(mean), torch.zeros_like(mean)
        r_max, d_max = self.limits(mean.dtype, bn)
        sigma = torch.sqrt(bn.running_var.to(mean.dtype) + bn.eps)
        r = torch.sqrt(var + bn.eps) / sigma
        d = (mean - bn.running_mean) / sigma
        return torch.clamp(r, 1 / r_max, r_max), torch.clamp(d, -d_max, d_max)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != '_handle'}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._handle = handle_of(self)

    def extra_repr(self) -> str:
        return (
            f'r_max={self.r_max}, d_max={self.d_max}, warmup_iters={self.warmup_iters}, '
            f'r_iters={self.r_iters}, d_iters={self.d_iters}'
            + (f', norm_batch={self.norm_batch}' if self.norm_batch else '')
        )


def _compiled_call(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, tracked: Tensor, handle: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """:meth:`BRN._call` for compiled code, on copies, because the compiler reuses the memory of its tensors."""
    layer = layer_of(handle)
    fixed = dict(eps=layer.bn.eps, momentum=layer.bn.momentum)
    state = SimpleNamespace(running_mean=running_mean, running_var=running_var, num_batches_tracked=tracked, **fixed)
    r, d = layer._call(mean.clone(), var.clone(), count, state)
    return r.clone(), d.clone()


if hasattr(torch.library, 'custom_op'):  # torch >= 2.4
    # Opaque to the compiler, which could not tell a forward from its repetition by a checkpoint around it.
    _compiled_call = torch.library.custom_op(
        'mmdet_norms::brn_call', _compiled_call, mutates_args=('running_mean', 'running_var', 'tracked')
    )

    @_compiled_call.register_fake
    def _(mean, var, running_mean, running_var, tracked, handle, count):
        return torch.empty_like(mean), torch.empty_like(mean)
else:
    _compiled_call = torch.compiler.disable(_compiled_call)


def _check_at_least(key: str, value, low: float, types, name: str = '') -> None:
    if isinstance(value, bool) or not isinstance(value, types) or not low <= value < float('inf'):
        kind = 'an integer' if types is int else 'a number'
        raise ConfigError(f"norm_cfg of type 'BRN': {key}={value!r} must be {kind} of at least {low:g}{name}")
