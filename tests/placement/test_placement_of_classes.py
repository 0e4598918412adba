"""apply_norm and replace_norm_cfg on python-style configs do what they do on the same config in strings."""

import warnings

import pytest
from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from torch import nn

from helpers.python_style import CONFIGS, assert_alike, with_classes
from mmdet_norms import PLACEMENTS, apply_norm, layers

# Norms in backbone, neck, heads and shared head, conv_cfg of every kind, backbones with variants and without, cascades.
SOME = [
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py',
    'mask_rcnn/mask-rcnn_x101-32x4d_fpn_1x_coco.py',
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py',
    'gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py',
    'dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    'detectors/detectors_cascade-rcnn_r50_1x_coco.py',
    'resnest/mask-rcnn_s50_fpn_syncbn-backbone+head_ms-1x_coco.py',
    'regnet/mask-rcnn_regnetx-3.2GF_fpn_1x_coco.py',
    'hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py',
    'retinanet/retinanet_r50_fpn_1x_coco.py',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'rtmdet/rtmdet-ins_s_8xb32-300e_coco.py',
    'yolox/yolox_s_8xb8-300e_coco.py',
    'yolo/yolov3_mobilenetv2_8xb24-ms-416-300e_coco.py',
    'efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py',
    'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    'tood/tood_r50_fpn_1x_coco.py',
    'nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py',
]


@pytest.mark.parametrize('path', SOME)
def test_a_config_of_classes_becomes_what_the_same_config_of_strings_becomes(path):
    assert_alike(Config.fromfile(CONFIGS / path).model)


@pytest.mark.parametrize('scope', [None, 'mmdet'])
@pytest.mark.parametrize('name', ['bnet5', 'an', 'an-gn-head', 'cbn', 'mabn'])
def test_what_is_written_beside_classes_builds_with_and_without_a_scope(name, scope):
    """mmdet's own python-style configs set default_scope = None."""
    cfg = Config.fromfile(CONFIGS / 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    model = apply_norm(with_classes(cfg.model), name)
    ours = tuple(layers.NORMS.values())
    with DefaultScope.overwrite_default_scope(scope):
        built = MODELS.build(model)
        assert any(isinstance(module, ours) for module in built.modules())


@pytest.mark.parametrize('name', [name for name in PLACEMENTS if not PLACEMENTS[name].backbone])
@pytest.mark.parametrize('kind', [nn.BatchNorm2d, nn.SyncBatchNorm, 'torch.nn.BatchNorm2d', 'BN2d', 'mmengine.BN'])
def test_a_frozen_backbone_of_batch_norm_stays_frozen_however_it_is_spelled(name, kind):
    norm_cfg = dict(type=kind, requires_grad=False)
    backbone = ConfigDict(type=ResNet, depth=50, frozen_stages=1, norm_eval=True, norm_cfg=norm_cfg)
    model = ConfigDict(type='FasterRCNN', backbone=backbone, neck=dict(type='FPN'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        placed = apply_norm(model, name).backbone
    assert placed.norm_eval is True and placed.frozen_stages == 1 and placed.norm_cfg == norm_cfg


class OwnBatchNorm(nn.BatchNorm2d):
    pass


def test_a_subclass_of_batch_norm_has_statistics_to_start_from():
    backbone = dict(type='ResNet', depth=50, frozen_stages=1, norm_cfg=dict(type=OwnBatchNorm, eps=1e-3))
    placed = apply_norm(dict(type='RetinaNet', backbone=backbone), 'bnet3')['backbone']
    assert placed['norm_cfg']['type'] is OwnBatchNorm and placed['frozen_stages'] == 1
    assert placed['norm_at']['last'] == dict(type='BNET', kernel_size=3, eps=1e-3)
