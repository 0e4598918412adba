"""What ``--norm NAME`` and the config names mean: which part of a detector gets which norm."""

from dataclasses import dataclass, field

from .part import CENTRED, STANDARDIZED

BATCH_NORM = dict(type='BN', requires_grad=True)
GROUP_NORM = dict(type='GN', num_groups=32, requires_grad=True)


@dataclass(frozen=True)
class Placement:
    """One named choice: the config keys that each part of a detector gets; a part without keys stays as it is.

    A ``norm_cfg`` that is a list has one entry per stage of the backbone, or per convolution of the box head.
    """

    where: str  # for people: which norms of a detector it replaces
    in_classifier: str = 'the same'  # which norms of an image classifier; empty if it has nothing for one
    norm_at: dict = field(default_factory=dict)  # position in every block of the backbone -> norm_cfg
    backbone: dict = field(default_factory=dict)  # all norms of the backbone; without keys, they are batch norm
    neck: dict = field(default_factory=dict)  # an FPN, or whatever neck there is
    box_head: dict = field(default_factory=dict)  # of a Faster R-CNN: becomes four convolutions and one fc layer
    mask_head: dict = field(default_factory=dict)  # of a Mask R-CNN
    head: dict = field(default_factory=dict)  # every other head, where the stock detector has norms (FCOS, RTMDet, ...)
    classifier: dict = field(default_factory=dict)  # as `backbone`, where a classifier's gets other keys


_EVERY = 'every norm of the backbone'
NOTHING_FIXED = dict(norm_eval=False, frozen_stages=-1)  # where statistics are learned, not pretrained


def at_last(norm_cfg: dict) -> Placement:
    """As in the BNET paper."""
    return Placement(
        where='last norm of every residual block of the backbone (norm3 of a Bottleneck); all others stay BN',
        norm_at=dict(last=norm_cfg),
    )


def in_heads(norm_cfg: dict, **conv_cfg: dict) -> Placement:
    """As in the CBN paper: next to a backbone whose batch norm is fixed (``norm_eval``, as in stock configs)."""
    keys = dict(norm_cfg=norm_cfg, **conv_cfg)
    return Placement(
        where='FPN, 4conv1fc box head and mask head; the backbone keeps the (frozen) BN of its config',
        in_classifier=_EVERY,
        **dict.fromkeys(('neck', 'box_head', 'mask_head', 'head'), keys),
        classifier=keys | NOTHING_FIXED,
    )


def everywhere(norm_cfg: dict, convs: str = '', **conv_cfg: dict) -> Placement:
    """As in the MABN paper: all but the RPN, nothing frozen."""
    keys = dict(norm_cfg=norm_cfg, **conv_cfg)
    return Placement(
        where='backbone, FPN, 4conv1fc box head and mask head; nothing frozen',
        in_classifier=f'{_EVERY}{convs}',
        backbone=keys | NOTHING_FIXED,
        **dict.fromkeys(('neck', 'box_head', 'mask_head', 'head'), keys),
    )


def _an(norm: str) -> list[dict]:
    """Four AN layers with the published number of components: of the four stages, or of the box head's convolutions."""
    return [dict(type='AN', norm=norm, k=k) for k in (10, 10, 20, 20)]


PLACEMENTS: dict[str, Placement] = {
    'bn': Placement('batch norm everywhere in the backbone, as in stock mmdet: the baseline', in_classifier=_EVERY),
    'bnet3': at_last(dict(type='BNET', kernel_size=3)),
    'bnet5': at_last(dict(type='BNET', kernel_size=5)),
    'bnet7': at_last(dict(type='BNET', kernel_size=7)),
    'cbn': in_heads(dict(type='CBN', buffer_num=3, burnin=8)),
    'gn': in_heads(GROUP_NORM),
    'syncbn': in_heads(dict(type='SyncBN', requires_grad=True)),
    'gn-ws': everywhere(GROUP_NORM, ', behind weight-standardized convolutions', conv_cfg=STANDARDIZED),
    'mabn': everywhere(dict(type='MABN', B=2, real_B=32), ', behind centred convolutions', conv_cfg=CENTRED),
    'brn': everywhere(dict(type='BRN')),
    'sn': everywhere(dict(type='SN')),
    'rbn': everywhere(dict(type='RBN')),
    'bin': everywhere(dict(type='BIN')),
    'an': Placement(
        where='second norm of every block of the backbone (bn2), 10, 10, 20, 20 components in the four stages',
        norm_at=dict(norm2=_an('BN')),
    ),
    'an-gn-head': Placement(
        where='as `an`, and AN(GN) with 10, 10, 20, 20 components in the four convolutions of a 4conv1fc box head, GN '
        'in FPN and mask head',
        in_classifier='',
        norm_at=dict(norm2=_an('BN')),
        neck=dict(norm_cfg=GROUP_NORM),
        box_head=dict(norm_cfg=_an('GN')),
        mask_head=dict(norm_cfg=GROUP_NORM),
        head=dict(norm_cfg=dict(type='AN', norm='GN', k=10)),
    ),
    'frozen': Placement(
        where=f'{_EVERY} is a fixed affine map (needs pretrained weights)',
        backbone=dict(norm_cfg=dict(type='FrozenBN')),
    ),
}
