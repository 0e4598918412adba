"""Where each named choice puts its layers: one table, and ``apply_norm(model_cfg, name)``. Dicts in, dicts out."""

import copy
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

BATCH_NORM = dict(type='BN', requires_grad=True)

# Stock backbones that have a twin with a norm per position.
HOSTS = {
    'ResNet': 'NormResNet',
    'ResNetV1d': 'NormResNetV1d',
    'ResNeXt': 'NormResNeXt',
    'RegNet': 'NormRegNet',
    'Res2Net': 'NormRes2Net',
    'ResNeSt': 'NormResNeSt',
}
_STOCK = {ours: stock for stock, ours in HOSTS.items()}


@dataclass(frozen=True)
class Placement:
    """One named choice.

    Args:
        where: for people: which norms of the detector it replaces.
        norm_at: ``norm_at`` of the backbone: position -> norm_cfg. Other positions keep batch norm.
    """

    where: str
    norm_at: dict = field(default_factory=dict)


def _bnet(kernel_size: int) -> Placement:
    return Placement(
        where='last norm of every residual block of the backbone (norm3 of a Bottleneck); all others stay BN',
        norm_at=dict(last=dict(type='BNET', kernel_size=kernel_size)),
    )


PLACEMENTS: dict[str, Placement] = {
    'bn': Placement(where='batch norm everywhere in the backbone, as in stock mmdet: the baseline'),
    'bnet3': _bnet(3),
    'bnet5': _bnet(5),
    'bnet7': _bnet(7),
}
"""What ``--norm NAME`` and the config names mean. ``configs/`` is tested against it."""


def apply_norm(model_cfg: Mapping, name: str) -> Mapping:
    """The model config with the norms of a named choice; whatever was chosen before is undone first.

    Args:
        model_cfg: ``cfg.model`` of any mmdet 3.x detector with a backbone of the ResNet family. Not changed.
        name: a key of :data:`PLACEMENTS`.

    Returns:
        A new config of the same type. Only the backbone's ``type`` and ``norm_at`` differ; where the backbone had
        neither BN nor SyncBN, also ``norm_cfg``, ``norm_eval`` and ``frozen_stages``, with a warning.

    Raises:
        ValueError: unknown name, or a backbone that has none of the positions; says what to write instead.
    """
    if name not in PLACEMENTS:
        close = difflib.get_close_matches(str(name).lower(), PLACEMENTS, n=1)
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        raise ValueError(f'norm {name!r} is unknown{hint}; choose one of: {", ".join(PLACEMENTS)}')
    placement = PLACEMENTS[name]
    model_cfg = copy.deepcopy(model_cfg)
    backbone = model_cfg.get('backbone')
    if not isinstance(backbone, Mapping) or 'type' not in backbone:
        raise ValueError(
            f'norm {name!r} sits in the backbone, but model.backbone of {model_cfg.get("type")!r} is {backbone!r}; '
            'use a detector config with a backbone dict'
        )
    stock = _stock_type(backbone['type'])
    if stock not in HOSTS:
        raise ValueError(
            f'norm {name!r}: model.backbone.type={stock!r} has no residual blocks with batch norm that it could be '
            f'placed in; use one of: {", ".join(HOSTS)}'
        )
    backbone.pop('norm_at', None)
    if backbone.get('norm_cfg', BATCH_NORM)['type'] not in ('BN', 'SyncBN'):
        _start_from_batch_norm(backbone, name)
    if placement.norm_at:
        backbone['type'] = HOSTS[stock]
        backbone['norm_at'] = copy.deepcopy(placement.norm_at)
    elif backbone['type'] != stock and not isinstance(backbone['type'], type):
        backbone['type'] = stock
    return model_cfg


def _start_from_batch_norm(backbone: dict, name: str) -> None:
    """A backbone of another norm has no running statistics, so none can be frozen: they must be learned."""
    warnings.warn(
        f'norm {name!r}: model.backbone.norm_cfg is {backbone["norm_cfg"]["type"]}, whose pretrained weights hold no '
        'running statistics; using BN with norm_eval=False and frozen_stages=-1. Start from a config with BN to '
        'fine-tune pretrained weights',
        stacklevel=3,
    )
    backbone['norm_cfg'] = dict(BATCH_NORM)  # not update(): mmengine's ConfigDict would merge
    backbone['norm_eval'], backbone['frozen_stages'] = False, -1


def _stock_type(backbone_type) -> str:
    """'ResNet' for 'ResNet', 'mmdet.ResNet', 'NormResNet' and the class itself (mmengine's lazy configs)."""
    name = getattr(backbone_type, '__name__', None) or str(backbone_type).rsplit('.', 1)[-1]
    return _STOCK.get(name, name)
