"""The norms of a named choice in neck and heads."""

import warnings
from collections.abc import Callable, Iterator, Mapping

from ..entries import is_a
from .norms import is_of_maps
from .part import Part, all_parts, parts_of
from .table import PLACEMENTS, Placement

# Box heads of Faster R-CNN, which become 4conv1fc heads; those of published checkpoints keep their box convention.
_BOX_HEADS = ('Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead', 'NormShared4Conv1FCBBoxHead', 'ConvFCBBoxHead')
_LEGACY_BOX_HEADS = ('PlusOneShared2FCBBoxHead', 'PlusOneShared4Conv1FCBBoxHead')

# Keys of a detector that end like those of its heads.
_NO_HEADS = ('roi_head', 'rpn_head', 'panoptic_fusion_head')


def place_in_neck_and_heads(detector: Mapping, name: str, placement: Placement) -> None:
    """In place; what stays without the norm is named in a warning.

    Raises:
        ValueError: nothing takes it, and the backbone does not have it either.
    """
    placed, left = 0, []
    for part, keys, place in _neck_and_heads(detector, placement):
        reason = place(part, keys)
        if reason is None:
            placed += 1
        else:
            left.append(f'model.{part.path} ({part.name} {reason})')
    left = '; '.join(dict.fromkeys(left))  # the heads of a cascade say the same
    if not placed and not placement.backbone:
        in_backbone = ', '.join(name for name, other in PLACEMENTS.items() if not other.neck)
        raise ValueError(
            f'norm {name!r} sits in FPN, box and mask head, but the model has none that takes it'
            f'{": " + left if left else ""}. Use a name that sits in the backbone: {in_backbone}'
        )
    if left:
        warnings.warn(f'norm {name!r}: stays without it: {left}', stacklevel=3)


def _neck_and_heads(detector: Mapping, placement: Placement) -> Iterator[tuple[Part, dict, Callable]]:
    """Each part, the keys for it and how to place them: a function that returns why not, or None."""
    for neck in parts_of(detector.get('neck'), 'neck'):
        yield neck, placement.neck, _in_every_norm
    roi_head = detector.get('roi_head') or {}
    for key in [key for key in roi_head if key.endswith('_head')]:
        for head in parts_of(roi_head[key], f'roi_head.{key}'):
            if key == 'shared_head':  # of C4 detectors: the last stage of the backbone
                if placement.backbone:
                    yield head, placement.backbone, _in_every_norm
            elif key == 'bbox_head' and head.name in _BOX_HEADS + _LEGACY_BOX_HEADS:
                yield head, placement.box_head, _in_box_head
            elif key == 'mask_head' and is_a(head.cfg, 'FCNMaskHead'):
                yield head, placement.mask_head, _in_mask_head
            else:
                yield head, placement.head, _in_place_of_norms
    for key in detector:
        if key.endswith('_head') and key not in _NO_HEADS and not key.startswith('teacher'):
            for head in parts_of(detector[key], key):
                yield head, placement.head, _in_place_of_norms


def _in_every_norm(part: Part, keys: dict) -> str | None:
    reason = part.why_not(keys)
    if reason is None:
        part.place_like_batch_norm(keys)
    return reason


def _in_box_head(head: Part, keys: dict) -> None:
    """Four convolutions, each with the norm, and one fc layer."""
    if head.name == 'ConvFCBBoxHead':
        for key in [key for key in head.cfg if key.startswith('num_') and key.endswith(('_convs', '_fcs'))]:
            del head.cfg[key]
    if head.name in _LEGACY_BOX_HEADS:
        head.rename('PlusOneShared4Conv1FCBBoxHead')  # takes one norm_cfg or a list
    else:
        per_conv = isinstance(keys['norm_cfg'], list)
        head.rename('NormShared4Conv1FCBBoxHead' if per_conv else 'Shared4Conv1FCBBoxHead')
    head.cfg.setdefault('conv_out_channels', head.cfg.get('in_channels', 256))
    head.place(keys)


def _in_mask_head(head: Part, keys: dict) -> str | None:
    if head.name == 'NormFCNMaskHead':
        head.rename('FCNMaskHead')
    reason = head.why_not(keys)
    if reason is None:
        head.place(keys)
    return reason


def _in_place_of_norms(head: Part, keys: dict) -> str | None:
    """In place of the norms that a head and its inner modules have."""
    parts = [part for part in all_parts(head.cfg) if part.norm and is_of_maps(part.norm)]
    if not parts:
        return 'has no norm to replace' if head.takes('norm_cfg') else 'takes no norm_cfg'
    reason = next((reason for part in parts if (reason := part.why_not(keys))), None)
    for part in parts if reason is None else ():
        part.place_like_batch_norm(keys)
    return reason
