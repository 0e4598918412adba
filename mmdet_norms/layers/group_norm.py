"""Group normalization with a default number of groups, fp32 statistics and the layout of its input."""

import torch
from torch import Tensor, nn

from ._args import ConfigError, check_map, check_number, is_count, reject_unknown
from ._contract import Contract
from ._loading import check_kind
from ._numerics import is_channels_last, statistics_dtype


class GN(nn.GroupNorm):
    r"""Group norm: statistics per sample over a group of channels and all positions.

    .. math::
        y_c = \gamma_c \frac{x_c - \mathrm E_g[x]}{\sqrt{\mathrm{Var}_g[x] + \epsilon}} + \beta_c

    with mean and biased variance over the ``C / num_groups`` channels of c's group and ``(H, W)``, per sample. The same
    in training and eval; nothing depends on the batch.

    Shapes: x and y ``(N, C, H, W)``, N = 0 included; ``weight``, ``bias`` ``(C,)``. State dict as ``nn.GroupNorm``'s.

    Beyond ``nn.GroupNorm``: statistics in fp32 or better, and y in the dtype of x (under autocast, torch returns fp32);
    y keeps a channels_last layout, whose kernel on CPUs is not used, as it loses all digits when a mean is large
    compared with the deviation; a group of one value gives ``bias`` instead of an error.

    Args:
        num_features: C.
        num_channels: the same by torch's name, as mmcv 2.0.0 and mmpretrain give it to what is called GN.
        num_groups: must divide C. Default 32, the paper's.
        eps: added to the variance inside the root. Default 1e-5, as published.
        affine: with weight and bias. Default True.

    Raises:
        ValueError: ``num_groups`` does not divide C (the message lists what does); ``eps`` out of range; an input
            that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Wu and He, arXiv:1803.08494, section 3.
    """

    contract = Contract(
        'GN',
        loads=('affine',),
        why_not={'BN': 'group norm has no running statistics: it uses those of each image'},
        stays='its statistics come from the input',
    )

    def __init__(
        self,
        num_features: int | None = None,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        num_channels: int | None = None,
        **unknown,
    ):
        reject_unknown(type(self), unknown)
        if (num_features is None) == (num_channels is None):
            raise ConfigError(
                f"norm_cfg of type 'GN': num_features={num_features!r} and num_channels={num_channels!r} are two names "
                'of the number of channels; give one of them'
            )
        num_features = num_channels if num_features is None else num_features
        check_number(type(self), 'eps', eps, 0)
        if not is_count(num_groups) or num_features % num_groups:
            divisors = ', '.join(str(d) for d in range(1, num_features + 1) if num_features % d == 0)
            raise ConfigError(
                f"norm_cfg of type 'GN': num_groups={num_groups!r} must divide the {num_features} channels of the "
                f'layer; write one of: {divisors}'
            )
        super().__init__(num_groups, num_features, eps=eps, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.num_channels, x)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def _load_from_state_dict(self, state, prefix, *args):
        check_kind(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args)


@torch.fx.wrap  # symbolic tracing, as conv-BN fusion does it, cannot look into dtypes and layouts
def group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``F.group_norm`` with fp32 statistics, the dtype and layout of x, and no error for single values."""
    dtype = statistics_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    y = torch.group_norm(x.to(dtype).contiguous(), num_groups, weight, bias, eps).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y
