"""The norms of a named choice, put where they belong in a model config."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..entries import is_classifier, name_of
from ..errors import did_you_mean
from .backbone import place_in_backbone
from .heads import place_in_neck_and_heads
from .part import Part, parts_of
from .table import PLACEMENTS, Placement


def apply_norm(model_cfg: Mapping, name: str) -> Mapping:
    """The model config with the norms of a named choice; norms that another name put into the backbone go first.

    A name that sits in the backbone only (``bn``, ``bnet5``, ``an``, ``frozen``) leaves neck and heads as the config
    has them; the others say what goes there. What a name means in a detector that its paper did not have:

    * *Last* (``bnet*``) or *second* (``an*``) *norm of every block of the backbone*: the block is the unit that a
      shortcut may bridge: of a ResNet, HRNet, Darknet, CSPDarknet, CSPNeXt, MobileNetV2 or EfficientNet (see
      ``models/norm_at.py``). AN has 10 components up to stride 8, 20 beyond. ``eps`` and ``momentum`` of the
      backbone's batch norm are kept, so that its pretrained weights remain the identical function. AOGNet has places
      of its own for AN, and none for BNET.
    * *Backbone* (``mabn``, ``gn-ws``, ``brn``, ``sn``, ``rbn``, ``bin``, ``frozen``): all norms of any backbone that
      takes a ``norm_cfg``. The backbone inside a recursive feature pyramid (DetectoRS) counts as one; but for
      ``frozen``, so does the shared RoI head of C4 detectors. ``mabn`` and ``gn-ws`` bring their convolutions, in place
      of ordinary ones only.
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
    for backbone in _backbones(detector, name):
        place_in_backbone(backbone, name, placement, classifier)
    if placement.neck:
        place_in_neck_and_heads(detector, name, placement)
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


def _backbones(detector: Mapping, name: str) -> Iterator[Part]:
    backbone = detector.get('backbone')
    if not isinstance(backbone, Mapping) or 'type' not in backbone:
        raise ValueError(
            f'norm {name!r} sits in the backbone, but model.backbone of {name_of(detector)!r} is {backbone!r}; '
            'use a config with a backbone dict'
        )
    yield Part(backbone, 'backbone')
    for neck in parts_of(detector.get('neck')):
        if 'rfp_backbone' in neck.cfg:
            yield Part(neck.cfg['rfp_backbone'], 'neck.rfp_backbone')
