"""How tune mode computes: a convolution and the norm behind it, as one convolution with another weight."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..compat.torch_internals import is_functorch_active
from ..compat.torch_versions import autocast_is_on, is_compiling
from ..kernels.depthwise import normalize_and_convolve
from ..layers import BNET, FrozenBN
from ..layers._contract import contract_of
from ..layers._watched import is_watched

# mmdet's, torchvision's and detectron2's; and the one of mmcv's compiled ops. No common base class.
_FROZEN_NAME, _SYNC_NAME = 'FrozenBatchNorm2d', 'SyncBatchNorm'


def batch_norm_in(norm: nn.Module) -> nn.Module | None:
    """The batch norm that a norm is or has; None: neither."""
    bn = getattr(norm, contract_of(norm).batch_norm or '', norm)
    known = isinstance(bn, (_BatchNorm, FrozenBN)) or type(bn).__name__ in (_FROZEN_NAME, _SYNC_NAME)
    return bn if known else None


def is_fixed(norm: nn.Module) -> bool:
    """Whether a norm that is or has a batch norm would use its running statistics now."""
    bn = batch_norm_in(norm)
    return not bn.training or isinstance(bn, FrozenBN) or type(bn).__name__ == _FROZEN_NAME


class Pair:
    """A convolution and the norm behind it, which from now on are computed as one where that is possible."""

    def __init__(self, model: nn.Module, norm: nn.Module, norm_name: str, conv: nn.Module, conv_name: str):
        self.model, self.norm, self.names = model, norm, (norm_name, conv_name)
        self.places = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is norm]
        self.done = False  # the convolution has done the norm's part of what it computed last
        for module, mixin in ((conv, _TunedConv), (norm, _TunedBNET if isinstance(norm, BNET) else _TunedNorm)):
            module.__class__ = _class(mixin, type(module))
            module._tune = self

    def applies_to(self, conv: nn.Module) -> bool:
        """Whether the convolution does the norm's part of what it computes now."""
        if self.take():
            raise RuntimeError(
                'tune mode computed {} as part of {}, whose output then went elsewhere, in a forward that could not be '
                'traced: train this model without tune mode'.format(*self.names)
            )
        norm = self.norm
        return (
            self.model.training
            and is_fixed(norm)
            and all(parent._modules.get(key) is norm for parent, key in self.places)
            and not any(is_watched(module) for module in (conv, norm, batch_norm_in(norm)))
        )

    def take(self) -> bool:
        """Whether it did that of what it computed last. Once."""
        done, self.done = self.done, False
        return done


def undo_tune_mode(model: nn.Module) -> None:
    """Make a model plain again after :func:`.tune_mode`; a plain one stays as it is."""
    for module in model.modules():
        if isinstance(module, _Tuned):
            del module._tune
            module.__class__ = module._plain


class _Tuned:
    """Mixin of the classes that modules of a pair have for the time being."""

    _plain: type[nn.Module]
    _tune: Pair

    def __reduce_ex__(self, protocol):
        """Copies are plain, because the other module of the pair need not be copied with this one."""
        _, (_, *args), state, *rest = super().__reduce_ex__(protocol)
        return _new, (self._plain, *args), {k: v for k, v in state.items() if k != '_tune'}, *rest


def _new(cls: type, *args) -> object:
    return cls.__new__(cls, *args)


@functools.cache
def _class(mixin: type, plain: type) -> type:
    return type(plain.__name__, (mixin, plain), dict(_plain=plain, __module__=plain.__module__, __doc__=plain.__doc__))


class _TunedConv(_Tuned):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        pair = self._tune
        if not pair.applies_to(self):
            return super().forward(x, *args, **kwargs)
        scale, shift = _affine(self.bias, batch_norm_in(pair.norm), self.weight.dtype)
        if self._is_one_call(x):
            y = _ScaledConvolution.apply(x, self.weight, scale, shift.to(x.dtype), self)
        else:
            weight = _times(self.weight, scale, self.groups if self.transposed else None)
            with _parameters_of(self, weight=weight, bias=shift.to(weight.dtype)):
                y = super().forward(x, *args, **kwargs)
        pair.done = True  # last, so that checkpointing may stop a recomputation inside the convolution
        return y

    def _is_one_call(self, x: Tensor) -> bool:
        """Whether the forward is one call of ``torch.convolution``, in eager code without autocast.

        (Under autocast the rounded weight is kept for the backward pass in any case.)
        """
        return (
            self._plain.forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
            and self.padding_mode == 'zeros'
            and not isinstance(self.padding, str)
            and x.dim() == self.weight.dim()
            and x.dtype == self.weight.dtype
            and not autocast_is_on(x.device.type)
            and not is_compiling()
            and not is_functorch_active()
        )


class _TunedNorm(_Tuned):
    def forward(self, x: Tensor) -> Tensor:
        return self._rest(x) if self._tune.take() else super().forward(x)

    def _rest(self, x: Tensor) -> Tensor:
        return x


class _TunedBNET(_TunedNorm):
    def _rest(self, x: Tensor) -> Tensor:
        conv = self.bnconv
        done = None
        if self.training and self._is_as_built():
            mean = torch.zeros_like(conv.bias.detach())  # the kernel's depthwise convolution is faster than torch's
            done = normalize_and_convolve(x, conv.weight, conv.bias, 0.0, mean, mean + 1)
        return conv(x) if done is None else done[0]


def _affine(conv_bias: Tensor | None, bn: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What batch norm does to the output of a convolution, in fp32 or better: scale, and shift with the conv's bias."""
    dtype = torch.promote_types(dtype, torch.float32)
    mean, scale = bn.running_mean.to(dtype), torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    shift = -mean * scale if conv_bias is None else (conv_bias.to(dtype) - mean) * scale
    return scale, shift if bn.bias is None else shift + bn.bias.to(dtype)


def _times(weight: Tensor, scale: Tensor, groups: int | None = None) -> Tensor:
    """Each filter times its number in ``scale`` (C_out,), multiplied in the dtype of that, returned in the weight's.

    Args:
        groups: of a transposed convolution, whose weight is ``(C_in, C_out / groups, ...)``.
    """
    wide, kernel = weight.to(scale.dtype), [1] * (weight.dim() - 2)
    if groups is None:
        return (wide * scale.view(-1, 1, *kernel)).to(weight.dtype)
    by_group = wide.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *kernel)
    return by_group.flatten(0, 1).to(weight.dtype)


class _ScaledConvolution(torch.autograd.Function):
    """``conv(x, scale * weight) + shift``. Multiplies again in the backward pass, so that x is all that is saved."""

    @staticmethod
    def forward(ctx, x, weight, scale, shift, conv):
        ctx.conv = conv.stride, conv.padding, conv.dilation, False, (0,) * len(conv.stride), conv.groups
        ctx.save_for_backward(x, weight, scale)
        return torch.convolution(x, _times(weight, scale), shift, *ctx.conv)

    @staticmethod
    def backward(ctx, grad):  # by operators that can be differentiated again
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_weight, needs_scale, needs_shift, _ = ctx.needs_input_grad
        grad_x, grad_product, grad_shift = torch.ops.aten.convolution_backward(
            grad, x, _times(weight, scale), [len(scale)], *ctx.conv, (needs_x, needs_weight or needs_scale, needs_shift)
        )
        grad_weight = grad_scale = None
        if needs_scale:
            wide = grad_product.to(scale.dtype)
            grad_scale = (wide * weight).flatten(1).sum(1)
        if needs_weight:
            grad_weight = _times(grad_product, scale)
        return grad_x, grad_weight, grad_scale, grad_shift, None


@contextmanager
def _parameters_of(module: nn.Module, **tensors: Tensor) -> Iterator[None]:
    """Inside, ``module`` computes with these in place of its parameters."""
    own = dict(module._parameters)
    module._parameters.update(tensors)
    try:
        yield
    finally:
        module._parameters.update(own)
