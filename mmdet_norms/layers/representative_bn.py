"""Representative batch normalization: batch norm, calibrated to each instance before and after."""

import torch
from torch import Tensor, nn

from ..kernels.groups import moments_of_groups
from ._args import reject_unknown
from ._batch_and_instance import BatchAndInstance
from ._contract import Contract
from ._loading import kind_of
from ._numerics import instance_moments, per_channel, statistics_dtype

_START = dict(center_weight=0.0, scale_weight=0.0, scale_bias=1.0)


class RBN(BatchAndInstance):
    r"""Representative batch norm.

    .. math::
        x'_c = x_c + w^m_c\, \mathrm E_{HW}[x_c], \qquad
        \hat x_c = \frac{x'_c - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}, \qquad
        y_c = \gamma_c\, \hat x_c\, \mathrm{sigmoid}(w^v_c\, \mathrm E_{HW}[\hat x_c] + w^b_c) + \beta_c

    with the mean over ``(H, W)`` of each instance, and mean and biased variance of x' over ``(N, H, W)``, in eval the
    running ones. The first step moves the centre of each instance, the second its scale. Eval depends on the instance,
    so it cannot be folded into a convolution.

    A new layer has :math:`w^m = w^v = 0` and :math:`w^b = 1`: batch norm times sigmoid(1).

    Shapes: x and y ``(N, C, H, W)``; ``weight``, ``bias``, ``center_weight`` (:math:`w^m`), ``scale_weight``
    (:math:`w^v`), ``scale_bias`` (:math:`w^b`), ``running_mean``, ``running_var`` ``(C,)``. N = 0 passes through and
    changes no state; a single value per channel is normalized with the running statistics and leaves them. Statistics
    in fp32 for fp16/bf16 inputs; y has the dtype and layout of x.

    A batch norm checkpoint loads as the identical function, which learns as a new layer does: its ``weight`` divided by
    sigmoid(1). The statistics live in a child ``bn``, where ``norm_eval`` and precise-BN tools find them; SyncBN
    conversion leaves them those of this process.

    Args:
        num_features: C.
        eps: added to the variance inside the root. Default 1e-5, batch norm's.
        momentum: weight of the newest batch in the running statistics (torch's convention); ``None`` averages over
            all batches. Default 0.1, batch norm's.

    Raises:
        ValueError: ``eps`` or ``momentum`` out of range; an input that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Gao et al., "Representative Batch Normalization with Feature Calibration", CVPR 2021, section 3.
    """

    _abbr_ = 'bn'  # the attribute name in host models: batch norm's, so that its checkpoints load by key
    contract = Contract(
        'RBN',
        marks=('center_weight', 'scale_weight', 'scale_bias'),
        loads=('BN',),
        as_in_bn=('eps', 'momentum'),
        stays='its statistics come from the input',
        counters=('num_batches_tracked',),
    )

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, **unknown):
        reject_unknown(type(self), unknown)
        super().__init__(num_features, eps, momentum)
        for name, value in _START.items():
            self.register_parameter(name, nn.Parameter(torch.full((num_features,), value)))

    def _normalize(self, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        learned = (self.weight, self.bias, self.center_weight, self.scale_weight, self.scale_bias)
        return _representative_norm(x, *learned, self.bn.eps, *given)

    def _take_over(self, state, prefix, errors) -> None:
        if kind_of(state, prefix) != 'BN':
            return
        new = {name: torch.full((self.num_features,), value) for name, value in _START.items()}
        state.update((prefix + name, value) for name, value in new.items())
        if prefix + 'weight' in state:
            state[prefix + 'weight'] = state[prefix + 'weight'] / new['scale_bias'].sigmoid()


@torch.fx.wrap  # symbolic tracing, as conv-BN fusion does it, cannot look into dtypes
def _representative_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    center_weight: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
    eps: float,
    *given: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and biased variance ``(C,)`` that x' was normalized with: of x' itself unless some are given."""
    dtype = statistics_dtype(x)
    learned = (weight, bias, center_weight, scale_weight, scale_bias)
    gamma, beta, w_m, w_v, w_b = (vector.to(dtype) for vector in learned)
    wide = x.to(dtype)
    of_instance, var_of_instance = instance_moments(wide)
    centre = (1 + w_m) * of_instance  # mean of x' in each instance, whose variance is that of x
    mean, var = (t.to(dtype) for t in given) if given else moments_of_groups(centre, var_of_instance, None)
    inverse = torch.rsqrt(var + eps)
    gate = torch.sigmoid(w_v * (centre - mean) * inverse + w_b)
    y = (wide - per_channel(mean - w_m * of_instance)) * per_channel(gamma * gate * inverse) + per_channel(beta)
    return y.to(x.dtype), mean, var
