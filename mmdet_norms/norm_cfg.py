"""Which parts of a model config take a ``norm_cfg``; and all of them replaced at once. Dicts in, dicts out."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from .entries import class_of, name_of, parameter_of

CENTRED = dict(type='CenConv')

MISSING = inspect.Parameter.empty
"""What :func:`default_of` returns where a class has no such argument (or one without a default)."""

# Convolutions that another of the same shape may replace; a deformable or transposed one is something else.
_CONVS = ('Conv', 'Conv2d', 'ConvWS', 'ConvAWS', 'Conv2dAdaptivePadding', 'CenConv')

# Classes that have the argument norm_cfg and do nothing with it.
_DEAF = ('HRFPN',)

# What holds no layers.
_NOT_SEARCHED = ('norm_cfg', 'norm_at', 'init_cfg', 'train_cfg', 'test_cfg', 'data_preprocessor')


def replace_norm_cfg(
    model_cfg: Mapping,
    norm_cfg: Mapping,
    types: tuple[str, ...] = ('BN', 'SyncBN', 'GN'),
    conv_cfg: Mapping | None = None,
) -> Mapping:
    """The model config with one ``norm_cfg`` in place of every other, those left to a class's default included.

    Every dict of the config is looked at: an explicit ``norm_cfg`` of one of ``types`` is replaced; where ``type``
    names a class whose ``norm_cfg`` has such a default, the new one is written; the norms of a ``norm_at`` are
    replaced. What stays: parts without norms (``norm_cfg=None``), the layer norms of transformers, norms that a class
    builds without asking ``norm_cfg`` (``CTResNetNeck``, ``DilatedEncoder``, ``DyHead``), and ``norm_eval``,
    ``frozen_stages``. To put a norm where its paper has it, use :func:`mmdet_norms.apply_norm`.

    Args:
        model_cfg: ``cfg.model`` of any mmdet 3.x detector, or a part of one. Not changed.
        norm_cfg: for example ``dict(type='BNET', kernel_size=5)``.
        types: which norms go.
        conv_cfg: goes beside each new ``norm_cfg`` where the part takes one and has not a kind of its own (deformable,
            say); for MABN ``dict(type='CenConv')``.

    Returns:
        A new config of the same type.

    Raises:
        ValueError: ``norm_cfg`` has no type, or there is nothing to replace; says what is there.
    """
    if not isinstance(norm_cfg, Mapping) or 'type' not in norm_cfg:
        raise ValueError(f"norm_cfg={norm_cfg!r} must be a dict with a type, such as dict(type='BNET', kernel_size=5)")
    model_cfg = copy.deepcopy(model_cfg)
    keys = dict(norm_cfg=norm_cfg) if conv_cfg is None else dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
    parts = list(parts_with(model_cfg, types))
    for part in parts:
        set_keys(part, keys)
    placed = [_replace_at(part, norm_cfg, types) for part in _dicts(model_cfg) if part.get('norm_at')]
    if not parts and not any(placed):
        found = {name_of(norm) for part in _dicts(model_cfg) if (norm := norm_of(part))}
        raise ValueError(
            f'norm_cfg.type={norm_cfg["type"]!r} has nothing to replace: model.type={name_of(model_cfg)!r} has '
            f'{"norms of type " + ", ".join(sorted(found)) if found else "no norms"}, none of {", ".join(types)}; '
            'write norm_cfg into the parts that are to have it, or name other types'
        )
    return model_cfg


def _replace_at(part: dict, norm_cfg: Mapping, types: tuple[str, ...]) -> bool:
    """In the ``norm_at`` of a backbone; whether there was one to replace."""
    found = False
    for position, placed in part['norm_at'].items():
        norms = list(placed) if isinstance(placed, (list, tuple)) else [placed]
        for i, norm in enumerate(norms):
            if norm and name_of(norm) in types:
                norms[i], found = copy.deepcopy(norm_cfg), True
        part['norm_at'][position] = norms if isinstance(placed, (list, tuple)) else norms[0]
    return found


def parts_with(node: Any, types: tuple[str, ...]) -> Iterator[dict]:
    """The dicts in ``node`` whose norm is one of ``types``."""
    for part in list(_dicts(node)):
        norm = norm_of(part)
        if norm and name_of(norm) in types:
            yield part


def set_keys(part: dict, keys: dict) -> None:
    """Set those of ``keys`` that the part takes; a centred convolution belongs to the norm that goes."""
    if name_of(part.get('conv_cfg')) == CENTRED['type']:
        del part['conv_cfg']
    if 'norm_cfg' in keys and part.get('norm') in norms_by_name(part):
        del part['norm']
    for key, value in copy.deepcopy(keys).items():
        if takes(part, key) and (key != 'conv_cfg' or conv_is_plain(part)):
            part[key] = value


def conv_is_plain(part: Mapping) -> bool:
    """Whether another ``conv_cfg`` would change nothing but the weights' use."""
    conv = part['conv_cfg'] if 'conv_cfg' in part else default_of(part, 'conv_cfg')
    return not isinstance(conv, Mapping) or name_of(conv) in _CONVS


def norm_of(part: Mapping) -> Mapping | None:
    """The ``norm_cfg`` that a part has, explicit or by the default of its class; None where it has none."""
    if name_of(part) in _DEAF:
        return None
    named = norms_by_name(part).get(part.get('norm'))
    if named is not None:
        return named
    norm = part['norm_cfg'] if 'norm_cfg' in part else default_of(part, 'norm_cfg')
    return norm if isinstance(norm, Mapping) and 'type' in norm else None


def norms_by_name(part: Mapping) -> Mapping[str, Mapping]:
    """What the names mean that the class of ``part`` takes as its ``norm``; most take none."""
    return getattr(class_of(part), 'norms_by_name', {})


def takes(part: Mapping, key: str) -> bool:
    """Whether ``part`` may have ``key``. A dict without a type (arguments of an inner module) has what it needs."""
    if key == 'norm_cfg' and name_of(part) in _DEAF:
        return False
    if key in part or 'type' not in part:
        return True
    return parameter_of(part, key) is not None


def default_of(part: Mapping, key: str) -> Any:
    """The default that the class of ``part`` has for ``key``; :data:`MISSING` where it has none."""
    parameter = parameter_of(part, key) if 'type' in part else None
    return MISSING if parameter is None else parameter.default


def _dicts(node: Any) -> Iterator[dict]:
    """``node`` and all dicts below it that may describe layers."""
    if isinstance(node, (list, tuple)):
        for entry in node:
            yield from _dicts(entry)
    elif isinstance(node, Mapping):
        yield node
        for key, value in node.items():
            if key not in _NOT_SEARCHED:
                yield from _dicts(value)
