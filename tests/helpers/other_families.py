"""Stock mmdet configs beyond Faster, Mask, Cascade R-CNN and RetinaNet, small enough for a training step in a test.

``python tests/helpers/other_families.py`` writes ``docs/families.md``: what ``test_norm_on_other_families.py`` tests.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config
from mmengine.utils import get_installed_path

import mmdet_norms  # noqa: F401  (before mmdet's models, which need mmcv's ops)
from mmdet_norms.placement import VARIANTS
from mmdet_norms.placement.part import Part

DOCUMENT = Path(__file__).resolve().parents[2] / 'docs' / 'families.md'

# What replaces every norm_cfg of a model, at a width that two groups and two components fit.
NORMS = {
    'BNET': dict(type='BNET', kernel_size=3),
    'AN': dict(type='AN', k=2),
    'MABN': dict(type='MABN', B=2, real_B=4, warmup_iters=0),
    'GN': dict(type='GN', num_groups=2),
    'CBN': dict(type='CBN', burnin=0),
}


@dataclass(frozen=True, eq=False)  # hashed by identity
class Family:
    """A stock config, how to shrink it, and what its shrunk model has.

    Args:
        config: path in mmdet's configs.
        blocks: blocks of the backbone: places of BNET, and of AN.
        norms: norms of the backbone.
        neck: norms that a name for neck and heads puts into the neck.
        heads: the same for the heads.
        stays: parts that stay without, as the warning says it.
        keeps: norms of the stock model that its classes build without a ``norm_cfg``.
        unused: norms of the stock model that its forward does not reach.
        by: divisor of all widths.
        size: of the images.
        masks: whether it trains on masks.
        options: values of the model config that make it smaller.
    """

    config: str
    blocks: int = 8  # of a ResNet-18
    norms: int = 20
    neck: int = 8  # of an FPN with five outputs, of which two or one are extra
    heads: int = 0
    stays: str = ''
    keeps: int = 0
    unused: int = 0
    by: int = 32
    size: int = 64
    masks: bool = False
    options: dict = field(default_factory=dict)


def _no_norm(path: str, kind: str) -> str:
    return f'model.{path} ({kind} has no norm to replace)'


def _no_norm_cfg(path: str, kind: str) -> str:
    return f'model.{path} ({kind} takes no norm_cfg)'


_WIDEN = {'backbone.widen_factor': 1 / 16}
_HRNET = {
    'neck.in_channels': [32, 8, 16, 32],
    'backbone.extra.stage3.num_modules': 1,
    'backbone.extra.stage4.num_modules': 1,
}

FAMILIES = {
    # Dense heads with norms
    'FCOS': Family('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', heads=8),
    'ATSS': Family('atss/atss_r50_fpn_1x_coco.py', heads=8),
    'GFL': Family('gfl/gfl_r50_fpn_1x_coco.py', heads=8),
    'PAA': Family('paa/paa_r50_fpn_1x_coco.py', heads=8),
    'AutoAssign': Family('autoassign/autoassign_r50-caffe_fpn_1x_coco.py', heads=8),
    'NAS-FPN': Family('nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py', neck=54, heads=40, size=128),
    'YOLOF': Family(
        'yolof/yolof_r50-c5_8xb8-1x_coco.py', neck=0, heads=6, keeps=14,
        stays=_no_norm_cfg('neck', 'DilatedEncoder'),
    ),
    'HRNet': Family(
        'hrnet/fcos_hrnetv2p-w32-gn-head_4xb4-1x_coco.py', blocks=40, norms=115, neck=0, heads=8, by=8, options=_HRNET,
        stays=_no_norm_cfg('neck', 'HRFPN'),
    ),
    'YOLOv3': Family(
        'yolo/yolov3_mobilenetv2_8xb24-ms-416-300e_coco.py', blocks=17, norms=52, neck=17, heads=3, by=1, unused=1,
    ),
    'YOLOX': Family('yolox/yolox_s_8xb8-300e_coco.py', norms=35, neck=27, heads=12, by=8, options=_WIDEN),
    'RTMDet': Family('rtmdet/rtmdet_s_8xb32-300e_coco.py', 6, 39, neck=31, heads=12, by=8, options=_WIDEN),
    'RTMDet-Ins': Family(
        'rtmdet/rtmdet-ins_s_8xb32-300e_coco.py', 6, 39, neck=31, heads=16, by=8, masks=True,
        options=_WIDEN,
    ),
    'SSDLite': Family(
        'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', blocks=17, norms=52, neck=12, heads=12, by=1, size=96
    ),
    'SOLO': Family('solo/solo_r50_fpn_1x_coco.py', heads=14, masks=True),
    'SOLOv2': Family('solov2/solov2_r50_fpn_1x_coco.py', heads=16, masks=True),
    'CondInst': Family(
        'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', heads=15, masks=True,
        options={'mask_head.num_layers': 3},
    ),
    # Dense heads without norms
    'FoveaBox': Family('foveabox/fovea_r50_fpn_4xb4-1x_coco.py', stays=_no_norm('bbox_head', 'FoveaHead')),
    'FreeAnchor': Family(
        'free_anchor/freeanchor_r50_fpn_1x_coco.py', stays=_no_norm('bbox_head', 'FreeAnchorRetinaHead')
    ),
    'FSAF': Family('fsaf/fsaf_r50_fpn_1x_coco.py', stays=_no_norm('bbox_head', 'FSAFHead')),
    'YOLACT': Family(
        'yolact/yolact_r50_1xb8-55e_coco.py', masks=True,
        stays=f'{_no_norm("bbox_head", "YOLACTHead")}; {_no_norm_cfg("mask_head", "YOLACTProtonet")}',
    ),
    'CenterNet': Family(
        'centernet/centernet_r18_8xb16-crop512-140e_coco.py', neck=0, keeps=6, by=8,
        stays=f'{_no_norm_cfg("neck", "CTResNetNeck")}; {_no_norm_cfg("bbox_head", "CenterNetHead")}',
    ),
    # Transformers
    'Sparse R-CNN': Family(
        'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', stays=_no_norm_cfg('roi_head.bbox_head', 'DIIHead')
    ),
    'DETR': Family('detr/detr_r50_8xb2-150e_coco.py', neck=1, stays=_no_norm_cfg('bbox_head', 'DETRHead')),
    'Deformable DETR': Family(
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', neck=4, options={'bbox_head.embed_dims': 8},
        stays=_no_norm_cfg('bbox_head', 'DeformableDETRHead'),
    ),
    'Mask2Former': Family('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', neck=0, heads=5, masks=True),
    # Relatives of Faster and Mask R-CNN
    'DetectoRS (RFP)': Family('detectors/cascade-rcnn_r50-rfp_1x_coco.py', blocks=32, norms=106, heads=12),
    'HTC': Family('htc/htc-without-semantic_r50_fpn_1x_coco.py', heads=26, masks=True),
    'Libra R-CNN': Family('libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py', neck=9, heads=4),
    'GRoIE': Family('groie/faste-rcnn_r50_fpn_groie_1x_coco.py', heads=4),
    'Dynamic R-CNN': Family('dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py', heads=4),
    'Double-Head R-CNN': Family('double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py', heads=12, keeps=3),
    'Grid R-CNN': Family('grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py', heads=12, keeps=1),
    'PAFPN': Family('pafpn/faster-rcnn_r50_pafpn_1x_coco.py', neck=14, heads=4),
    'PointRend': Family(
        'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py', heads=5, masks=True,
        stays=_no_norm('roi_head.point_head', 'MaskPointHead'),
    ),
    # Deformable convolutions
    'TOOD': Family('tood/tood_r50_fpn_1x_coco.py', heads=8),
    'VFNet': Family('vfnet/vfnet_r50_fpn_1x_coco.py', heads=7),
    'RepPoints': Family('reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py', heads=6),
    'DDOD': Family('ddod/ddod_r50_fpn_1x_coco.py', heads=8),
    'NAS-FCOS': Family(
        'nas_fcos/nas-fcos_r50-caffe_fpn_fcoshead-gn-head_4xb4-1x_coco.py', neck=12, heads=8, keeps=10
    ),
}  # fmt: skip

# Norms behind something else than an ordinary convolution, which CBN refuses in the first training step.
REFUSED = [('TOOD', 'CBN'), ('DDOD', 'CBN'), ('NAS-FCOS', 'CBN')]

_WIDTHS = (
    'in_channels', 'out_channels', 'feat_channels', 'conv_out_channels', 'fc_out_channels', 'channels', 'embed_dims',
    'feedforward_channels', 'num_feats', 'conv_kernel_size', 'rfp_inplanes', 'aspp_out_channels', 'num_channels',
    'proposal_feature_channel', 'num_deconv_filters', 'inter_channels',
)  # fmt: skip
_SIZES = dict(
    nms_pre=50, max_per_img=10, nms_post=20, max_num=20, num_proposals=10, num_queries=10, frozen_stages=-1,
    norm_eval=False, batch_augments=None, pretrained=None, num_groups=2,
)  # fmt: skip
_RESNETS = ('ResNet', 'NormResNet')
_BOTTLENECKS_ONLY = ('DetectoRS_ResNet', 'NormDetectoRS_ResNet')


def stock_config(family: Family) -> Config:
    """The config as it is."""
    return Config.fromfile(Path(get_installed_path('mmdet')) / '.mim' / 'configs' / family.config)


def shrink(model: dict, family: Family) -> None:
    """Narrow and shallow, nothing frozen, nothing downloaded; the structure stays."""
    _shrink(model, family.by)
    for key, value in family.options.items():
        *path, last = key.split('.')
        part = model
        for name in path:
            part = part[name]
        part[last] = value


def _shrink(node, by: int) -> None:
    if isinstance(node, (list, tuple)):
        for entry in node:
            _shrink(entry, by)
    if not isinstance(node, dict):
        return
    kind = node.get('type')
    if kind in _RESNETS:
        node['base_channels'] = (64 if node['depth'] < 50 else 256) // by  # a Bottleneck puts out four times that
        node['depth'] = 18
    elif kind in _BOTTLENECKS_ONLY:
        node['base_channels'] = 64 // by
    elif kind == 'AN' and node.get('norm') == 'GN':
        node['num_groups'] = 2
    elif kind == 'RandomSampler':
        node['num'] = 16
    norm = Part(node).norm
    if norm and norm['type'] == 'GN':
        node['norm_cfg'] = dict(norm, num_groups=2)  # perhaps its class's default
    for key, value in node.items():
        if key in _SIZES:
            node[key] = _SIZES[key]
        elif key in _WIDTHS:
            node[key] = _narrow(value, by)
        elif key == 'num_layers' and value > 1:
            node[key] = 1
        elif key == 'init_cfg' and isinstance(value, dict) and value.get('type') == 'Pretrained':
            node[key] = None
        else:
            _shrink(value, by)


def _narrow(value, by: int):
    if isinstance(value, (list, tuple)):
        return [_narrow(v, by) for v in value]
    return value // by if isinstance(value, int) and value >= 64 else value


def render() -> str:
    """``docs/families.md``."""
    rows = [
        ['family', *NORMS, '`--norm gn` goes to', 'and stays out of', 'tested config'],
        ['---', *[':-:'] * len(NORMS), '---', '---', '---'],
    ]
    for name, family in FAMILIES.items():
        cells = ['2' if (name, norm) in REFUSED else '\u2713' for norm in NORMS]
        parts = [part for part, count in (('neck', family.neck), ('heads', family.heads)) if count]
        stays = re.sub(r'model\.| takes no norm_cfg| has no norm to replace', '', family.stays)
        rows.append([name, *cells, ' and '.join(parts) or 'refused', stays or '-', f'`{family.config}`'])
    rows.append(['SSD', *['1'] * len(NORMS), 'neck', 'bbox_head (SSDHead)', '`ssd/ssd300_coco.py`'])
    table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
    return _TEXT.format(table=table, families=len(FAMILIES), backbones=', '.join(f'`{name}`' for name in VARIANTS))


_TEXT = """\
# Norms on other families of detectors

Generated from `tests/helpers/other_families.py` by `python tests/helpers/other_families.py`, and checked by
`MMDET_NORMS_TESTS=all make test`, which runs what it says (`make test` two norms of each family): {families} stock
mmdet configs, with narrower layers and a ResNet-18 in place of a ResNet-50.

## Every norm of a model

    from mmdet_norms import replace_norm_cfg
    cfg.model = replace_norm_cfg(cfg.model, dict(type='BNET', kernel_size=5))

puts one `norm_cfg` in place of every other, also of those that a class has by default (for MABN, with
`conv_cfg=dict(type='CenConv')`). A \u2713: all norms of the model are of that kind, a training step gives finite losses
and a gradient to each, and a test step finite detections.

{table}

1. Has no norms, so there is nothing to replace: refused.
2. CBN has to stand behind an ordinary convolution, here it would stand behind a deformable one or (TOOD) a product of
   matrices: the layer refuses it in the first training step. `--norm cbn` leaves such heads and necks as they are.

Some classes build norms without asking `norm_cfg`; those stay batch norm or group norm: `CTResNetNeck` (CenterNet),
`DilatedEncoder` (YOLOF), `NASFCOS_FPN`, the first block of `DoubleConvFCBBoxHead`, the transposed convolutions of
`GridHead`, `DyHead`. PAA needs scikit-learn to train. mmdet 3.3.0 cannot predict with an `SSDHead`, whatever the norm.

## `--norm NAME`

| names | where, in any detector |
|---|---|
| `bnet3`, `bnet5`, `bnet7` | last norm of every block of the backbone |
| `an`, `an-gn-head` | second norm of every block of the backbone; `an-gn-head` also neck (GN) and heads (AN) |
| `mabn`, `gn-ws`, `brn`, `sn`, `rbn`, `bin` | all norms of the backbone, nothing frozen; neck and heads |
| `cbn`, `gn`, `syncbn` | neck and heads |
| `frozen` | all norms of the backbone |

A block is what a shortcut may bridge. Backbones with such places: {backbones}. They load
checkpoints of the plain backbone, as the identical function where the norm allows it. `AOGNet` has places of its own
for AN. Any other backbone that takes a `norm_cfg` takes `brn`, `sn`, `rbn`, `bin` and `frozen`, and with a `conv_cfg`
also `mabn` and `gn-ws`; transformers, `SSDVGG` and `HourglassNet` are refused, and so are backbones of other packages.

The neck gets the norm if it takes a `norm_cfg`; the heads of Faster and Mask R-CNN as `docs/norms.md` says; every other
head in place of the norms that it has. A part that stays without is named in one warning. The RPN never changes.

## What to expect

* Heads that all pyramid levels share (FCOS, ATSS, GFL, PAA, SOLO, ...) have GN for a reason: with BN, BNET, CBN, MABN,
  AN(BN), BRN or SN their running statistics mix the levels, and CBN and MABN count each level as an iteration. YOLOX,
  YOLOv3, RTMDet and NAS-FPN's RetinaNet have norms per level.
* MABN needs centred convolutions. CSPNeXt, ResNeSt, switchable atrous, deformable and Trident convolutions are built
  without asking `conv_cfg`; a warning names the norms behind them when training starts.
* Deformable convolutions (TOOD, VFNet, RepPoints, DDOD, NAS-FCOS, any config with `dcn`) need no compiled mmcv: beside
  `mmcv-lite` torchvision computes them on a GPU, where it is installed, and else PyTorch, at several times the cost of
  an ordinary convolution.
* `num_groups=32` has to divide the widths; narrow models (YOLOX-tiny) need
  `--cfg-options model.neck.norm_cfg.num_groups=16 model.bbox_head.norm_cfg.num_groups=16`.
"""


if __name__ == '__main__':
    DOCUMENT.write_text(render(), encoding='utf-8')
