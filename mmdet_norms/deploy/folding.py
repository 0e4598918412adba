"""``fuse(model)``: fold every norm that can be folded."""

import copy
from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from ..layers._fold import CannotFoldError, Folded
from .dataflow import Dataflow, can, fold, is_observed
from .residual import join_ends


@dataclass
class FuseReport:
    """What :func:`fuse` did; ``str(report)`` is a text for people.

    Args:
        folded: norm -> convolution that it is part of now; by names in the model.
        reduced: norm -> type of the module that is left of it (of a BNET, the depthwise convolution).
        kept: norm -> why it is as it was.
        types: type of each norm.
        joined: residual blocks whose sum and ReLU the depthwise convolution of their last norm computes, too.
        parameters: number of parameter values before and after.
        buffers: number of buffer values before and after.
    """

    folded: dict[str, str] = field(default_factory=dict)
    reduced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    joined: list[str] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    buffers: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        lines = [
            f'{len(self.folded)} of {len(self.types)} norms are part of their convolutions, '
            f'{len(self.reduced)} reduced to what depends on the input, {len(self.kept)} kept',
            f'parameters {self.parameters[0]:,} -> {self.parameters[1]:,}, buffers {self.buffers[0]:,} -> '
            f'{self.buffers[1]:,} values',
        ]
        groups = defaultdict(list)
        for name in self.folded:
            groups['folded', self.types[name], ''].append(name)
        for name, rest in self.reduced.items():
            groups['reduced', self.types[name], f' to {rest}'].append(name)
        for name, reason in self.kept.items():
            groups['kept', self.types[name], f': {reason}'].append(name)
        for (what, kind, why), names in groups.items():
            lines.append(f'  {what} {len(names)} {kind} ({_some(names)}){why}')
        if self.joined:
            lines.append(f'  {len(self.joined)} residual blocks end in one pass ({_some(self.joined)})')
        return '\n'.join(lines)


def _some(names: list[str]) -> str:
    return f'{names[0]}{", ..." if len(names) > 1 else ""}'


def fuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model for inference: norms that are affine maps in eval mode become part of the convolution in front.

    ======================================  ============================================================================
    norm                                    what remains
    ======================================  ============================================================================
    BN, SyncBN, FrozenBN, GhostBN, CBN,     nothing; the convolution has their scale, and their shift as bias
    BRN, MABN
    BNET                                    the depthwise convolution; its batch norm is in the convolution in front.
                                            At the end of a residual block it adds the shortcut and applies ReLU, too
    AN                                      moments, attention and one scale-shift pass; statistics are in its matrices
    GN, LN2d, SN, IN                        all of it: their statistics come from the input
    ======================================  ============================================================================

    A :class:`~mmdet_norms.layers.CenConv2d` becomes a plain convolution with the centred weight.

    **Which convolution.** The forward of the model, or of the largest parts of it that can be traced, is traced
    symbolically (``torch.fx``). A norm is folded if every call of it gets the output of one convolution and nothing
    else uses that output. So it makes no difference in which order or container modules are registered, and these stay
    as they are, with the reason in the report: a norm behind something else, or shared by several convolutions; a
    convolution that feeds several norms (heads shared over levels with a norm per level) or anything besides the norm;
    modules with forward hooks; weights shared with another module; parts that cannot be traced. Below a forward that
    cannot be traced (it asks for sizes or values), the parts are taken to be called as they are written, with default
    arguments: it is not seen if such a host reaches into a part, or calls the layers of a ``Sequential`` one by one
    and takes something from between a convolution and its norm.

    A norm that is gone is a :class:`Folded` identity under the same name, so hosts find ``norm1`` and
    ``ConvModule.norm``. The result computes the same numbers up to rounding (weights are multiplied in float64).
    Fusing again changes nothing. The result does not train: parameters need no gradient, ``train()`` raises a
    ``RuntimeError``, and so does loading the weights of an unfused model.

    To save and load: :func:`save_fused` and :func:`load_fused`, or ``fuse(build(cfg)).load_state_dict(...)``, since the
    structure depends on the config alone.

    Args:
        model: any module. Running statistics are used, whichever mode it is in.
        inplace: change ``model`` itself instead of a copy. Default False.

    Returns:
        The fused model in eval mode. Its ``fuse_report`` is a :class:`FuseReport`.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'fuse(model) takes a torch module, not {type(model).__name__}: build the model first')
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    _end_efficient_eval(model)
    report, sizes = FuseReport(), _sizes(model)
    dataflow = Dataflow(model)
    for name, norm in dataflow.norms.items():
        _fold(norm, name, dataflow, report)
    for conv in list(model.modules()):
        if hasattr(conv, 'to_conv2d') and not (is_observed(conv) or id(conv) in dataflow.touched):
            dataflow.replace(conv, conv.to_conv2d())
    model.requires_grad_(False)
    report.joined = join_ends(model)
    report.parameters, report.buffers = zip(sizes, _sizes(model))
    if report.folded or report.reduced or not hasattr(model, 'fuse_report'):
        model.fuse_report = report
    return model


def _sizes(model: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())


def _fold(norm: nn.Module, name: str, dataflow: Dataflow, report: FuseReport) -> None:
    report.types[name] = type(norm).__name__
    try:
        if can(norm, 'folded'):
            rest = _fold_alone(norm, dataflow)
        else:
            conv = dataflow.conv_of(norm)
            target = conv.to_conv2d() if hasattr(conv, 'to_conv2d') else conv
            rest = fold(norm, target)
            if target is not conv:
                dataflow.replace(conv, target)
    except CannotFoldError as reason:
        report.kept[name] = str(reason)
        return
    if rest is None:
        rest = Folded(type(norm).__name__)
        report.folded[name] = dataflow.names[id(target)]
    else:
        report.reduced[name] = type(rest).__name__
    dataflow.replace(norm, rest)


def _fold_alone(norm: nn.Module, dataflow: Dataflow) -> nn.Module:
    if norm is dataflow.model:
        raise CannotFoldError('it is the whole model')
    if is_observed(norm):
        raise CannotFoldError('a hook watches it')
    return norm.folded()


def _end_efficient_eval(model: nn.Module) -> None:
    """Undo mmcv's and mmengine's efficient_conv_bn_eval, which hides convolutions and batch norms in one call."""
    for module in model.modules():
        if getattr(module, 'efficient_conv_bn_eval_forward', None) is not None:
            module.efficient_conv_bn_eval_forward = None
        graph = getattr(getattr(vars(module).get('forward'), '__self__', None), 'graph', None)
        if graph is not None and any('efficient_conv_bn_eval' in node.name for node in graph.nodes):
            del module.forward
