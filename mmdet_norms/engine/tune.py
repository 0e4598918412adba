"""Tune mode: train with fixed statistics as if the norm were part of the convolution in front of it."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..compat.torch_internals import is_functorch_active
from ..compat.torch_versions import autocast_is_on, is_compiling
from ..deploy.dataflow import Dataflow, may_fold
from ..kernels.depthwise import is_supported, normalize_and_convolve
from ..layers import BNET, BRN, FrozenBN, GhostBN
from ..layers._fold import CannotFoldError
from ..layers._watched import is_watched

# mmdet's, torchvision's and detectron2's; and the one of mmcv's compiled ops. No common base class.
_FROZEN_NAME, _SYNC_NAME = 'FrozenBatchNorm2d', 'SyncBatchNorm'
_AS_TORCH = tuple(cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))  # nothing but _conv_forward


@dataclass
class TuneReport:
    """What :func:`tune_mode` found; ``str(report)`` is a text for people.

    Args:
        pairs: norm -> the convolution in front of it, by names in the model: those that tune mode serves.
        active: norms among them whose statistics are fixed in training: now, or when ``model.train()`` was called.
        skipped: norm -> why it stays as it is.
        types: type of each norm.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f'{len(self.active)} of {len(self.types)} norms have fixed statistics in training and are computed as part '
            'of their convolutions'
        ]
        groups, active = defaultdict(list), set(self.active)
        for name, kind in self.types.items():
            if name in self.skipped:
                groups['not', kind, f': {self.skipped[name]}'].append(name)
            elif name in active:
                groups['in', kind, ''].append(name)
            else:
                groups['not', kind, ', which uses batch statistics: as ever, until it stops to'].append(name)
        for (what, kind, why), names in groups.items():
            more = ', ...' if len(names) > 1 else ''
            lines.append(f'  {what} tune mode: {len(names)} {kind} ({names[0]}{more}){why}')
        return '\n'.join(lines)


def tune_mode(model: nn.Module) -> TuneReport:
    r"""From now on, norms with fixed statistics are computed as part of their convolutions while ``model`` trains.

    With running mean :math:`\mu` and variance :math:`\sigma^2` that training does not move, convolution and batch norm
    are one convolution,

    .. math::
        \mathrm{BN}(W * x + b) = (s W) * x + \beta + (b - \mu)\, s, \qquad s = \gamma / \sqrt{\sigma^2 + \epsilon},

    whose weight is computed from W, :math:`\gamma`, :math:`\beta` and b in each forward; the gradients are theirs.
    Nothing of the size of a feature map is computed or kept for the norm: batch norm keeps its input, and passes over
    it four to five times. Instead there are eight passes over W. Under autocast, and for convolutions that are more
    than one call of torch's (padding modes, subclasses, transposed), :math:`s W` is kept for the backward pass.

    ==========================================  ======================================================================
    norm                                        in tune mode
    ==========================================  ======================================================================
    BN, GhostBN, SyncBN, BRN                    where they are in eval mode while the model trains: ``norm_eval=True``
                                                (backbones), ``frozen_stages``; asked in each forward
    FrozenBN, FrozenBatchNorm2d                 always
    BNET                                        as BN; its depthwise convolution remains
    CBN, MABN, AN, GN, LN2d, SN, IN             never: they use statistics of the input
    ==========================================  ======================================================================

    **Which convolution.** As for :func:`mmdet_norms.fuse`: one whose output, by symbolic tracing, goes to this norm and
    nowhere else, and which shares no weight. Any subclass whose forward is linear in its weight per output channel
    serves: a :class:`~mmdet_norms.layers.CenConv2d` centres the scaled weight. Others are left as they are, with the
    reason in the report. A pair is also computed plainly while a hook watches it or while the norm is not in its place
    (SyncBN conversion, fusion).

    **What stays.** Parameters, buffers, names, state dict, running statistics, eval mode bit by bit: only the class of
    the two modules changes, to a subclass of the same name. A copy (``deepcopy``, an EMA, pickling) is a plain model.
    Results in training are equal up to rounding. Under autocast and in half precision :math:`s W` is computed in fp32
    and then rounded, as the convolution would round W.

    Args:
        model: any module, e.g. a detector; its mode does not matter. Not the wrapper of distributed training but what
            is in it. Calling it again looks at the model afresh.

    Returns:
        The report. :func:`undo_tune_mode` makes the model plain again.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: the model was fused for inference; later, from a forward: the output of a convolution did not go
            to its norm, in code that could not be traced.

    Source: You et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", ICLR 2024, arXiv:2305.11624.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'tune_mode(model) takes a torch module, not {type(model).__name__}: build the model first')
    undo_tune_mode(model)
    report = TuneReport()
    # Somebody may have put norms into eval mode one by one, without a backbone that does it in its train().
    fixed = {norm for norm in model.modules() if model.training and _has_batch_norm(norm) and _is_fixed(norm)}
    with _in_training(model):
        dataflow = Dataflow(model)
        rewritten = [name for name, module in model.named_modules() if _is_rewritten(module)]
        for name, norm in dataflow.norms.items():
            report.types[name] = type(norm).__name__
            try:
                conv = _conv_of(norm, name, dataflow, rewritten)
            except CannotFoldError as reason:
                report.skipped[name] = str(reason)
                continue
            report.pairs[name] = dataflow.names[id(conv)]
            if norm in fixed or _is_fixed(norm):
                report.active.append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, conv_name in report.pairs.items():
        norm = modules[name]
        pair = _Pair(model, norm, name, conv_name)
        _change(modules[conv_name], _TunedConv, pair)
        _change(norm, _TunedBNET if isinstance(norm, BNET) else _TunedNorm, pair)
    return report


def undo_tune_mode(model: nn.Module) -> None:
    """Make a model plain again after :func:`tune_mode`; a plain one stays as it is."""
    for module in model.modules():
        if isinstance(module, _Tuned):
            del module._tune
            module.__class__ = module._plain


@HOOKS.register_module()
class TuneModeHook(Hook):
    """Train in tune mode (:func:`tune_mode`): ``custom_hooks=[dict(type='TuneModeHook')]``, or ``--tune-mode``.

    The log says which norms it covers. Meant for backbones with ``norm_eval=True``, which is mmdet's default. Losses,
    gradients, checkpoints and validation are those without it, up to rounding.
    """

    def before_train(self, runner: Runner) -> None:
        """Called when the weights are loaded and the model is wrapped."""
        report = tune_mode(_model(runner))
        runner.logger.info(f'Tune mode: {report}')
        if not report.active:
            runner.logger.warning(
                'Tune mode changes nothing here: no norm behind a convolution has fixed statistics in training. It is '
                'for backbones with norm_eval=True or frozen_stages, and for FrozenBN'
            )

    def after_train(self, runner: Runner) -> None:
        """Give the plain model back."""
        undo_tune_mode(_model(runner))


def _model(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


# --------------------------------------------------------------------------------------------------- which pairs


def _conv_of(norm: nn.Module, name: str, dataflow: Dataflow, rewritten: list[str]) -> nn.Module:
    if may_fold(norm) and not _has_batch_norm(norm):
        raise CannotFoldError('it keeps using batch statistics under norm_eval')
    conv = dataflow.conv_of(norm)
    if getattr(_batch_norm_in(norm), 'running_mean', None) is None:
        raise CannotFoldError('it has no running statistics')
    if any(name.startswith(f'{host}.' if host else '') for host in rewritten):
        raise CannotFoldError('its host runs rewritten code, such as that of efficient_conv_bn_eval')
    return conv


def _batch_norm_in(norm: nn.Module) -> nn.Module:
    return norm.bn if isinstance(norm, (BNET, BRN, GhostBN)) else norm


def _has_batch_norm(norm: nn.Module) -> bool:
    bn = _batch_norm_in(norm)
    return isinstance(bn, (_BatchNorm, FrozenBN)) or type(bn).__name__ in (_FROZEN_NAME, _SYNC_NAME)


def _is_fixed(norm: nn.Module) -> bool:
    """Whether the norm would use its running statistics now."""
    bn = _batch_norm_in(norm)
    return not bn.training or isinstance(bn, FrozenBN) or type(bn).__name__ == _FROZEN_NAME


def _is_rewritten(module: nn.Module) -> bool:
    return isinstance(getattr(vars(module).get('forward'), '__self__', None), fx.GraphModule)


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# --------------------------------------------------------------------------------------------------- computing


class _Pair:
    """What a convolution and its norm know of each other."""

    def __init__(self, model: nn.Module, norm: nn.Module, norm_name: str, conv_name: str):
        self.model, self.norm = model, norm
        self.norm_name, self.conv_name = norm_name, conv_name
        self.places = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is norm]
        self.done = False  # the convolution has done the norm's part of what it computed last

    def applies_to(self, conv: nn.Module) -> bool:
        if self.done:
            self.done = False
            raise RuntimeError(
                f'tune mode computed {self.norm_name} as part of {self.conv_name}, whose output then went elsewhere, '
                'in a forward that could not be traced: train this model without tune mode'
            )
        norm = self.norm
        return (
            self.model.training
            and _is_fixed(norm)
            and all(parent._modules.get(key) is norm for parent, key in self.places)
            and not any(is_watched(module) for module in (conv, norm, _batch_norm_in(norm)))
        )

    def take(self) -> bool:
        done, self.done = self.done, False
        return done


class _Tuned:
    """Mixin of the classes that modules of a pair have for the time being."""

    _plain: type[nn.Module]
    _tune: _Pair

    def __reduce_ex__(self, protocol):
        """Copies are plain, because the other module of the pair need not be copied with this one."""
        _, (_, *args), state, *rest = super().__reduce_ex__(protocol)
        return _new, (self._plain, *args), {k: v for k, v in state.items() if k != '_tune'}, *rest


def _new(cls: type, *args) -> object:
    return cls.__new__(cls, *args)


class _TunedConv(_Tuned):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        pair = self._tune
        if not pair.applies_to(self):
            return super().forward(x, *args, **kwargs)
        scale, shift = _affine(self.bias, _batch_norm_in(pair.norm), self.weight.dtype)
        shift = shift.to(self.weight.dtype)
        if self._plain.forward not in _AS_TORCH:
            weight = _times(self.weight, scale, self.groups if self.transposed else None)
            with _parameters_of(self, weight=weight, bias=shift):
                y = super().forward(x, *args, **kwargs)
        elif self._is_simple(x):
            y = _ScaledConvolution.apply(x, self.weight, scale, shift, self)
        else:
            y = self._conv_forward(x, _times(self.weight, scale), shift)
        pair.done = True  # last, so that checkpointing may stop a recomputation inside the convolution
        return y

    def _is_simple(self, x: Tensor) -> bool:
        """Whether the forward is one call of ``torch.convolution``, in eager code without autocast.

        (Under autocast the rounded weight is kept for the backward pass in any case.)
        """
        return (
            self.padding_mode == 'zeros'
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
        taps = self.bnconv
        if self.training and self._is_as_built() and is_supported(x, *taps.parameters()):
            mean = torch.zeros_like(taps.bias.detach())  # the kernel's depthwise convolution is faster than torch's
            return normalize_and_convolve(x, taps.weight, taps.bias, 0.0, mean, mean + 1)[0]
        return taps(x)


@functools.cache
def _class(mixin: type, plain: type) -> type:
    return type(plain.__name__, (mixin, plain), dict(_plain=plain, __module__=plain.__module__, __doc__=plain.__doc__))


def _change(module: nn.Module, mixin: type, pair: _Pair) -> None:
    module.__class__ = _class(mixin, type(module))
    module._tune = pair


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
