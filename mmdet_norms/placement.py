"""Where each named choice puts its layers: one table, and ``apply_norm(model_cfg, name)``. Dicts in, dicts out."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mmengine.registry import MODELS
from torch import nn

from .entries import class_of, is_a, is_classifier, name_of
from .errors import did_you_mean
from .norm_cfg import CENTRED, MISSING, conv_is_plain, default_of, norm_of, norms_by_name, parts_with, set_keys, takes

BATCH_NORM = dict(type='BN', requires_grad=True)
GROUP_NORM = dict(type='GN', num_groups=32, requires_grad=True)

# Stock backbones that have a twin with a norm per position.
HOSTS = {
    'ResNet': 'NormResNet',
    'ResNetV1d': 'NormResNetV1d',
    'ResNeXt': 'NormResNeXt',
    'RegNet': 'NormRegNet',
    'Res2Net': 'NormRes2Net',
    'ResNeSt': 'NormResNeSt',
    'TridentResNet': 'NormTridentResNet',
    'DetectoRS_ResNet': 'NormDetectoRS_ResNet',
    'DetectoRS_ResNeXt': 'NormDetectoRS_ResNeXt',
    'HRNet': 'NormHRNet',
    'Darknet': 'NormDarknet',
    'CSPDarknet': 'NormCSPDarknet',
    'CSPNeXt': 'NormCSPNeXt',
    'MobileNetV2': 'NormMobileNetV2',
    'EfficientNet': 'NormEfficientNet',
}
_STOCK = {ours: stock for stock, ours in HOSTS.items()}

# Why a stock backbone takes none of the names that sit in the backbone.
_NO_HOSTS = {
    'HourglassNet': 'keeps norm_cfg from its inner hourglass modules',
    'SSDVGG': 'has no norms',
    'SwinTransformer': 'normalizes tokens with layer norm, not feature maps',
    'PyramidVisionTransformer': 'normalizes tokens with layer norm, not feature maps',
    'PyramidVisionTransformerV2': 'normalizes tokens with layer norm, not feature maps',
}

# For a norm_cfg per stage: which of a ResNet's four stages (strides 4, 8, 16, 32) each stage of another backbone is.
_STAGES = {
    'Darknet': (0, 0, 1, 2, 3),
    'EfficientNet': (0, 0, 1, 2, 3),
    'MobileNetV2': (0, 0, 1, 2, 2, 3, 3),
    'CSPDarknet P6': (0, 1, 2, 3, 3),
    'CSPNeXt P6': (0, 1, 2, 3, 3),
}

# Norms that a named choice puts everywhere in a backbone; they load batch norm checkpoints, so BN may come back.
_WHOLE_BACKBONE = ('MABN', 'BRN', 'SN', 'FrozenBN')

# Keys that mean in these norms what they mean in batch norm. Hosts whose batch norm has its own (YOLOX, EfficientNet)
# hand them on, without which their pretrained weights would be another function.
_AS_IN_BN = {norm: ('eps', 'momentum') for norm in ('BN', 'SyncBN', 'GhostBN', 'BNET', 'AN', 'SN')}
_AS_IN_BN |= {norm: ('eps',) for norm in ('FrozenBN', 'BRN', 'CBN')}

# Norms that another may replace: those of feature maps, not the layer norm of tokens.
_REPLACED = ('BN', 'SyncBN', 'GhostBN', 'GN', 'LN2d', 'IN', 'BNET', 'CBN', 'MABN', 'AN', 'BRN', 'SN', 'FrozenBN')

# With running statistics that a checkpoint has; a user's own subclasses included.
_BATCH_NORMS = ('BN', 'SyncBN', 'GhostBN', nn.BatchNorm2d, nn.SyncBatchNorm)

_PLAIN = ('BN', nn.BatchNorm2d)

# Box heads of Faster R-CNN, which become 4conv1fc heads; those of published checkpoints keep their box convention.
_BOX_HEADS = ('Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead', 'NormShared4Conv1FCBBoxHead', 'ConvFCBBoxHead')
_LEGACY_BOX_HEADS = ('PlusOneShared2FCBBoxHead', 'PlusOneShared4Conv1FCBBoxHead')

# Keys of a detector that end like those of its heads.
_NO_HEADS = ('roi_head', 'rpn_head', 'panoptic_fusion_head')

# Norms that need an ordinary convolution in front; parts that lack it by themselves, or by these keys.
_BEHIND_CONV = ('CBN', 'MABN')
_NOT_BEHIND_CONV = {'TOODHead': 'a product of matrices', 'NASFCOSHead': 'deformable convolutions'}
_DEFORMABLE = ('dcn', 'use_dcn', 'dcn_on_last_conv', 'dcn_cfg', 'num_dcn')


@dataclass(frozen=True)
class Placement:
    """One named choice. Each field holds config keys for one part of the detector; an empty one leaves it alone.

    Args:
        where: for people: which norms of a detector it replaces.
        in_classifier: for people: which norms of an image classifier; empty if it has nothing for one.
        norm_at: ``norm_at`` of the backbone: position -> norm_cfg. Other positions keep batch norm.
        backbone: keys of the backbone; without a ``norm_cfg`` here, the backbone has batch norm.
        neck: keys of the FPN, or whatever neck there is.
        box_head: keys of every box head of a Faster R-CNN, which gets four convolutions and one fc layer (a
            ``norm_cfg`` list has one entry per convolution).
        mask_head: keys of every mask head of a Mask R-CNN.
        head: keys of every other head, where it has norms in the stock detector (FCOS, RTMDet, SOLO, ...).
        classifier: keys of the backbone of a classifier, where these are others than in a detector.
    """

    where: str
    in_classifier: str
    norm_at: dict = field(default_factory=dict)
    backbone: dict = field(default_factory=dict)
    neck: dict = field(default_factory=dict)
    box_head: dict = field(default_factory=dict)
    mask_head: dict = field(default_factory=dict)
    head: dict = field(default_factory=dict)
    classifier: dict = field(default_factory=dict)


# Where there is no pretraining, statistics are learned.
_NOTHING_FIXED = dict(norm_eval=False, frozen_stages=-1)
_EVERY = 'every norm of the backbone'


def _bnet(kernel_size: int) -> Placement:
    return Placement(
        where='last norm of every residual block of the backbone (norm3 of a Bottleneck); all others stay BN',
        in_classifier='the same',
        norm_at=dict(last=dict(type='BNET', kernel_size=kernel_size)),
    )


def _in_heads(norm_cfg: dict) -> Placement:
    """As in the CBN paper: next to a backbone whose batch norm is fixed (``norm_eval``, as in stock configs)."""
    part = dict(norm_cfg=norm_cfg)
    return Placement(
        where='FPN, 4conv1fc box head and mask head; the backbone keeps the (frozen) BN of its config',
        in_classifier=_EVERY,
        neck=part,
        box_head=part,
        mask_head=part,
        head=part,
        classifier=dict(part, **_NOTHING_FIXED),
    )


def _everywhere(norm_cfg: dict, **more) -> Placement:
    """As in the MABN paper: all but the RPN, nothing frozen."""
    part = dict(norm_cfg=norm_cfg, **more)
    return Placement(
        where='backbone, FPN, 4conv1fc box head and mask head; nothing frozen',
        in_classifier=_EVERY + ', behind centred convolutions' * ('conv_cfg' in more),
        backbone=dict(part, **_NOTHING_FIXED),
        neck=part,
        box_head=part,
        mask_head=part,
        head=part,
    )


def _an(norm: str) -> list[dict]:
    """Four AN layers with the published number of components: of the four stages, or of the box head's convolutions."""
    return [dict(type='AN', norm=norm, k=k) for k in (10, 10, 20, 20)]


_AN_AT = dict(norm2=_an('BN'))

PLACEMENTS: dict[str, Placement] = {
    'bn': Placement(
        where='batch norm everywhere in the backbone, as in stock mmdet: the baseline',
        in_classifier=_EVERY,
    ),
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
        in_classifier='the same',
        norm_at=_AN_AT,
    ),
    'an-gn-head': Placement(
        where='as `an`, and AN(GN) with 10, 10, 20, 20 components in the four convolutions of a 4conv1fc box head, GN '
        'in FPN and mask head',
        in_classifier='',
        norm_at=_AN_AT,
        neck=dict(norm_cfg=GROUP_NORM),
        box_head=dict(norm_cfg=_an('GN')),
        mask_head=dict(norm_cfg=GROUP_NORM),
        head=dict(norm_cfg=dict(type='AN', norm='GN', k=10)),
    ),
    'frozen': Placement(
        where=f'{_EVERY} is a fixed affine map (needs pretrained weights)',
        in_classifier='the same',
        backbone=dict(norm_cfg=dict(type='FrozenBN')),
    ),
}
"""What ``--norm NAME`` and the config names mean. ``configs/`` is tested against it."""


def apply_norm(model_cfg: Mapping, name: str) -> Mapping:
    """The model config with the norms of a named choice; norms that another name put into the backbone go first.

    A name that sits in the backbone only (``bn``, ``bnet5``, ``an``, ``frozen``) leaves neck and heads as the config
    has them; the others say what goes there. What a name means in a detector that its paper did not have:

    * *Last* (``bnet*``) or *second* (``an*``) *norm of every block of the backbone*: the block is the unit that a
      shortcut may bridge: of a ResNet, HRNet, Darknet, CSPDarknet, CSPNeXt, MobileNetV2 or EfficientNet (see
      ``NormAt`` and ``NormAtBlocks``). AN has 10 components up to stride 8, 20 beyond. ``eps`` and ``momentum`` of the
      backbone's batch norm are kept, so that its pretrained weights remain the identical function. AOGNet has places
      of its own for AN, and none for BNET.
    * *Backbone* (``mabn``, ``brn``, ``sn``, ``frozen``): all norms of any backbone that takes a ``norm_cfg``. The
      backbone inside a recursive feature pyramid (DetectoRS) counts as one; for ``mabn``, ``brn`` and ``sn`` so does
      the shared RoI head of C4 detectors.
    * *FPN*: every neck that takes a ``norm_cfg``.
    * *Box head*, *mask head*: those of Faster and Mask R-CNN and their relatives. Every other head (dense, box or mask)
      gets the norm in place of those that it has; one without norms, such as RetinaNet's, stays without. ``an-gn-head``
      puts AN(GN) with 10 components there. A dense head that is shared by all levels of the pyramid mixes their batch
      statistics in any norm but GN.
    * Never: the RPN, the teacher of a distilled student, layer norms of transformers.

    A neck or head that stays without the norm is named in one warning, with the reason. In semi-supervised and tracking
    models, ``model.detector`` is the detector.

    The Imagenette networks (``XSEMiniNet``, ...) have a norm that sits in the backbone at every convolution.

    In an image classifier the names of the heads (``cbn``, ``gn``, ``syncbn``) mean every norm of the backbone, too, as
    in the ImageNet experiments of their papers, and ``bn`` means BN where the config has another norm.

    Args:
        model_cfg: ``cfg.model`` of any mmdet 3.x detector, or of an ``ImageClassifier``. Not changed.
        name: a key of :data:`PLACEMENTS`.

    Returns:
        A new config of the same type.

    Raises:
        ValueError: unknown name; a backbone that cannot have the norm; or a model that has none of the places. Says
            what to write instead.
    """
    if name not in PLACEMENTS:
        hint = did_you_mean(name, PLACEMENTS)
        raise ValueError(f'norm {name!r} is unknown{hint}; choose one of: {", ".join(PLACEMENTS)}')
    placement = PLACEMENTS[name]
    model_cfg = copy.deepcopy(model_cfg)
    detector = model_cfg
    while 'backbone' not in detector and isinstance(detector.get('detector'), Mapping):
        detector = detector['detector']
    classifier = is_classifier(detector)
    if classifier:
        placement = _for_classifier(name, placement)
    for path, backbone in _backbones(detector, name):
        _place_in_backbone(path, backbone, name, placement, classifier)
    if placement.neck:
        _place_in_neck_and_heads(detector, name, placement)
    return model_cfg


def _for_classifier(name: str, placement: Placement) -> Placement:
    """What of a named choice there is in an image classifier, which has a backbone and a linear layer."""
    if not placement.in_classifier:
        raise ValueError(
            f"norm {name!r} sits in the convolutions of a detector's heads, and an image classifier has none: write "
            "'an', which is its backbone"
        )
    backbone = placement.classifier or placement.backbone
    return replace(placement, backbone=backbone, neck={}, box_head={}, mask_head={}, head={})


def _backbones(detector: dict, name: str) -> Iterator[tuple[str, dict]]:
    backbone = detector.get('backbone')
    if not isinstance(backbone, Mapping) or 'type' not in backbone:
        raise ValueError(
            f'norm {name!r} sits in the backbone, but model.backbone of {name_of(detector)!r} is {backbone!r}; '
            'use a config with a backbone dict'
        )
    yield 'backbone', backbone
    for neck in _parts(detector.get('neck')):
        if 'rfp_backbone' in neck:
            yield 'neck.rfp_backbone', neck['rfp_backbone']


def _place_in_backbone(path: str, backbone: dict, name: str, placement: Placement, classifier: bool) -> None:
    if norms_by_name(backbone):
        _place_by_name(backbone, name, placement, classifier)
        return
    stock = _STOCK.get(name_of(backbone), name_of(backbone))
    if not _is_host(stock, backbone, placement):
        batch_norm = is_a(norm_of(backbone), _BATCH_NORMS)
        if not (placement.norm_at or placement.backbone) and (placement.neck or batch_norm):
            return  # a name that leaves the backbone alone
        _refuse_backbone(path, backbone, name, placement, classifier)
    backbone.pop('norm_at', None)
    if name_of(backbone.get('conv_cfg')) == CENTRED['type']:
        del backbone['conv_cfg']
    norm = norm_of(backbone) or BATCH_NORM
    if 'norm_cfg' in placement.backbone:
        _place_in_whole_backbone(path, backbone, name, placement.backbone)
    elif name_of(norm) in _WHOLE_BACKBONE or (classifier and not is_a(norm, _PLAIN)):
        backbone['norm_cfg'] = copy.deepcopy(default_of(backbone, 'norm_cfg'))
    elif not is_a(norm, _BATCH_NORMS):
        _start_from_batch_norm(backbone, name)
    if stock == 'AOGNet':
        if placement.norm_at or 'norm' in backbone:
            backbone['norm'] = 'AN' if placement.norm_at else 'BN'
    elif placement.norm_at:
        _rename(backbone, HOSTS[stock])
        backbone['norm_at'] = {
            position: [_as_batch_norm(cfg[i], backbone) for i in _stages(stock, backbone)]
            if isinstance(cfg, list)
            else _as_batch_norm(cfg, backbone)
            for position, cfg in placement.norm_at.items()
        }
    elif name_of(backbone) in _STOCK:
        _rename(backbone, stock)


def _place_by_name(backbone: dict, name: str, placement: Placement, classifier: bool) -> None:
    """In a backbone that has the named norm at every convolution, as its paper has."""
    if not (classifier or placement.norm_at or placement.backbone):
        if is_a(norm_of(backbone), _BATCH_NORMS):
            return  # a name of neck and heads, beside a backbone with batch norm
        name = 'bn'
    for key in ('norm_cfg', 'norm_at'):
        backbone.pop(key, None)
    if name_of(backbone.get('conv_cfg')) == CENTRED['type']:
        del backbone['conv_cfg']
    backbone['norm'] = 'an' if name == 'an-gn-head' else name
    for key in set(placement.backbone) & set(_NOTHING_FIXED):
        backbone[key] = placement.backbone[key]


def _is_host(stock: str, backbone: dict, placement: Placement) -> bool:
    if class_of(backbone) is None:
        return False
    if stock == 'AOGNet':  # has the places of AN, and no others, by itself
        return placement.norm_at in ({}, _AN_AT)
    if placement.backbone and takes(backbone, 'norm_cfg') and stock not in _NO_HOSTS:
        return True
    return stock in HOSTS


def _place_in_whole_backbone(path: str, backbone: dict, name: str, keys: dict) -> None:
    missing = _missing_key(backbone, keys)
    if missing:
        kind = name_of(backbone)
        raise ValueError(f'norm {name!r}: model.{path}.type={kind!r} {missing}; use another norm')
    keys = dict(keys, norm_cfg=_as_batch_norm(keys['norm_cfg'], backbone))
    if 'num_groups' in keys['norm_cfg'] and 'base_channels' in backbone:  # narrower than the groups are many
        keys['norm_cfg']['num_groups'] = math.gcd(keys['norm_cfg']['num_groups'], backbone['base_channels'])
    if 'frozen_stages' in keys and takes(backbone, 'frozen_stages'):
        keys['frozen_stages'] = default_of(backbone, 'frozen_stages')  # 0 in EfficientNet, elsewhere -1
    set_keys(backbone, keys)


def _refuse_backbone(path: str, backbone: dict, name: str, placement: Placement, classifier: bool) -> None:
    kind = name_of(backbone)
    reason = _NO_HOSTS.get(kind, 'has no blocks with batch norm that it could be placed in')
    if class_of(backbone) is None:
        kind, reason = str(backbone['type']), 'is no backbone of mmdet'
    everywhere = ''
    if placement.norm_at and norm_of(backbone) and kind not in _NO_HOSTS:
        norm_cfg = next(iter(placement.norm_at.values()))
        norm_cfg = norm_cfg[0] if isinstance(norm_cfg, list) else norm_cfg
        everywhere = f', or put it at every norm by model.{path}.norm_cfg={norm_cfg}'
    alone = '' if classifier else f'. The names {", ".join(_IN_HEADS)} leave the backbone alone'
    raise ValueError(
        f'norm {name!r}: model.{path}.type={kind!r} {reason}; use one of: {", ".join(HOSTS)}{everywhere}{alone}'
    )


def _start_from_batch_norm(backbone: dict, name: str) -> None:
    """A backbone of another norm has no running statistics, so none can be frozen: they must be learned."""
    warnings.warn(
        f'norm {name!r}: model.backbone.norm_cfg is {name_of(backbone["norm_cfg"])}, whose pretrained weights hold no '
        'running statistics; using BN with norm_eval=False and frozen_stages=-1. Start from a config with BN to '
        'fine-tune pretrained weights',
        stacklevel=4,
    )
    backbone['norm_cfg'] = dict(BATCH_NORM)  # not update(): mmengine's ConfigDict would merge
    for key, value in (('norm_eval', False), ('frozen_stages', default_of(backbone, 'frozen_stages'))):
        if takes(backbone, key):
            backbone[key] = value


def _stages(stock: str, backbone: dict) -> list[int]:
    """For each stage of a backbone, the stage of a ResNet that it corresponds to."""
    p6 = stock in ('CSPDarknet', 'CSPNeXt') and backbone.get('arch') == 'P6'
    stages = list(_STAGES.get(f'{stock} P6' if p6 else stock, range(4)))
    if stock == 'EfficientNet':  # builds no stage that it does not put out
        return stages[: max(backbone.get('out_indices', (len(stages),)))]
    return stages[: backbone.get('num_stages', len(stages))]


def _as_batch_norm(norm_cfg: dict, part: dict) -> dict:
    """A copy of ``norm_cfg``, with ``eps`` and ``momentum`` of the part's batch norm where they mean the same.

    An ``eps`` of 0, as NAS-FCOS has it for caffe's weights, is left out: the other norms refuse it.
    """
    norm_cfg = copy.deepcopy(norm_cfg)
    for old in (norm_of(part), default_of(part, 'norm_cfg')):
        if isinstance(old, Mapping) and (name_of(old) in _AS_IN_BN or is_a(old, _BATCH_NORMS)):
            keys = () if norm_cfg.get('norm') == 'GN' else _AS_IN_BN.get(norm_cfg['type'], ())
            norm_cfg.update({key: old[key] for key in keys if old.get(key) and key not in norm_cfg})
            break
    return norm_cfg


def _place_in_neck_and_heads(detector: dict, name: str, placement: Placement) -> None:
    placed, left = 0, []
    for path, part, keys, place in _neck_and_heads(detector, placement):
        reason = place(part, keys)
        if reason is None:
            placed += 1
        else:
            left.append(f'model.{path} ({name_of(part)} {reason})')
    left = '; '.join(dict.fromkeys(left))  # the heads of a cascade say the same
    if not placed and not placement.backbone:
        raise ValueError(
            f'norm {name!r} sits in FPN, box and mask head, but the model has none that takes it'
            f'{": " + left if left else ""}. Use a name that sits in the backbone: {", ".join(_IN_BACKBONE)}'
        )
    if left:
        warnings.warn(f'norm {name!r}: stays without it: {left}', stacklevel=3)


def _neck_and_heads(detector: dict, placement: Placement) -> Iterator[tuple[str, dict, dict, Callable]]:
    """Path, part, keys and how to place them: returns why not, or None."""
    for neck in _parts(detector.get('neck')):
        yield 'neck', neck, placement.neck, _place_in_neck
    roi_head = detector.get('roi_head') or {}
    for key in roi_head:
        for head in _parts(roi_head[key]) if key.endswith('_head') else ():
            path = f'roi_head.{key}'
            if key == 'shared_head':
                if placement.backbone:
                    yield path, head, placement.backbone, _place_in_neck
            elif key == 'bbox_head' and name_of(head) in _BOX_HEADS + _LEGACY_BOX_HEADS:
                yield path, head, placement.box_head, _place_in_box_head
            elif key == 'mask_head' and is_a(head, 'FCNMaskHead'):
                yield path, head, placement.mask_head, _place_in_mask_head
            else:
                yield path, head, placement.head, _replace_in_head
    for key in detector:
        if key.endswith('_head') and key not in _NO_HEADS and not key.startswith('teacher'):
            for head in _parts(detector[key]):
                yield key, head, placement.head, _replace_in_head


def _place_in_neck(neck: dict, keys: dict) -> str | None:
    missing = _missing_key(neck, keys)
    if missing is None:
        set_keys(neck, dict(keys, norm_cfg=_as_batch_norm(keys['norm_cfg'], neck)))
    return missing


def _place_in_box_head(head: dict, keys: dict) -> None:
    if name_of(head) == 'ConvFCBBoxHead':
        for key in [key for key in head if key.startswith('num_') and key.endswith(('_convs', '_fcs'))]:
            del head[key]
    per_conv = isinstance(keys['norm_cfg'], list)
    if name_of(head) in _LEGACY_BOX_HEADS:
        _rename(head, 'PlusOneShared4Conv1FCBBoxHead')  # takes one norm_cfg or a list
    else:
        _rename(head, 'NormShared4Conv1FCBBoxHead' if per_conv else 'Shared4Conv1FCBBoxHead')
    head.setdefault('conv_out_channels', head.get('in_channels', 256))
    set_keys(head, keys)


def _place_in_mask_head(head: dict, keys: dict) -> str | None:
    if name_of(head) == 'NormFCNMaskHead':
        _rename(head, 'FCNMaskHead')
    missing = _missing_key(head, keys)
    if missing is None:
        set_keys(head, keys)
    return missing


def _replace_in_head(head: dict, keys: dict) -> str | None:
    """In place of the norms that the head and its inner modules have."""
    parts = list(parts_with(head, _REPLACED))
    if not parts:
        return 'has no norm to replace' if takes(head, 'norm_cfg') else 'takes no norm_cfg'
    missing = next((reason for part in parts if (reason := _missing_key(part, keys))), None)
    for part in parts if missing is None else ():
        set_keys(part, dict(keys, norm_cfg=_as_batch_norm(keys['norm_cfg'], part)))
    return missing


def _missing_key(part: dict, keys: dict) -> str | None:
    """Why the part cannot have the norm of ``keys``, if so."""
    for key, why in (('norm_cfg', ''), ('conv_cfg', ", which MABN's centred convolutions need")):
        if key in keys and not takes(part, key):
            return f'takes no {key}{why}'
    if keys['norm_cfg']['type'] in _BEHIND_CONV and (instead := _instead_of_conv(part)):
        return f'normalizes the output of {instead}, and {keys["norm_cfg"]["type"]} needs an ordinary convolution'
    return None


def _instead_of_conv(part: dict) -> str | None:
    """What a part has in front of a norm, if that is no ordinary convolution."""
    if not conv_is_plain(part):
        return f'conv_cfg={dict(part["conv_cfg"], type=name_of(part["conv_cfg"]))}'
    switched_on = [key for key in _DEFORMABLE if part.get(key, default_of(part, key)) not in (MISSING, None, 0, False)]
    if switched_on:
        return f'deformable convolutions ({switched_on[0]})'
    return _NOT_BEHIND_CONV.get(name_of(part))


def _rename(part: dict, name: str) -> None:
    """Another class. A config that writes more than names may set no scope; ours are found without, mmdet's are not."""
    plain = isinstance(part['type'], str) and '.' not in part['type']
    part['type'] = name if plain or name in MODELS.module_dict else f'mmdet.{name}'


def _parts(node) -> Iterator[dict]:
    """A part of a detector, or each of several (a chain of necks, the heads of a cascade)."""
    return (part for part in (node if isinstance(node, (list, tuple)) else [node]) if isinstance(part, Mapping))


_IN_HEADS = [name for name, p in PLACEMENTS.items() if p.neck and not (p.backbone or p.norm_at)]
_IN_BACKBONE = [name for name, p in PLACEMENTS.items() if not p.neck]
