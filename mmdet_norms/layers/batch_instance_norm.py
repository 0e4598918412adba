"""Batch-instance normalization: a gate per channel between the statistics of the batch and those of the instance."""

import torch
from torch import Tensor, nn

from ..kernels.groups import moments_of_groups
from ._args import reject_unknown
from ._batch_and_instance import BatchAndInstance
from ._contract import Contract
from ._loading import kind_of
from ._numerics import all_finite, instance_moments, per_channel, statistics_dtype
from ._replay import in_backward


class BIN(BatchAndInstance):
    r"""Batch-instance norm.

    .. math::
        y_c = \gamma_c \left( \rho_c\, \frac{x_c - \mu^B_c}{\sqrt{(\sigma^B_c)^2 + \epsilon}}
            + (1 - \rho_c)\, \frac{x_c - \mu^I_c}{\sqrt{(\sigma^I_c)^2 + \epsilon}} \right) + \beta_c,
        \qquad \rho_c \in [0, 1]

    with mean and biased variance over ``(N, H, W)`` for B, in eval the running ones, and over ``(H, W)`` of each
    instance for I. A new layer is batch norm: :math:`\rho = 1`. Eval depends on the instance, so it cannot be folded
    into a convolution.

    As published, :math:`\rho` is clipped to [0, 1] after each step of the optimizer: here, by the next training
    forward. Until then, a value that has left the interval counts as the bound that it passed; its gradient is that of
    the bound.

    Shapes: x and y ``(N, C, H, W)``; ``weight``, ``bias``, ``gate`` (:math:`\rho`), ``running_mean``, ``running_var``
    ``(C,)``. N = 0 passes through and changes no statistic; a single value per channel is normalized with the running
    statistics and leaves them. Statistics in fp32 for fp16/bf16 inputs; y has the dtype and layout of x.

    A batch norm checkpoint loads as the identical function, with every gate at 1. The statistics of the batch live in a
    child ``bn``, where ``norm_eval`` and precise-BN tools find them; SyncBN conversion leaves them those of this
    process.

    Args:
        num_features: C.
        eps: added to both variances inside the root. Default 1e-5, batch norm's.
        momentum: weight of the newest batch in the running statistics (torch's convention); ``None`` averages over
            all batches. Default 0.1, batch norm's.

    Raises:
        ValueError: ``eps`` or ``momentum`` out of range; an input that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Nam and Kim, "Batch-Instance Normalization for Adaptively Style-Invariant Neural Networks", NeurIPS 2018,
    arXiv:1805.07925, section 3.
    """

    _abbr_ = 'bn'  # the attribute name in host models: batch norm's, so that its checkpoints load by key
    contract = Contract(
        'BIN',
        marks=('gate',),
        loads=('BN',),
        as_in_bn=('eps', 'momentum'),
        stays='its statistics come from the input',
        counters=('num_batches_tracked',),
    )

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, **unknown):
        reject_unknown(type(self), unknown)
        super().__init__(num_features, eps, momentum)
        self.gate = nn.Parameter(torch.ones(num_features))

    def _normalize(self, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = _batch_instance_norm(x, self.weight, self.bias, self.gate, self.bn.eps, *given)
        if self.training and self.gate.requires_grad and x.numel() and not in_backward():
            self._clip_gate(*result[1:])
        return result

    @torch.no_grad()
    def _clip_gate(self, mean: Tensor, var: Tensor) -> None:
        self.gate.copy_(torch.where(all_finite(mean, var), self.gate.clamp(0, 1), self.gate))

    def _take_over(self, state, prefix, errors) -> None:
        if kind_of(state, prefix) == 'BN':
            state[prefix + 'gate'] = torch.ones_like(self.gate)


@torch.fx.wrap  # symbolic tracing, as conv-BN fusion does it, cannot look into dtypes
def _batch_instance_norm(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, eps: float, *given: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and biased variance ``(C,)`` of the batch: those of x unless some are given."""
    dtype = statistics_dtype(x)
    gamma, beta, rho = (vector.to(dtype) for vector in (weight, bias, gate))
    rho = rho.detach().clamp(0, 1) + (rho - rho.detach())  # clipped, with the gradient of rho: clamp's ends at bounds
    wide = x.to(dtype)
    mean_i, var_i = instance_moments(wide)
    mean, var = (t.to(dtype) for t in given) if given else moments_of_groups(mean_i, var_i, None)
    # The sum of both parts is one affine map, whose zero is between the two means.
    batch, instance = rho * torch.rsqrt(var + eps), (1 - rho) * torch.rsqrt(var_i + eps)
    scale = batch + instance
    origin = mean + instance / scale * (mean_i - mean)
    y = (wide - per_channel(origin)) * per_channel(gamma * scale) + per_channel(beta)
    return y.to(x.dtype), mean, var
