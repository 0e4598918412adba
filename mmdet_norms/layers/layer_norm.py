"""Layer normalization for feature maps ``(N, C, H, W)``."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._args import ConfigError, check_map, check_number, reject_unknown
from ._contract import Contract
from ._loading import check_kind
from ._numerics import statistics_dtype
from .group_norm import group_norm


class LN2d(nn.LayerNorm):
    r"""Layer norm over the channels of a feature map, with one weight and bias per channel.

    .. math::
        y_{nchw} = \gamma_c \frac{x_{nchw} - \mathrm E[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} + \beta_c

    ``over='C'``: mean and biased variance over C at each position, as ConvNeXt does and as transformers do per token.
    ``over='CHW'``: over C, H and W of a sample, i.e. group norm with one group: what "LN" means in tables of
    convolutional detectors (group norm's paper and its successors).

    Both are the same in training and eval and independent of the batch. It is called LN2d because ``'LN'`` is
    mmcv's name for ``nn.LayerNorm`` over the *last* axis, which mmdet's transformers ask for.

    Shapes: x and y ``(N, C, H, W)``, N = 0 included; ``weight``, ``bias`` ``(C,)``. State dict as ``nn.LayerNorm``'s.
    Statistics in fp32 or better; y has the dtype and layout of x.

    Args:
        num_features: C.
        over: ``'C'`` or ``'CHW'``. Default ``'C'``: it keeps the contrast between positions, which a detector reads.
        eps: added to the variance inside the root. Default 1e-5.

    Raises:
        ValueError: ``over`` is neither, or ``eps`` out of range; an input that is not ``(N, C, H, W)``.
        TypeError: an unknown key.

    Source: Ba et al., arXiv:1607.06450, section 3; per position: Liu et al., arXiv:2201.03545, section 2.6; over
    (C, H, W): Wu and He, arXiv:1803.08494, section 3.
    """

    contract = Contract(
        'LN2d',
        loads=('affine',),
        why_not={'BN': 'layer norm has no running statistics: it uses those of each image'},
        stays='its statistics come from the input',
    )
    OVER = ('C', 'CHW')

    def __init__(self, num_features: int, over: str = 'C', eps: float = 1e-5, **unknown):
        reject_unknown(type(self), unknown)
        check_number(type(self), 'eps', eps, 0)
        if over not in self.OVER:
            choices = ', '.join(self.OVER)
            raise ConfigError(f"norm_cfg of type 'LN2d': over={over!r} is unknown; choose one of: {choices}")
        super().__init__(num_features, eps=eps)
        self.over = over

    def forward(self, x: Tensor) -> Tensor:
        check_map(self, self.normalized_shape[0], x)
        return _layer_norm(x, self.over, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f'{self.normalized_shape[0]}, over={self.over!r}, eps={self.eps}'

    def _load_from_state_dict(self, state, prefix, *args):
        check_kind(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args)


@torch.fx.wrap  # symbolic tracing, as conv-BN fusion does it, cannot look into dtypes and layouts
def _layer_norm(x: Tensor, over: str, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if over == 'CHW':
        return group_norm(x, 1, weight, bias, eps)
    dtype = statistics_dtype(x)
    last = x.to(dtype).permute(0, 2, 3, 1)
    y = F.layer_norm(last, weight.shape, weight.to(dtype), bias.to(dtype), eps).permute(0, 3, 1, 2).to(x.dtype)
    return y.contiguous() if x.is_contiguous() else y
