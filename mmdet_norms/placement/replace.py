"""All norms of a model config replaced at once."""

import copy
from collections.abc import Mapping

from ..entries import name_of
from .part import Part, all_parts


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
    replaced = False
    for part in list(all_parts(model_cfg)):
        if part.norm and name_of(part.norm) in types:
            part.set(keys)
            replaced = True
        if part.cfg.get('norm_at'):
            replaced |= _replace_at(part, norm_cfg, types)
    if not replaced:
        found = {name_of(part.norm) for part in all_parts(model_cfg) if part.norm}
        raise ValueError(
            f'norm_cfg.type={norm_cfg["type"]!r} has nothing to replace: model.type={name_of(model_cfg)!r} has '
            f'{"norms of type " + ", ".join(sorted(found)) if found else "no norms"}, none of {", ".join(types)}; '
            'write norm_cfg into the parts that are to have it, or name other types'
        )
    return model_cfg


def _replace_at(backbone: Part, norm_cfg: Mapping, types: tuple[str, ...]) -> bool:
    """In ``norm_at``, which has one norm or a list of them per position; whether there was one to replace."""
    found = False
    for position, placed in backbone.cfg['norm_at'].items():
        norms = list(placed) if isinstance(placed, (list, tuple)) else [placed]
        for i, norm in enumerate(norms):
            if norm and name_of(norm) in types:
                norms[i], found = copy.deepcopy(norm_cfg), True
        backbone.cfg['norm_at'][position] = norms if isinstance(placed, (list, tuple)) else norms[0]
    return found
