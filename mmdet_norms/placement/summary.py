"""Which norms a built model has, how many, and where: as the layers are, not as the config writes them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..entries import name_of
from ..layers import FrozenBN
from ..layers._contract import is_norm_class

# What tells two norms of a class apart, where they have it.
_TELLING = {'kernel_size': 'kernel {}', 'buffer_num': 'window {}', 'norm_batch': 'of {} images'}
_DIVIDED = ('backbone', 'roi_head')


@dataclass
class Part:
    """A part of a model, such as ``backbone.layer1`` or ``neck``.

    Args:
        name: of the modules, as in the state dict; ``backbone (stem)`` is what is beside the stages.
        parameters, trainable, of_norms: how many numbers; what another part has already is not counted again.
        norms: label such as ``BNET (kernel 5)`` -> layers.
        fixed: the same of those that training leaves as they are: ``norm_eval``, ``frozen_stages``, FrozenBN.
    """

    name: str
    parameters: int = 0
    trainable: int = 0
    of_norms: int = 0
    norms: Counter = field(default_factory=Counter)
    fixed: Counter = field(default_factory=Counter)

    def described(self) -> str:
        """``13 BN, 3 of them fixed; 4 BNET (kernel 5)``."""
        listed = []
        for label, n in sorted(self.norms.items(), key=lambda item: (-item[1], item[0])):
            fixed = self.fixed[label]
            listed.append(f'{n} {label}' + (', fixed' if fixed == n else f', {fixed} of them fixed' if fixed else ''))
        return '; '.join(listed)


def summarize(model: nn.Module) -> list[Part]:
    """The parts of a model in training mode, those without parameters left out, and ``all`` of it at the end."""
    seen: set[int] = set()
    parts: dict[str, Part] = {}
    for name, modules in _parts(model):
        part = parts.setdefault(name, Part(name))
        for module in modules:
            _count_parameters(module, part, seen)
            _count_norms(module, part)
    found = [part for part in parts.values() if part.parameters or part.norms]
    whole = Part('all')
    for part in found:
        for key in ('parameters', 'trainable', 'of_norms'):
            setattr(whole, key, getattr(whole, key) + getattr(part, key))
        whole.norms += part.norms
        whole.fixed += part.fixed
    return [*found, whole]


def _parts(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    for name, child in model.named_children():
        if name not in _DIVIDED:
            yield name, [child]
            continue
        stem = 'stem' if name == 'backbone' else 'rest'
        for inner, module in child.named_children():
            if name == 'backbone' and isinstance(module, nn.ModuleList):
                for place, stage in module.named_children():
                    yield f'{name}.{inner}.{place}', [stage]
            elif next(module.children(), None) is not None and not is_norm_class(type(module)):
                yield f'{name}.{inner}', [module]
            else:  # single layers beside the stages are one part
                yield f'{name} ({stem})', [module]
        yield f'{name} ({stem})', [_Bare(child)]
    yield 'beside these', [_Bare(model)]


class _Bare(nn.Module):
    """The parameters that a module has itself, without its children."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self._parameters.update(of._parameters)


def _count_parameters(module: nn.Module, part: Part, seen: set[int]) -> None:
    norms = {id(p) for m in module.modules() if is_norm_class(type(m)) for p in m.parameters()}
    for parameter in module.parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        part.parameters += parameter.numel()
        part.trainable += parameter.numel() * parameter.requires_grad
        part.of_norms += parameter.numel() * (id(parameter) in norms)


def _count_norms(module: nn.Module, part: Part) -> None:
    """The outermost norms: a BNET has a batch norm inside, which is none of its own."""
    if is_norm_class(type(module)):
        label = _label(module)
        part.norms[label] += 1
        part.fixed[label] += isinstance(module, FrozenBN) or not module.training
        return
    for child in module.children():
        _count_norms(child, part)


def _label(norm: nn.Module) -> str:
    values = {key: getattr(norm, key, None) for key in _TELLING}
    more = [_TELLING[key].format(value) for key, value in values.items() if isinstance(value, int) and value > 1]
    more += [f'{norm.num_groups} groups'] if isinstance(norm, nn.GroupNorm) else []
    return name_of(type(norm)) + (f' ({", ".join(more)})' if more else '')
