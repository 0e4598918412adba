"""A norm from outside of the package, known everywhere by one call."""

import inspect

from torch import nn

from .errors import UserError, did_you_mean
from .layers import NORMS, contract_of
from .placement import CENTRED, PLACEMENTS, Placement
from .placement.table import at_last, everywhere, in_heads
from .registry import NORM_LAYERS

_PLACES = {'everywhere': everywhere, 'heads': in_heads, 'last': at_last}
_by_name: dict[str, type[nn.Module]] = {}


def register_norm(cls: type[nn.Module], name: str, placement: str | Placement = 'everywhere', **norm_cfg) -> None:
    """Make a norm known: to ``norm_cfg``, ``--norm``, ``is_norm``, the optimizer rule, folding and the benchmark.

    Call it in the module of the class, which a config names in ``custom_imports``; docs/add-a-norm.md has an example.

    Args:
        cls: takes the number of channels first, then the keys of ``norm_cfg``. What else it says of itself, such as the
            checkpoints that it loads, is its :class:`~mmdet_norms.layers.Contract`.
        name: what ``--norm`` and the benchmark's ``--layers`` take.
        placement: where ``--norm`` puts it: ``'everywhere'`` (as ``mabn``), ``'heads'`` (as ``cbn``), ``'last'`` (as
            ``bnet5``), or a :class:`~mmdet_norms.placement.Placement` of your own.
        norm_cfg: keys that ``--norm`` writes beside the type.

    Raises:
        UserError: no class of modules, an unknown placement, or a name that something else has.
    """
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise UserError(f'register_norm: cls={cls!r} must be a class of modules')
    kind = cls.__name__
    for key, value, taken in (
        ('cls', kind, NORM_LAYERS.module_dict.get(kind)),
        ('name', name, _by_name.get(name, PLACEMENTS.get(name))),
    ):
        if taken is not None and _path(taken) != _path(cls):
            raise UserError(f'register_norm: {key}={value!r} is the name of another norm; choose one that is free')
    if not isinstance(placement, Placement):
        if placement not in _PLACES:
            raise UserError(
                f'register_norm: placement={placement!r} is unknown{did_you_mean(placement, _PLACES)}; choose one of: '
                f'{", ".join(_PLACES)}; or give a mmdet_norms.placement.Placement'
            )
        centred = contract_of(cls).behind == CENTRED['type'] and placement != 'last'
        placement = _PLACES[placement](dict(norm_cfg, type=kind), **dict(conv_cfg=CENTRED) if centred else {})
    NORM_LAYERS.register_module(name=kind, module=cls, force=True)
    NORMS[kind] = _by_name[name] = cls
    PLACEMENTS[name] = placement


def _path(cls: object) -> tuple[str, str]:
    """By which a class is the same when its module is imported again."""
    return getattr(cls, '__module__', ''), getattr(cls, '__qualname__', '')
