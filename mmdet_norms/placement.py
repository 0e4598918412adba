"""Where each named choice puts its layers: one table, and ``apply_norm(model_cfg, name)``. Dicts in, dicts out."""

import copy
import difflib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

BATCH_NORM = dict(type='BN', requires_grad=True)
GROUP_NORM = dict(type='GN', num_groups=32, requires_grad=True)
CENTRED = dict(type='CenConv')

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

# Norms that a named choice puts everywhere in a backbone; they load batch norm checkpoints, so BN may come back.
_WHOLE_BACKBONE = ('MABN', 'BRN', 'SN', 'FrozenBN')

# Necks and heads whose convolutions take a norm_cfg.
_NECKS = ('FPN', 'PAFPN')
_BOX_HEADS = ('Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead', 'NormShared4Conv1FCBBoxHead', 'ConvFCBBoxHead')
_MASK_HEADS = ('FCNMaskHead', 'HTCMaskHead', 'NormFCNMaskHead')


@dataclass(frozen=True)
class Placement:
    """One named choice. Each field holds config keys for one part of the detector; an empty one leaves it alone.

    Args:
        where: for people: which norms of the detector it replaces.
        norm_at: ``norm_at`` of the backbone: position -> norm_cfg. Other positions keep batch norm.
        backbone: keys of the backbone; without a ``norm_cfg`` here, the backbone has batch norm.
        neck: keys of the FPN.
        box_head: keys of every box head, which gets four convolutions and one fc layer (a ``norm_cfg`` list has one
            entry per convolution).
        mask_head: keys of every mask head.
    """

    where: str
    norm_at: dict = field(default_factory=dict)
    backbone: dict = field(default_factory=dict)
    neck: dict = field(default_factory=dict)
    box_head: dict = field(default_factory=dict)
    mask_head: dict = field(default_factory=dict)


def _bnet(kernel_size: int) -> Placement:
    return Placement(
        where='last norm of every residual block of the backbone (norm3 of a Bottleneck); all others stay BN',
        norm_at=dict(last=dict(type='BNET', kernel_size=kernel_size)),
    )


def _in_heads(norm_cfg: dict) -> Placement:
    """As in the CBN paper: next to a backbone whose batch norm is fixed (``norm_eval``, as in stock configs)."""
    part = dict(norm_cfg=norm_cfg)
    return Placement(
        where='FPN, 4conv1fc box head and mask head; the backbone keeps the (frozen) BN of its config',
        neck=part,
        box_head=part,
        mask_head=part,
    )


def _everywhere(norm_cfg: dict, **more) -> Placement:
    """As in the MABN paper: all but the RPN, nothing frozen."""
    part = dict(norm_cfg=norm_cfg, **more)
    return Placement(
        where='backbone, FPN, 4conv1fc box head and mask head; nothing frozen',
        backbone=dict(part, norm_eval=False, frozen_stages=-1),
        neck=part,
        box_head=part,
        mask_head=part,
    )


def _an(norm: str) -> list[dict]:
    """Four AN layers with the published number of components: of the four stages, or of the box head's convolutions."""
    return [dict(type='AN', norm=norm, k=k) for k in (10, 10, 20, 20)]


PLACEMENTS: dict[str, Placement] = {
    'bn': Placement(where='batch norm everywhere in the backbone, as in stock mmdet: the baseline'),
    'bnet3': _bnet(3),
    'bnet5': _bnet(5),
    'bnet7': _bnet(7),
    'cbn': _in_heads(dict(type='CBN', buffer_num=3, burnin=8)),
    'gn': _in_heads(GROUP_NORM),
    'syncbn': _in_heads(dict(type='SyncBN', requires_grad=True)),
    'mabn': _everywhere(dict(type='MABN', B=2, real_B=32), conv_cfg=CENTRED),
    'brn': _everywhere(dict(type='BRN')),
    'sn': _everywhere(dict(type='SN')),
    'an': Placement(
        where='second norm of every block of the backbone (bn2), 10, 10, 20, 20 components in the four stages',
        norm_at=dict(norm2=_an('BN')),
    ),
    'an-gn-head': Placement(
        where='as `an`, and AN(GN) with 10, 10, 20, 20 components in the four convolutions of a 4conv1fc box head, GN '
        'in FPN and mask head',
        norm_at=dict(norm2=_an('BN')),
        neck=dict(norm_cfg=GROUP_NORM),
        box_head=dict(norm_cfg=_an('GN')),
        mask_head=dict(norm_cfg=GROUP_NORM),
    ),
    'frozen': Placement(
        where='every norm of the backbone is a fixed affine map (needs pretrained weights)',
        backbone=dict(norm_cfg=dict(type='FrozenBN')),
    ),
}
"""What ``--norm NAME`` and the config names mean. ``configs/`` is tested against it."""


def apply_norm(model_cfg: Mapping, name: str) -> Mapping:
    """The model config with the norms of a named choice; norms that another name put into the backbone go first.

    A name that sits in the backbone only (``bn``, ``bnet5``, ``an``, ``frozen``) leaves neck and heads as the config
    has them; the others say what goes there. A detector without RoI heads (RetinaNet) gets the neck's part.

    Args:
        model_cfg: ``cfg.model`` of any mmdet 3.x detector with a backbone of the ResNet family. Not changed.
        name: a key of :data:`PLACEMENTS`.

    Returns:
        A new config of the same type.

    Raises:
        ValueError: unknown name, or a model that has none of the places; says what to write instead.
    """
    if name not in PLACEMENTS:
        close = difflib.get_close_matches(str(name).lower(), PLACEMENTS, n=1)
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        raise ValueError(f'norm {name!r} is unknown{hint}; choose one of: {", ".join(PLACEMENTS)}')
    placement = PLACEMENTS[name]
    model_cfg = copy.deepcopy(model_cfg)
    _place_in_backbone(model_cfg, name, placement)
    placed = [
        _set_keys(neck, placement.neck)
        for neck in _parts(model_cfg.get('neck'))
        if type_name(neck['type']) in _NECKS and placement.neck
    ]
    roi_head = model_cfg.get('roi_head') or {}
    for key, part, types, place in (
        ('bbox_head', placement.box_head, _BOX_HEADS, _place_in_box_head),
        ('mask_head', placement.mask_head, _MASK_HEADS, _place_in_mask_head),
    ):
        for head in _parts(roi_head.get(key)) if part else ():
            if type_name(head['type']) in types:
                placed.append(place(head, part))
            else:
                kind = type_name(head['type'])
                warnings.warn(f'norm {name!r}: roi_head.{key}.type={kind!r} stays without it', stacklevel=2)
    if placement.neck and not placed:
        raise ValueError(
            f'norm {name!r} sits in FPN, box and mask head, but the model has none of '
            f'{", ".join(_NECKS + _BOX_HEADS[:2] + _MASK_HEADS[:1])}'
        )
    return model_cfg


def _place_in_backbone(model_cfg: dict, name: str, placement: Placement) -> None:
    backbone = model_cfg.get('backbone')
    if not isinstance(backbone, Mapping) or 'type' not in backbone:
        raise ValueError(
            f'norm {name!r} sits in the backbone, but model.backbone of {model_cfg.get("type")!r} is {backbone!r}; '
            'use a detector config with a backbone dict'
        )
    stock = _STOCK.get(type_name(backbone['type']), type_name(backbone['type']))
    if stock not in HOSTS:
        raise ValueError(
            f'norm {name!r}: model.backbone.type={stock!r} has no residual blocks with batch norm that it could be '
            f'placed in; use one of: {", ".join(HOSTS)}'
        )
    backbone.pop('norm_at', None)
    if (backbone.get('conv_cfg') or {}).get('type') == CENTRED['type']:
        del backbone['conv_cfg']
    if 'norm_cfg' in placement.backbone:
        _set_keys(backbone, placement.backbone)
    elif backbone.get('norm_cfg', BATCH_NORM)['type'] in _WHOLE_BACKBONE:
        backbone['norm_cfg'] = dict(BATCH_NORM)
    elif backbone.get('norm_cfg', BATCH_NORM)['type'] not in ('BN', 'SyncBN'):
        _start_from_batch_norm(backbone, name)
    if placement.norm_at:
        backbone['type'] = HOSTS[stock]
        stages = backbone.get('num_stages', 4)
        backbone['norm_at'] = {
            position: cfg[:stages] if isinstance(cfg, list) else cfg
            for position, cfg in copy.deepcopy(placement.norm_at).items()
        }
    elif type_name(backbone['type']) != stock:
        backbone['type'] = stock


def _start_from_batch_norm(backbone: dict, name: str) -> None:
    """A backbone of another norm has no running statistics, so none can be frozen: they must be learned."""
    warnings.warn(
        f'norm {name!r}: model.backbone.norm_cfg is {backbone["norm_cfg"]["type"]}, whose pretrained weights hold no '
        'running statistics; using BN with norm_eval=False and frozen_stages=-1. Start from a config with BN to '
        'fine-tune pretrained weights',
        stacklevel=4,
    )
    backbone['norm_cfg'] = dict(BATCH_NORM)  # not update(): mmengine's ConfigDict would merge
    backbone['norm_eval'], backbone['frozen_stages'] = False, -1


def _place_in_box_head(head: dict, keys: dict) -> None:
    if type_name(head['type']) == 'ConvFCBBoxHead':
        for key in [key for key in head if key.startswith('num_') and key.endswith(('_convs', '_fcs'))]:
            del head[key]
    per_conv = isinstance(keys['norm_cfg'], list)
    head['type'] = 'NormShared4Conv1FCBBoxHead' if per_conv else 'Shared4Conv1FCBBoxHead'
    head.setdefault('conv_out_channels', head.get('in_channels', 256))
    _set_keys(head, keys)


def _place_in_mask_head(head: dict, keys: dict) -> None:
    if type_name(head['type']) == 'NormFCNMaskHead':
        head['type'] = 'FCNMaskHead'
    _set_keys(head, keys)


def _set_keys(part: dict, keys: dict) -> None:
    """Set ``keys``; a centred convolution belongs to the norm that goes."""
    if (part.get('conv_cfg') or {}).get('type') == CENTRED['type']:
        del part['conv_cfg']
    for key, value in copy.deepcopy(keys).items():
        part[key] = value


def _parts(node) -> Iterator[dict]:
    """A part of a detector, or each of several (a chain of necks, the heads of a cascade)."""
    return (part for part in (node if isinstance(node, (list, tuple)) else [node]) if isinstance(part, Mapping))


def type_name(name) -> str:
    """'ResNet' for 'ResNet', 'mmdet.ResNet' and the class itself (mmengine's lazy configs)."""
    return getattr(name, '__name__', None) or str(name).rsplit('.', 1)[-1]
