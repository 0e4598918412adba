"""Tune mode: train with fixed statistics as if the norm were part of the convolution in front of it."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import fx, nn

from ..deploy.dataflow import Dataflow, may_fold
from ..layers._fold import CannotFoldError
from .together import model_of
from .tuned_modules import Pair, batch_norm_in, is_fixed, undo_tune_mode


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
        groups, active = defaultdict(list), set(self.active)
        for name, kind in self.types.items():
            if name in self.skipped:
                groups['not', kind, f': {self.skipped[name]}'].append(name)
            elif name in active:
                groups['in', kind, ''].append(name)
            else:
                groups['not', kind, ', which uses batch statistics: as ever, until it stops to'].append(name)
        lines = [
            f'{len(self.active)} of {len(self.types)} norms have fixed statistics in training and are computed as part '
            'of their convolutions'
        ]
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

    whose weight is computed from W, :math:`\gamma`, :math:`\beta` and b in each forward; the gradients are theirs. The
    norm's feature map is neither computed nor kept. ``docs/norms.md`` says for which norms, and where.

    The convolution is one whose output, by symbolic tracing, goes to this norm and nowhere else, and which shares no
    weight. Other norms are left as they are, with the reason in the report. Parameters, state dict, running statistics
    and eval mode stay, bit by bit: only the class of the two modules changes, to a subclass of the same name. A copy
    (``deepcopy``, an EMA, pickling) is a plain model.

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
    fixed = {norm for norm in model.modules() if model.training and batch_norm_in(norm) and is_fixed(norm)}
    with _in_training(model):
        dataflow = Dataflow(model)
        for name, norm in dataflow.norms.items():
            report.types[name] = type(norm).__name__
            try:
                conv = _conv_of(norm, name, dataflow, model)
            except CannotFoldError as reason:
                report.skipped[name] = str(reason)
                continue
            report.pairs[name] = dataflow.names[id(conv)]
            if norm in fixed or is_fixed(norm):
                report.active.append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, conv_name in report.pairs.items():
        Pair(model, modules[name], name, modules[conv_name], conv_name)
    return report


@HOOKS.register_module()
class TuneModeHook(Hook):
    """Train in tune mode (:func:`tune_mode`): ``custom_hooks=[dict(type='TuneModeHook')]``, or ``--tune-mode``.

    The log says which norms it covers. Meant for backbones with ``norm_eval=True``, which is mmdet's default. Losses,
    gradients, checkpoints and validation are those without it, up to rounding.
    """

    def before_train(self, runner: Runner) -> None:
        """Called when the weights are loaded and the model is wrapped."""
        report = tune_mode(model_of(runner))
        runner.logger.info(f'Tune mode: {report}')
        if not report.active:
            runner.logger.warning(
                'Tune mode changes nothing here: no norm behind a convolution has fixed statistics in training. It is '
                'for backbones with norm_eval=True or frozen_stages, and for FrozenBN'
            )

    def after_train(self, runner: Runner) -> None:
        """Give the plain model back."""
        undo_tune_mode(model_of(runner))


def _conv_of(norm: nn.Module, name: str, dataflow: Dataflow, model: nn.Module) -> nn.Module:
    """The convolution that computes the norm in tune mode.

    Raises:
        CannotFoldError: none does; says why.
    """
    bn = batch_norm_in(norm)
    if may_fold(norm) and bn is None:
        raise CannotFoldError('it keeps using batch statistics under norm_eval')
    conv = dataflow.conv_of(norm)
    if getattr(bn, 'running_mean', None) is None:
        raise CannotFoldError('it has no running statistics')
    for host, module in model.named_modules():
        if name.startswith(f'{host}.' if host else '') and _is_rewritten(module):
            raise CannotFoldError('its host runs rewritten code, such as that of efficient_conv_bn_eval')
    return conv


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
