"""What folding makes of AN."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.image_groups import ImageGroups
from ._args import check_map
from ._fold import InferenceOnly, batch_norm_affine, float64
from ._numerics import no_autocast, pooled

DESCRIPTOR_EPS = 1e-3  # published constant; larger than eps because the quotient grows with a vanishing deviation


class FoldedAN(InferenceOnly, nn.Module):
    r"""AN at inference: the instance's moments, two small matrix products, one scale-shift pass.

    .. math::
        g_n = \min(\max(A d_n + a, 0), 6), \qquad (s_n, t_n) = g_n M, \qquad y_{nc} = s_{nc} x_{nc} + t_{nc}

    A and a hold the attention's convolution, its logit norm and the 3 of hsigmoid; M, ``(k, 2 C)``, holds
    :math:`\gamma / 6`, :math:`\beta / 6` and, for batch norm, the running statistics:
    :math:`\gamma_{kc} / 6 \sigma_c` and :math:`(\beta_{kc} - \gamma_{kc} \mu_c / \sigma_c) / 6`. Group norm's
    statistics follow from the instance's moments. Nothing goes into the convolution in front, whose raw output the
    attention reads.

    Same shapes, dtypes and treatment of 1x1 maps and N = 0 as :class:`~.an.AN`. State dict: ``attention.weight``
    ``(k, C)``, ``attention.bias`` ``(k,)``, ``mixture`` ``(k, 2 C)``.
    """

    def __init__(self, num_features: int, k: int, num_groups: int | None, eps: float):
        super().__init__()
        self.num_features, self.num_groups, self.eps = num_features, num_groups, eps
        self.attention = nn.Linear(num_features, k)
        self.mixture = nn.Parameter(torch.empty(k, 2 * num_features))

    @classmethod
    def made_of(cls, an) -> 'FoldedAN':
        """The AN in eval mode, with all that is fixed multiplied out."""
        conv, *norms = an.attention_weights.attention
        weight = float64(conv.weight).flatten(1)
        bias = weight.new_zeros(an.k) if conv.bias is None else float64(conv.bias)
        for bn in norms:
            if not isinstance(bn, nn.Identity):  # left by another tool's fusion
                scale, shift = batch_norm_affine(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
                weight, bias = weight * scale[:, None], bias * scale + shift
        gamma, beta = float64(an.weight_) / 6, float64(an.bias_) / 6
        if an.norm == 'BN':
            scale, shift = batch_norm_affine(None, None, an.bn.running_mean, an.bn.running_var, an.bn.eps)
            gamma, beta = gamma * scale, beta + gamma * shift
        folded = cls(an.num_features, an.k, an.num_groups if an.norm == 'GN' else None, an.eps)
        state = {'attention.weight': weight, 'attention.bias': bias + 3, 'mixture': torch.cat([gamma, beta], 1)}
        folded.to(an.weight_).load_state_dict(state)
        return folded.eval()

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_features, x)
        if x.numel() == 0:
            return x
        with no_autocast(x):
            images = ImageGroups(x)
            return images.affine(*self._parameters_of(images.mean, images.var, x.shape[2] * x.shape[3]))

    def _parameters_of(self, mean: Tensor, var: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, origin and shift of each channel of each instance from its mean and biased variance (N, C)."""
        d = mean / (var * (size / max(size - 1, 1)) + DESCRIPTOR_EPS).sqrt()
        weight, bias, mixture = (p.to(mean.dtype) for p in (*self.attention.parameters(), self.mixture))
        scale, shift = (F.relu6(F.linear(d, weight, bias)) @ mixture).chunk(2, 1)
        if self.num_groups is None:
            return scale, torch.zeros_like(mean), shift
        origin, var = group_statistics(mean, var, self.num_groups)
        return scale * (var + self.eps).rsqrt(), origin, shift

    def extra_repr(self) -> str:
        return f'{self.num_features}' + ('' if self.num_groups is None else f', num_groups={self.num_groups}')


def group_statistics(mean: Tensor, var: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of group norm from those of the channels; all ``(N, C)``."""
    channels = mean.unflatten(1, (num_groups, -1))
    of_groups = pooled(channels, var.unflatten(1, (num_groups, -1)), 2)
    return tuple(t.expand_as(channels).flatten(1) for t in of_groups)
