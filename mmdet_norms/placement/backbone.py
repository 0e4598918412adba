"""The norms of a named choice in a backbone: at every norm, or at one norm of every block."""

import copy
import math
import warnings
from collections.abc import Mapping

from ..entries import class_of, name_of
from .norms import is_batch_norm, is_plain_batch_norm, loads_batch_norm
from .part import Part
from .table import BATCH_NORM, NOTHING_FIXED, PLACEMENTS, Placement

VARIANTS = {
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
"""Stock backbone -> its variant that takes ``norm_at``, a norm per position."""
_STOCK = {variant: stock for stock, variant in VARIANTS.items()}

# Why a stock backbone takes none of the names that sit in the backbone.
_WITHOUT_PLACES = {
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


def place_in_backbone(backbone: Part, name: str, placement: Placement, classifier: bool) -> None:
    """In place; norms that another name put there go first.

    Raises:
        ValueError: the backbone cannot have the norm; says which can.
    """
    in_backbone = placement.norm_at or placement.backbone
    if backbone.norms_by_name:
        if in_backbone or classifier:
            _place_by_name(backbone, name, placement)
        elif not is_batch_norm(backbone.norm):
            _place_by_name(backbone, 'bn', placement)
        return
    stock = _STOCK.get(backbone.name, backbone.name)
    if not _can_have(backbone, stock, placement):
        if not in_backbone and (placement.neck or is_batch_norm(backbone.norm)):
            return  # a name that leaves the backbone alone
        raise ValueError(_refusal(backbone, name, placement, classifier))

    backbone.cfg.pop('norm_at', None)
    backbone.drop_conv_of_norm()
    if placement.backbone:
        _place_at_every_norm(backbone, name, placement.backbone)
    else:
        _return_to_batch_norm(backbone, name, classifier)
    if stock == 'AOGNet':
        if placement.norm_at or 'norm' in backbone.cfg:
            backbone.cfg['norm'] = 'AN' if placement.norm_at else 'BN'
    elif placement.norm_at:
        backbone.rename(VARIANTS[stock])
        backbone.cfg['norm_at'] = _norm_at(backbone, stock, placement)
    elif backbone.name in _STOCK:
        backbone.rename(stock)


def _place_by_name(backbone: Part, name: str, placement: Placement) -> None:
    """In a backbone that has the named norm at every convolution, as its paper has."""
    for key in ('norm_cfg', 'norm_at'):
        backbone.cfg.pop(key, None)
    backbone.drop_conv_of_norm()
    name = 'an' if name == 'an-gn-head' else name
    if name in backbone.norms_by_name:
        backbone.cfg['norm'] = name
    else:
        norm_cfg = placement.backbone.get('norm_cfg') or next(iter(placement.norm_at.values()))
        backbone.place(dict(placement.backbone, norm_cfg=norm_cfg))
    backbone.cfg.update({key: value for key, value in placement.backbone.items() if key in NOTHING_FIXED})


def _can_have(backbone: Part, stock: str, placement: Placement) -> bool:
    if class_of(backbone.cfg) is None:
        return False
    if stock == 'AOGNet':  # has the places of AN, and no others, by itself
        return placement.norm_at in ({}, PLACEMENTS['an'].norm_at)
    everywhere = placement.backbone and backbone.takes('norm_cfg') and stock not in _WITHOUT_PLACES
    return bool(everywhere) or stock in VARIANTS


def _refusal(backbone: Part, name: str, placement: Placement, classifier: bool) -> str:
    kind = backbone.name
    reason = _WITHOUT_PLACES.get(kind, 'has no blocks with batch norm that it could be placed in')
    if class_of(backbone.cfg) is None:
        kind, reason = str(backbone.cfg['type']), 'is no backbone of mmdet'
    everywhere = ''
    if placement.norm_at and backbone.norm and kind not in _WITHOUT_PLACES:
        norm_cfg = next(iter(placement.norm_at.values()))
        norm_cfg = norm_cfg[0] if isinstance(norm_cfg, list) else norm_cfg
        everywhere = f', or put it at every norm by model.{backbone.path}.norm_cfg={norm_cfg}'
    in_heads = [name for name, other in PLACEMENTS.items() if other.neck and not (other.backbone or other.norm_at)]
    alone = '' if classifier else f'. The names {", ".join(in_heads)} leave the backbone alone'
    return (
        f'norm {name!r}: model.{backbone.path}.type={kind!r} {reason}; use one of: {", ".join(VARIANTS)}'
        f'{everywhere}{alone}'
    )


def _place_at_every_norm(backbone: Part, name: str, keys: dict) -> None:
    reason = backbone.why_not(keys)
    if reason:
        raise ValueError(f'norm {name!r}: model.{backbone.path}.type={backbone.name!r} {reason}; use another norm')
    keys = copy.deepcopy(keys)
    if 'num_groups' in keys['norm_cfg'] and 'base_channels' in backbone.cfg:  # narrower than the groups are many
        keys['norm_cfg']['num_groups'] = math.gcd(keys['norm_cfg']['num_groups'], backbone.cfg['base_channels'])
    if 'frozen_stages' in keys and backbone.takes('frozen_stages'):
        keys['frozen_stages'] = backbone.default('frozen_stages')  # 0 in EfficientNet, elsewhere -1
    backbone.place_like_batch_norm(keys)


def _return_to_batch_norm(backbone: Part, name: str, classifier: bool) -> None:
    """In place of a norm that a name put there, or that has no running statistics; kinds of batch norm stay.

    Without running statistics none can be frozen: they must be learned.
    """
    norm = backbone.norm or BATCH_NORM
    if _is_by_name(norm) or (classifier and not is_plain_batch_norm(norm)):
        backbone.cfg['norm_cfg'] = copy.deepcopy(backbone.default('norm_cfg'))
    elif not is_batch_norm(norm):
        warnings.warn(
            f'norm {name!r}: model.backbone.norm_cfg is {Part(norm).name}, whose pretrained weights hold no '
            'running statistics; using BN with norm_eval=False and frozen_stages=-1. Start from a config with BN to '
            'fine-tune pretrained weights',
            stacklevel=4,
        )
        backbone.cfg['norm_cfg'] = dict(BATCH_NORM)  # not update(): mmengine's ConfigDict would merge
        for key, value in (('norm_eval', False), ('frozen_stages', backbone.default('frozen_stages'))):
            if backbone.takes(key):
                backbone.cfg[key] = value


def _is_by_name(norm_cfg: Mapping) -> bool:
    """Whether a named choice puts it everywhere in a backbone, with weights of batch norm, so that BN may return."""
    everywhere = (other.backbone.get('norm_cfg') for other in PLACEMENTS.values())
    return loads_batch_norm(norm_cfg) and name_of(norm_cfg) in [name_of(other) for other in everywhere if other]


def _norm_at(backbone: Part, stock: str, placement: Placement) -> dict:
    return {
        position: [backbone.like_batch_norm(cfg[i]) for i in _stages(backbone, stock)]
        if isinstance(cfg, list)
        else backbone.like_batch_norm(cfg)
        for position, cfg in placement.norm_at.items()
    }


def _stages(backbone: Part, stock: str) -> list[int]:
    """For each stage of a backbone, the stage of a ResNet that it corresponds to."""
    p6 = stock in ('CSPDarknet', 'CSPNeXt') and backbone.cfg.get('arch') == 'P6'
    stages = list(_STAGES.get(f'{stock} P6' if p6 else stock, range(4)))
    if stock == 'EfficientNet':  # builds no stage that it does not put out
        return stages[: max(backbone.cfg.get('out_indices', (len(stages),)))]
    return stages[: backbone.cfg.get('num_stages', len(stages))]
