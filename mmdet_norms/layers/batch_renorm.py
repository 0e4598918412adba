"""Batch renormalization: training normalizes, up to a bounded correction, as inference will."""

import torch
from torch import Tensor, nn

from ..compat.torch_versions import is_compiling
from ..kernels.image_groups import ImageGroups
from ._args import check_at_least, check_batch_norm, check_count, check_map, reject_unknown
from ._batch_renorm_compiled import brn_call, handle_of
from ._contract import Contract
from ._fold import fold_batch_norm
from ._groups import check_norm_batch, number_of_groups
from ._numerics import per_channel, statistics_dtype
from ._replay import Calls
from ._with_batch_norm import WithBatchNorm


class BRN(WithBatchNorm):
    r"""Batch renormalization.

    .. math::
        \hat x = \frac{x - \mu_B}{\sigma_B}\, r + d, \qquad y = \gamma \hat x + \beta, \qquad
        r = \mathrm{clip}_{[1/r_{max},\, r_{max}]}\!\left(\frac{\sigma_B}{\sigma}\right), \qquad
        d = \mathrm{clip}_{[-d_{max},\, d_{max}]}\!\left(\frac{\mu_B - \mu}{\sigma}\right)

    per channel over ``(N, H, W)``, with :math:`\sigma^2` the (biased) variance plus :math:`\epsilon`; :math:`\mu`,
    :math:`\sigma` are the running ones *before* this batch. r and d count as constants in the backward pass. Where
    neither clips, :math:`\hat x = (x - \mu) / \sigma`: what eval computes, which is batch norm.
    Of the training batches, the first ``warmup_iters`` are batch norm (r = 1, d = 0). Then the limits grow linearly.

    Shapes: x and y ``(N, C, H, W)``, N = 0 included; ``weight``, ``bias``, ``running_mean``, ``running_var`` ``(C,)``.
    Statistics in fp32 or better; y has the dtype and layout of x. State dict: batch norm's.

    Args:
        num_features: C.
        r_max: limit of r, at least 1. Default 3.
        d_max: limit of d, at least 0. Default 5. With ``r_max=1, d_max=0`` the layer is batch norm.
        warmup_iters, r_iters, d_iters: batches before the limits grow, until ``r_max`` and until ``d_max`` is reached.
            Defaults 5000, 40000, 25000, the paper's; a shorter training needs less.
        eps: added to the variance inside the root. Default 1e-5.
        momentum: weight of the newest batch in the running statistics (torch's convention); ``None`` averages over
            all batches. Default 0.01, as published: they take part in training, so they must be steady.
        norm_batch: images that are normalized together. Default ``None``: the whole batch.

    Raises:
        ValueError: a number out of range; not ``(N, C, H, W)``; in training, no multiple of ``norm_batch`` images.
        TypeError: an unknown key.

    Source: Ioffe, "Batch Renormalization", arXiv:1702.03275, sections 3 and 4.1.
    """

    _abbr_ = 'bn'  # the attribute name in host models: batch norm's, so that its checkpoints load by key
    contract = Contract(
        'BRN', loads=('BN',), as_in_bn=('eps',), batch_norm='bn', grouped_as='BRN', counters=('num_batches_tracked',)
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
        check_batch_norm(type(self), eps, momentum)
        check_at_least(type(self), 'r_max', r_max, 1)
        check_at_least(type(self), 'd_max', d_max, 0)
        check_count(type(self), 'warmup_iters', warmup_iters, 0)
        check_count(type(self), 'r_iters', r_iters, warmup_iters, ' (warmup_iters)')
        check_count(type(self), 'd_iters', d_iters, warmup_iters, ' (warmup_iters)')
        if norm_batch is not None:
            check_norm_batch('BRN', norm_batch)
        super().__init__(num_features, nn.BatchNorm2d(num_features, eps=eps, momentum=momentum))
        self.momentum, self.norm_batch = momentum, norm_batch
        self.r_max, self.d_max = r_max, d_max
        self.warmup_iters, self.r_iters, self.d_iters = warmup_iters, r_iters, d_iters
        self._calls, self._handle = Calls(), handle_of(self)

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        bn = self.bn
        if not bn.training:
            return bn(x)
        dtype = statistics_dtype(x)
        weight, bias = bn.weight.to(dtype), bn.bias.to(dtype)
        if not x.numel():
            return (x * per_channel(weight) + per_channel(bias)).to(x.dtype)
        if self.norm_batch is not None:
            return self._by_groups(x, weight, bias)
        with torch.no_grad():
            var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
            r, d = self._r_and_d(mean, var, x.numel() // x.shape[1])
        # r and d are affine, as weight and bias are. (F.batch_norm would refuse a single value per channel.)
        weight, bias = weight * r, weight * d + bias
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, bn.eps, torch.backends.cudnn.enabled)

    def _by_groups(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        images = ImageGroups(x, number_of_groups('BRN', self.norm_batch, x))
        mean, var = images.mean, images.var
        with torch.no_grad():
            r, d = self._r_and_d(mean.detach(), var.detach(), self.norm_batch * x.shape[2] * x.shape[3])
        return images.affine(weight * r * (var + self.bn.eps).rsqrt(), mean, weight * d + bias)

    def _r_and_d(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """From moments over ``count`` values each, ``(C,)`` or of the groups ``(G, C)``."""
        bn = self.bn
        if is_compiling():
            return brn_call(mean, var, bn.running_mean, bn.running_var, bn.num_batches_tracked, self._handle, count)
        return self._call(mean, var, count, bn)

    def _call(self, mean: Tensor, var: Tensor, count: int, bn) -> tuple[Tensor, Tensor]:
        """r and d of this batch, which then counts; or of the call that is being repeated. ``bn`` has the state."""
        r, d = self._calls.once(mean, lambda: self._correction(mean, var, bn))
        self._update(mean, var, count, bn)
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
        r, d = torch.sqrt(var + bn.eps) / sigma, (mean - bn.running_mean) / sigma
        return torch.clamp(r, 1 / r_max, r_max), torch.clamp(d, -d_max, d_max)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != '_handle'}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._handle = handle_of(self)

    def extra_repr(self) -> str:
        schedule = ('r_max', 'd_max', 'warmup_iters', 'r_iters', 'd_iters')
        shown = schedule if self.norm_batch is None else (*schedule, 'norm_batch')
        return ', '.join(f'{key}={getattr(self, key)}' for key in shown)
