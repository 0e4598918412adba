"""State dicts that another norm wrote: a norm loads them as the identical function in eval mode, or refuses them.

Which norm wrote a state shows in its keys. Where they lie depends on that norm, too, because mmcv names a norm by an
abbreviation of its class: ``bn1``, ``sn1``, ``gn1``. So whatever module gets one of our norms as a child looks, when it
loads, for what lies in that child's place under another abbreviation. Saved are always the child's own keys.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..compat.torch_internals import has_load_hook, on_load
from ._contract import NORMS, Contract, contract_of

# Kinds of states that are of no single norm, and keys that show them; the first counts, after the marks of each norm.
_SHARED = {
    'BN': ('running_mean', 'num_batches_tracked'),  # and GhostBN, SyncBN, BRN, FrozenBN: the same function in eval
    'MABN of ImageNet': ('running_var',),  # without a mean
    'affine': ('weight', 'bias'),  # group, layer and instance norm; batch norm with its statistics folded in
}
_CALLED = {'BN': 'batch norm', 'affine': 'a norm without running statistics, such as group norm'}
_CENTRED = 1e-5  # of a filter's norm; rounding leaves 1e-7
_allowed = False


class AnotherFunctionError(RuntimeError):
    """A norm was to load weights with which it would compute something else than the norm that they are from."""


class AnotherFunctionWarning(UserWarning):
    """The same, where that is allowed."""


@contextmanager
def another_function_allowed() -> Iterator[None]:
    """Inside, norms load what fits of other norms' weights and warn, in place of raising :class:`AnotherFunctionError`.

    For those who want the convolutions of a network and train its norms anew.
    """
    global _allowed
    before, _allowed = _allowed, True
    try:
        yield
    finally:
        _allowed = before


def kind_of(state: dict[str, Tensor], prefix: str = '') -> str | None:
    """Which norm wrote the values under ``prefix``: a ``Contract.kind`` or a key of :data:`_SHARED`. None: none did."""
    names = {key[len(prefix) :].partition('.')[0] for key in state if key.startswith(prefix)}
    for contract in map(contract_of, NORMS.values()):
        if names.intersection(contract.marks):
            has_statistics = names & {'running_mean', 'running_var'}
            return contract.kind if has_statistics else contract.kind_without_statistics or contract.kind
    kind = next((kind for kind, marks in _SHARED.items() if names.intersection(marks)), None)
    if kind == 'affine' and getattr(state.get(prefix + 'weight'), 'ndim', 1) > 1:
        return None  # kernels that folding left of a BNET: a fused model has its own words about them
    return kind


def other_function(norm: nn.Module, kind: str) -> str | None:
    """Why ``norm`` cannot be the norm of a state of that :func:`kind_of`; None if it can, as the identical function.

    For MABN and batch norm that is asked of the whole of norm and convolution: see :func:`adopt`.
    """
    own = contract_of(norm)
    if kind in (own.kind, *own.loads):
        return None
    return own.why_not.get(kind, f'{own.kind} is another function')


def check_kind(norm: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """What every norm asks first when it loads.

    Raises:
        AnotherFunctionError: the state is another norm's, and this one cannot be that function.
    """
    kind = kind_of(state, prefix)
    if kind == 'affine' and getattr(norm, 'running_mean', norm) is None:
        return  # a batch norm without running statistics, which is all that its state shows
    why = kind and other_function(norm, kind)
    if why:
        _refuse(norm, prefix, f'{_CALLED.get(kind, kind)}: {why}')


def adopt(host: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Before ``host`` loads: give its norms what lies in their place under the name of another norm.

    And refuse a batch norm for an MABN behind a convolution that centres its weight, unless the weight is centred.

    Raises:
        AnotherFunctionError: the norm that is here cannot be that function.
    """
    conv = None
    for name, child in host._modules.items():
        if _is_norm_of_ours(type(child)):
            _rename(host, name, child, state, prefix)
            if conv and contract_of(child).behind == 'CenConv' and kind_of(state, f'{prefix}{name}.') == 'BN':
                _check_centred(child, f'{prefix}{name}.', state.get(f'{prefix}{conv}.weight'))
        weight = getattr(child, 'weight', None)
        if isinstance(weight, Tensor) and weight.dim() > 2:
            conv = name if hasattr(child, 'centred_weight') else None


def _rename(host: nn.Module, name: str, norm: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    abbreviations = _abbreviations()
    # what mmcv calls the child, and what hosts put behind that
    found = re.fullmatch(rf'({"|".join(abbreviations)})(?=\d|_|$)(.*)', name)
    if not found or any(key.startswith(f'{prefix}{name}.') for key in state):
        return
    for abbreviation in abbreviations:
        other = f'{prefix}{abbreviation}{found[2]}.'
        kind = None if other[len(prefix) : -1] in host._modules else kind_of(state, other)
        if kind is None:
            continue
        why = other_function(norm, kind)
        if kind == 'affine':  # one cannot see of which: the name says that it is not this one's
            why = why or f'{type(norm).__name__} is another function'
        if why:
            _refuse(norm, f'{prefix}{name}.', f'{_CALLED.get(kind, kind)} ({other[:-1]}): {why}')
            return
        for key in [key for key in state if key.startswith(other)]:
            state[f'{prefix}{name}.{key[len(other) :]}'] = state.pop(key)
        return


def _check_centred(norm: nn.Module, prefix: str, weight: Tensor | None) -> None:
    if weight is None or weight.is_meta or weight.dim() < 3:
        return
    wide = weight.detach().double().flatten(1)
    off = (wide.mean(1).norm() * wide.shape[1] ** 0.5 / wide.norm().clamp(min=1e-300)).item()
    if off > _CENTRED:
        _refuse(
            norm,
            prefix,
            'batch norm, which is the same function only behind the same convolution: CenConv, in front, takes the '
            f'mean of each filter away, {100 * off:.2g} % of these weights',
        )


def _refuse(norm: nn.Module, prefix: str, what: str) -> None:
    text = (
        f'{type(norm).__name__} at {prefix[:-1]!r} would compute something else than the norm of its checkpoint, {what}'
    )
    if _allowed:
        warnings.warn(text, AnotherFunctionWarning, stacklevel=3)
        return
    raise AnotherFunctionError(
        f'{text}. Load it into a model with that norm, or train without these weights: for pretrained ones of a '
        'backbone write model.backbone.init_cfg=None'
    )


def _abbreviations() -> list[str]:
    """mmcv's names of norms as attributes: those of torch's norms, and those that norms of ours choose."""
    chosen = [vars(cls).get('_abbr_', 'bn') for cls in NORMS.values()]
    return list(dict.fromkeys(['bn', *chosen, 'gn', 'ln', 'in']))


def _is_norm_of_ours(cls: type) -> bool:
    return isinstance(getattr(cls, 'contract', None), Contract)


def _watch(host: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch for every child that a module gets."""
    if _is_norm_of_ours(type(child)) and not has_load_hook(host, adopt):
        on_load(host, adopt)


register_module_module_registration_hook(_watch)
