"""CenConv: a convolution whose weight is centred. MABN, which subtracts no mean, wants it in front.

As published: ``reference/mabn.py``.
"""

import warnings

import torch
from torch import Tensor, nn

from ..compat.torch_internals import weight_source
from ._numerics import statistics_dtype

_FIX = "write conv_cfg=dict(type='CenConv') beside norm_cfg=dict(type='MABN'), or, without mmdet, a CenConv2d"


class CenConv2d(nn.Conv2d):
    r"""Convolution with a centred weight: ``conv2d(x, W - mean(W), bias)``, the mean per output channel.

    The mean is over ``(C_in / groups, kh, kw)``, so a constant added to all inputs of an output pixel cancels, and the
    outputs need no mean subtracted by the norm behind. The parameter stays uncentred and is centred in each forward,
    gradients included (:math:`dW = dW_c - \overline{dW_c}`): any weights may be loaded, the bias stays as it is.

    Arguments, shapes and state dict are those of ``torch.nn.Conv2d``, N = 0 included. Centring is computed in fp32 (or
    fp64), under autocast too. Tools that read ``weight`` themselves get it uncentred: give them :meth:`to_conv2d`.

    Source: Yan et al., arXiv:2001.06838, section 4.3.
    """

    def centred_weight(self) -> Tensor:
        """The weight in use, in the dtype of the parameter."""
        return _centred(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super()._conv_forward(x, _centred(self.weight), self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # For efficient_conv_bn_eval of mmcv and mmengine, which calls this with the raw weight times a factor per
        # output channel: centring commutes with that.
        return super()._conv_forward(x, _centred(weight), bias)

    @torch.no_grad()
    def to_conv2d(self) -> nn.Conv2d:
        """A plain convolution of the same function, for deployment: the weight is centred once."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            self.weight.device,
            self.weight.dtype,
        )
        conv.weight.copy_(self.centred_weight())
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)


def _centred(weight: Tensor) -> Tensor:
    wide = weight.to(statistics_dtype(weight))
    return (wide - wide.mean((1, 2, 3), keepdim=True)).to(weight.dtype)


class WantsCenConv:
    """Mixin of norms that subtract no mean: says once where the convolution in front does not centre its weight."""

    _conv_checked = False

    def _check_conv(self, x: Tensor) -> None:
        """Warn if ``x``, the first training input that has a gradient, comes from a convolution that does not."""
        if self._conv_checked or x.grad_fn is None:
            return
        self._conv_checked = True
        if hasattr(weight_source(x.grad_fn), 'variable'):  # a parameter, as it is
            warnings.warn(
                f'MABN subtracts no mean, but the convolution in front of it does not centre its weight; {_FIX}',
                stacklevel=3,
            )


def warn_if_uncentred(model: nn.Module) -> list[str]:
    """Warn, once for the whole model, of MABN layers behind a convolution that is no :class:`CenConv2d`.

    A convolution is in front of an MABN if it is the last sibling before it with a weight of convolution shape, as in
    ``ConvModule``, ResNet blocks and ``nn.Sequential``. Layers for which none is found are passed over. The layers
    looked at do not warn again in their first forward.

    Returns:
        Names of the MABN layers, empty if all is well.
    """
    found = []
    for path, module in model.named_modules():
        conv = None
        for name, child in module.named_children():
            if isinstance(child, WantsCenConv):
                if conv is not None and not _norm_first(module):
                    child._conv_checked = True
                    if not isinstance(conv, CenConv2d):
                        found.append(f'{path}.{name}'.lstrip('.'))
                conv = None
            elif getattr(child, 'weight', None) is not None and child.weight.dim() > 2:
                conv = child
    if found:
        more = f' and {len(found) - 5} more' if len(found) > 5 else ''
        warnings.warn(
            f'MABN subtracts no mean, but the convolutions in front of {", ".join(found[:5])}{more} do not '
            f'centre their weights; {_FIX}',
            stacklevel=2,
        )
    return found


def _norm_first(module: nn.Module) -> bool:
    """Whether it is a ConvModule that applies its norm before its convolution."""
    order = getattr(module, 'order', ())
    return 'norm' in order and 'conv' in order and order.index('norm') < order.index('conv')
