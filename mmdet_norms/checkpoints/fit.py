"""Whether weights fit a model: asked once, before anything runs, answered as data and in words.

The layers say what they take: a norm that loads another norm's state as the identical function reports nothing missing.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from ..layers import AnotherFunctionWarning, another_function_allowed
from .report import list_keys

# Buffers that count or remember training, which start anew without changing what a model computes.
_REMEMBERED = re.compile(r'(^|\.)(?!weight|bias|running_)[^.]*$')
_MOST = 12  # lines of each list that a message shows


@dataclass(frozen=True)
class Fit:
    """How weights fit a model; true if nothing stands against using them.

    Args:
        missing: weights that the model has and would start anew.
        left_over: weights that the model would not use, though it has the part that they belong to.
        mismatched: key -> (shape of the weights, of the model).
        refused: what layers said besides.
        spoilt: weights that are no numbers to compute with: NaN, infinite, or of another kind than the model's.
        unused: whole parts that the model lacks (a classifier, a mask head): nothing against it, but worth a word.
        anew: weights, counters and memories of training that the model has and may start anew.
        forgotten: counters and memories of training that the model has no place for.
        adopted: weights that take another norm's, as the identical function.
        total: number of weights that the model has.
    """

    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    spoilt: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    total: int = 0

    def __bool__(self) -> bool:
        return not (self.missing or self.left_over or self.mismatched or self.refused or self.spoilt)

    @property
    def started_anew(self) -> int:
        """The number of the model's weights that would not come from the checkpoint."""
        return len(self.missing) + len(self.mismatched)

    def explain(self) -> str:
        """What stands against it, a list for each kind."""
        shapes = {
            key: f': {have} in the checkpoint, {want} in the model' for key, (have, want) in self.mismatched.items()
        }
        parts = [
            (self.missing, f'{len(self.missing)} weights of the model are not in the checkpoint:', None),
            (self.left_over, f'{len(self.left_over)} weights of the checkpoint have no place in the model:', None),
            (self.mismatched, f'{len(self.mismatched)} have another shape:', shapes),
            (
                self.spoilt,
                f'{len(self.spoilt)} cannot be computed with (an earlier checkpoint may be whole):',
                self.spoilt,
            ),
        ]
        lines = [line for keys, title, remarks in parts if keys for line in (title, _shorten(list_keys(keys, remarks)))]
        said = list(dict.fromkeys(self.refused))
        return '\n'.join(lines + said[:3] + ([f'... and {len(said) - 3} more such norms'] if said[3:] else []))

    def record(self) -> dict:
        """For results.json: how much of the model did not come from the checkpoint."""
        return dict(
            weights=self.total,
            started_anew=self.started_anew,
            missing=len(self.missing),
            other_shape=len(self.mismatched),
            another_function=len(self.refused),
            spoilt=len(self.spoilt),
            left_over=len(self.left_over),
            examples=[*self.missing[:3], *list(self.mismatched)[:3], *self.left_over[:3]],
        )


def fit(model: nn.Module, state: Mapping[str, Tensor], pretrained: bool = False, exact: bool = False) -> Fit:
    """Compare weights with a model, by letting its layers load them; best on the meta device, where nothing is copied.

    Args:
        model: any module. Off the meta device, what fits is loaded.
        state: weights by name. Not changed.
        pretrained: as a start for a part of a detector. What the pretrained network lacked as a whole (offsets of
            deformable convolutions, attention blocks) may start anew; its blocks, convolutions and norms may not.
        exact: as the state to go on from: no part may be left over.
    """
    missing, unexpected, errors = _load(model, state)
    own = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    weights = [key for key in own if key in parameters or not _REMEMBERED.search(key)]
    absent = list(dict.fromkeys(missing))
    missing = [key for key in absent if key in parameters or not _REMEMBERED.search(key)]
    if pretrained:
        missing = [key for key in missing if not _is_an_addition(key, missing, model)]
    adopted = [key for key in weights if key not in state and key not in absent]
    of_another = {key.rpartition('.')[0] for key in adopted}
    # torch's batch norm says nothing of a counter that weights of old have not
    silent = [
        key for key in own if key not in state and key not in adopted and key.rpartition('.')[0] not in of_another
    ]
    anew = [key for key in dict.fromkeys([*absent, *silent]) if key not in missing]
    mismatched, refused = {}, []
    for error in errors:
        key = _mismatched_key(error)
        if key in own and key in state:
            mismatched[key] = (tuple(state[key].shape), tuple(own[key].shape))
        else:
            refused.append(error.strip())
    counted = {key for key in unexpected if not _REMEMBERED.search(key) or _is_weight(state.get(key))}
    left_over, unused = [], []
    for key in dict.fromkeys(unexpected):
        if key in counted:
            (unused if not exact and _is_of_an_absent_part(key, model) else left_over).append(key)
    forgotten = [key for key in dict.fromkeys(unexpected) if key not in counted]
    there = [key for key in weights if key in state and key not in mismatched]
    spoilt = {key: why for key in there if (why := _spoilt(state[key], own[key]))}
    return Fit(missing, left_over, mismatched, refused, spoilt, unused, anew, forgotten, adopted, len(weights))


def _spoilt(value: Tensor, wanted: Tensor) -> str | None:
    """Why the numbers of a weight cannot be the model's, though copying them would give no error."""
    if wanted.is_floating_point() and not value.is_floating_point():
        return f': {str(value.dtype).removeprefix("torch.")} in the checkpoint'
    if value.layout != torch.strided:
        return f': {str(value.layout).removeprefix("torch.")} in the checkpoint'
    if wanted.is_floating_point() and value.device.type != 'meta' and not torch.isfinite(value.float()).all():
        return ': NaN or infinite'
    return None


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Missing and unexpected keys, and errors, as mmengine's loader collects them, which only logs them."""
    missing, unexpected, errors = [], [], []
    metadata = getattr(state, '_metadata', None) or {}

    def load(module: nn.Module, local: dict, prefix: str) -> None:
        if is_model_wrapper(module) or isinstance(module, BaseTTAModel):
            module = module.module
        module._load_from_state_dict(local, prefix, metadata.get(prefix[:-1], {}), True, missing, unexpected, errors)
        for name, child in module._modules.items():
            if child is not None:
                inside = prefix + name + '.'
                load(child, {key: value for key, value in local.items() if key.startswith(inside)}, inside)

    # Of the warnings (a copy to the meta device does nothing, windows start anew) those that stand against it.
    with warnings.catch_warnings(record=True) as caught, another_function_allowed():
        warnings.simplefilter('always')
        try:
            with torch.no_grad():
                load(model, dict(state), '')
        except RuntimeError as error:  # of layers that refuse rather than report
            errors.append(str(error))
    errors += [str(warning.message) for warning in caught if issubclass(warning.category, AnotherFunctionWarning)]
    return missing, unexpected, errors


def _mismatched_key(error: str) -> str | None:
    found = re.match(r'\s*size mismatch for (\S+?):', error)
    return found[1] if found else None


def _is_weight(value: object) -> bool:
    """Whether what is left over may be learned: counters are whole numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _is_of_an_absent_part(key: str, model: nn.Module) -> bool:
    """Whether a key is of a part that the model lacks as a whole: ``fc`` of a classifier, ``roi_head.mask_head``."""
    name, _, rest = key.partition('.')
    child = model._modules.get(name)
    if child is None:
        return bool(rest)
    inner = rest.partition('.')[0]
    return name == 'roi_head' and inner.endswith('_head') and child._modules.get(inner) is None


def _is_an_addition(key: str, missing: Iterable[str], model: nn.Module) -> bool:
    """Whether a missing key is of a child that was added to a block that is there otherwise.

    A child of a Sequential is no addition: a block more is another depth.
    """
    absent = set(missing)
    path = key.split('.')[:-1]
    parent = model
    for depth, name in enumerate(path):
        child = parent._modules.get(name)
        prefix = '.'.join(path[: depth + 1]) + '.'
        whole = all(prefix + inner in absent for inner, _ in child.named_parameters())
        if whole and not isinstance(parent, (nn.Sequential, nn.ModuleList)):
            return not _is_basic(child)
        parent = child
    return hasattr(parent, 'running_mean') or hasattr(parent, 'bn')  # parts of a norm that has the rest


def _is_basic(module: nn.Module) -> bool:
    """Whether a module is a convolution or a norm itself, or a stack of blocks: pretraining has those."""
    return isinstance(module, (nn.Sequential, nn.ModuleList)) or not any(True for _ in module.children())


def _shorten(lines: str) -> str:
    every = lines.split('\n')
    return '\n'.join(every[:_MOST] + ([f'  ... and {len(every) - _MOST} more lines'] if every[_MOST:] else []))


def weights_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, dict]]:
    """Every module of a model with pretrained weights of its own: its name, itself, and the init_cfg that says so."""
    for name, part in module.named_modules():
        rules = getattr(part, 'init_cfg', None)
        for rule in rules if isinstance(rules, (list, tuple)) else [rules]:
            if isinstance(rule, Mapping) and rule.get('checkpoint'):
                yield name, part, rule
