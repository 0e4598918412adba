"""The batch norms of any torch model, replaced: torchvision's, timm's, one's own. Needs torch only."""

import copy
import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from .compat.torch_internals import has_hooks
from .errors import UserError, did_you_mean, some
from .layers import BNET, NORMS, another_function_allowed, contract_of, link_convs

Norm = Callable[[nn.Module], nn.Module | None]


@dataclass
class ConvertReport:
    """What :func:`convert_norms` did; printed, it says so in a few lines.

    Args:
        converted: class of the new norm by name of the module.
        changed: those of them that are another function than the batch norm was.
        kept: why a batch norm was left as it is, by name.
        unlinked: CBN layers that are not right behind a convolution among the children of their module.
    """

    converted: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    unlinked: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ' or '.join(sorted(set(self.converted.values())))
        lines = [f'{len(self.converted)} of {len(self.converted) + len(self.kept)} batch norms are {kinds} now']
        if self.changed:
            lines.append(f'another function than before, to be trained: {some(self.changed)}')
        lines += [f'kept {name}: {why}' for name, why in self.kept.items()]
        if self.unlinked:
            lines.append(f'not right behind a convolution, which CBN needs: {some(self.unlinked)}')
        return '\n'.join(lines)


def convert_norms(model: nn.Module, norm: str | Norm, where: str = '') -> ConvertReport:
    """Replace the batch norms of a model, in place, by norms with their weights and statistics.

    In eval mode the model computes the same as before, to rounding: each new norm is compared with its batch norm, on
    random numbers in float64, before anything is replaced. So train on, or fine-tune. A batch norm with an activation
    inside (timm's) becomes a ``Sequential`` of the new norm and that.

    Convert before an optimizer gets the parameters, and before ``DistributedDataParallel``. A ``SyncBatchNorm`` stays
    synchronized: the batch norm inside the new norm becomes one.

    Args:
        model: any module that has batch norms of maps ``(N, C, H, W)``.
        norm: ``'bnet5'`` for BNET with 5 x 5 kernels, ``'bnet3'``, ..., or a class of
            :data:`mmdet_norms.layers.NORMS` in lower case, such as ``'an'``. Or a function that takes a batch norm and
            returns what is to stand in its place: ``lambda bn: nn.GroupNorm(32, bn.num_features)``. That gets what fits
            of its weights; None leaves the batch norm.
        where: regular expression; only batch norms in whose name it is found: ``r'layer4.*bn3$'``. Default: all.

    Raises:
        UserError: an unknown name; a norm, chosen by name, that cannot be the function of batch norm; no batch norm
            that could be replaced; a model in ``DistributedDataParallel``. The model is as it was then.

    Example::

        model = torchvision.models.resnet50(weights='DEFAULT')
        print(convert_norms(model, 'bnet5', where=r'bn3$'))  # the last norm of each block, as in the paper
    """
    build = _by_name(norm) if isinstance(norm, str) else norm
    if not callable(build):
        raise UserError(f"norm={norm!r} must be a name, such as 'bnet5', or a function of a batch norm")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UserError('convert_norms() takes the model that DistributedDataParallel is to get, not what it returned')
    report, found, new = ConvertReport(), list(_batch_norms(model)), {}
    for name, _, _, bn in found:
        if id(bn) in new or not re.search(where, name):
            continue
        why = _why_not(bn)
        norm_there = None if why else build(bn)
        if norm_there is None:
            report.kept[name] = why or 'the function returned None'
            continue
        new[id(bn)] = _with_state_of(bn, norm_there)
        report.converted[name] = type(norm_there).__name__
        if not _is_same_function(bn, new[id(bn)]):
            report.changed.append(name)
    if report.changed and isinstance(norm, str):
        raise UserError(
            f'norm={norm!r} cannot be the function of a batch norm, such as {report.changed[0]!r}; to train it anew, '
            f'pass a function: lambda bn: {report.converted[report.changed[0]]}(bn.num_features)'
        )
    if not new:
        kept = ''.join(f'; {name}: {why}' for name, why in report.kept.items())
        raise UserError(f'the model has no batch norm to replace whose name matches where={where!r}{kept}')
    for _, parent, key, bn in found:
        if id(bn) in new:
            parent.register_module(key, new[id(bn)])
    if 'CBN' in report.converted.values():
        report.unlinked = link_convs(model)
    return report


def _by_name(name: str) -> Norm:
    known = {cls.__name__.lower(): cls for cls in NORMS.values() if _parameters(cls)[0] == 'num_features'}
    with_size = re.fullmatch(r'bnet(\d+)', name)
    cls = BNET if with_size else known.get(name)
    if cls is None:
        known = ['bnet3', 'bnet5', 'bnet7', *sorted(key for key, cls in known.items() if not _is_of_each_image(cls))]
        raise UserError(f'norm={name!r} is unknown{did_you_mean(name, known)}; choose one of: {", ".join(known)}')
    if _is_of_each_image(cls):  # before it says that its groups do not fit
        raise UserError(
            f'norm={name!r} cannot be the function of a batch norm; to train it anew, pass a function: '
            f'lambda bn: {cls.__name__}(bn.num_features)'
        )
    options = dict(kernel_size=int(with_size[1])) if with_size else {}

    def build(bn: nn.Module) -> nn.Module:
        shared = {key: getattr(bn, key) for key in ('eps', 'momentum') if key in _parameters(cls)}
        return cls(bn.num_features, **shared, **options)

    return build


def _is_of_each_image(cls: type) -> bool:
    loads = contract_of(cls).loads
    return 'affine' in loads and 'BN' not in loads


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.__init__).parameters)[1:]


def _batch_norms(module: nn.Module, path: str = '') -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Name, parent and key of each batch norm, and itself; not of those that are part of a norm of this package."""
    for key, child in module._modules.items():
        name = f'{path}.{key}' if path else key
        if isinstance(child, tuple(NORMS.values())) or child is None:
            continue
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            yield name, module, key, child
        else:
            yield from _batch_norms(child, name)


def _why_not(bn: nn.Module) -> str:
    """Why a batch norm stays; nothing if it need not."""
    if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return f'{type(bn).__name__} is not of maps (N, C, H, W)'
    if bn.running_mean is None or not bn.track_running_stats:
        return 'it has no running statistics'
    if parametrize.is_parametrized(bn):
        return 'its weight is parametrized'
    if has_hooks(bn) or 'forward' in vars(bn):
        return 'somebody has put hooks or another forward() on it'
    return ''


def _with_state_of(bn: nn.Module, norm: nn.Module) -> nn.Module:
    """What is to stand in the place of ``bn``: ``norm`` with its state, and what it does after normalizing."""
    state = {key: value for key, value in bn.state_dict().items() if '.' not in key}
    if not bn.affine:
        state |= dict(weight=torch.ones_like(bn.running_mean), bias=torch.zeros_like(bn.running_mean))
    norm.to(bn.running_mean)
    if not isinstance(norm, tuple(NORMS.values())):
        own = norm.state_dict()
        state = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    with another_function_allowed(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        norm.load_state_dict(state, strict=False)
    for name, parameter in norm.named_parameters():
        like = bn.bias if name.endswith('bias') else bn.weight
        parameter.requires_grad_(like is None or like.requires_grad)
    if isinstance(bn, nn.SyncBatchNorm):
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm, bn.process_group)
    rest = list(bn.named_children())  # timm's: what drops values, and the activation
    return (nn.Sequential(OrderedDict([('norm', norm), *rest])) if rest else norm).train(bn.training)


@torch.no_grad()
def _is_same_function(bn: nn.Module, norm: nn.Module) -> bool:
    """Whether both compute the same in eval mode, of random numbers in float64. True for what has no values (meta)."""
    if bn.running_mean.is_meta:
        return True
    group = getattr(bn, 'process_group', None)  # cannot be copied
    bn, norm = (copy.deepcopy(module, {id(group): group}).cpu().double().eval() for module in (bn, norm))
    x = torch.randn(2, bn.num_features, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * bn.running_var.sqrt().view(-1, 1, 1) + bn.running_mean.view(-1, 1, 1)
    y = bn(x)
    return torch.allclose(y, norm(x), rtol=1e-6, atol=1e-6 * y.abs().max().item())
