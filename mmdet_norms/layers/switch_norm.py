"""Switchable normalization: a learned mix of instance, layer and batch statistics."""

import warnings

import torch
from torch import Tensor, nn

from ..kernels.groups import moments_of_groups
from ._args import check_map, reject_unknown
from ._batch_and_instance import BatchAndInstance
from ._contract import Contract
from ._loading import kind_of
from ._numerics import instance_moments, per_channel, pooled, statistics_dtype

_ALL_ON_BN = (0.0, 0.0, 110.0)  # of softmax, in fp32: 0, 0, 1


class SN(BatchAndInstance):
    r"""Switchable norm.

    .. math::
        y_c = \gamma_c \frac{x_c - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma_k^2 + \epsilon}} + \beta_c,
        \qquad k \in \{\mathrm{IN}, \mathrm{LN}, \mathrm{BN}\}

    with :math:`w = \mathrm{softmax}(\texttt{mean\_weight})`, :math:`w' = \mathrm{softmax}(\texttt{var\_weight})`, and
    mean and biased variance over (H, W) for IN, (C, H, W) for LN, (N, H, W) for BN. In eval, BN's are the running ones;
    IN's and LN's are always the sample's, so eval cannot be folded into a convolution.

    Shapes: x and y ``(N, C, H, W)``; ``weight``, ``bias``, ``running_mean``, ``running_var`` ``(C,)``; ``mean_weight``,
    ``var_weight`` ``(3,)`` in the order IN, LN, BN, both starting as an even mix. N = 0 included. 1x1 maps are finite:
    the published code takes IN's variance as unbiased, which is NaN there. Statistics in fp32 or better; y has the
    dtype and layout of x.

    State dict: the published keys ``weight, bias, mean_weight, var_weight, running_mean, running_var``, in the shapes
    above or in the published ``(1, C, 1, 1)``, plus ``num_batches_tracked``. A batch norm loads as the identical
    function, with all weight on BN, from where the mix hardly learns: see :meth:`mix_evenly`.

    Args:
        num_features: C.
        eps: added to the mixed variance inside the root. Default 1e-5, as published.
        momentum: weight of the newest batch in the running statistics (torch's convention); ``None`` averages over
            all batches. Default 0.1, the published 0.9 for the old value.

    Raises:
        ValueError: ``eps`` or ``momentum`` out of range; an input that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", arXiv:1806.10779,
    section 3.
    """

    _abbr_ = 'sn'
    contract = Contract(
        'SN',
        marks=('mean_weight', 'var_weight'),
        loads=('BN',),
        as_in_bn=('eps', 'momentum'),
        stays='its statistics come from the input',
        counters=('num_batches_tracked',),
    )

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, **unknown):
        reject_unknown(type(self), unknown)
        super().__init__(num_features, eps, momentum)
        self.eps = eps
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        bn = self.bn
        use_batch = bn.training and x.numel() > 0
        given = () if use_batch else (bn.running_mean, bn.running_var)
        y, mean, var = _switch_norm(x, self.weight, self.bias, self.mean_weight, self.var_weight, self.eps, *given)
        if use_batch:
            self._update(mean, var)
        return y

    def mix_evenly(self) -> None:
        """Weight instance, layer and batch statistics alike, as a new layer does."""
        with torch.no_grad():
            self.mean_weight.fill_(1)
            self.var_weight.fill_(1)

    def _take_over(self, state, prefix, errors) -> None:
        if kind_of(state, prefix) == 'BN':
            for name in ('mean_weight', 'var_weight'):
                state[prefix + name] = self.mean_weight.new_tensor(_ALL_ON_BN)
            warnings.warn(
                'SN loaded a batch norm as the identical function: all of its weight is on the statistics of the '
                'batch, from where it hardly learns to use others. To start from an even mix, another function, call '
                'mix_evenly() on every SN',
                stacklevel=2,
            )
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            value = state.get(prefix + name)
            if value is not None and value.dim() > 1 and value.numel() == self.num_features:
                state[prefix + name] = value.flatten()


@torch.fx.wrap  # symbolic tracing, as conv-BN fusion does it, cannot look into dtypes
def _switch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean_weight: Tensor, var_weight: Tensor, eps: float, *given: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and biased variance ``(C,)`` of the batch: those of x unless some are given."""
    dtype = statistics_dtype(x)
    wide = x.to(dtype)
    mean_in, var_in = instance_moments(wide)  # from which LN's and BN's follow
    mean_ln, var_ln = pooled(mean_in, var_in, 1)
    mean_bn, var_bn = (t.to(dtype) for t in given) if given else moments_of_groups(mean_in, var_in, None)
    mean = _mix(mean_weight.to(dtype), mean_in, mean_ln, mean_bn)
    var = _mix(var_weight.to(dtype), var_in, var_ln, var_bn)
    scale = weight.to(dtype) * torch.rsqrt(var + eps)
    y = (wide - per_channel(mean)) * per_channel(scale) + per_channel(bias.to(dtype))
    return y.to(x.dtype), mean_bn, var_bn


def _mix(logits: Tensor, *statistics: Tensor) -> Tensor:
    """``(N, C)``."""
    weights = torch.softmax(logits, 0)
    return sum(weight * statistic for weight, statistic in zip(weights, statistics))
