"""``tools/train.py mmdet::... --norm bnet5`` on stock mmdet configs: the command's own config, one training step."""

import os

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path
from torch import nn

from helpers import small_configs
from helpers.meta import on_meta
from mmdet_norms.cli.common import load_config
from mmdet_norms.cli.train import parse_args
from mmdet_norms.entries import mappings
from mmdet_norms.layers import BNET

# Number of residual blocks of the backbone, all of which end in the new norm.
STOCK = {
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': 16,
    'faster_rcnn/faster-rcnn_r50-caffe_fpn_ms-1x_coco.py': 16,
    'faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py': 13,  # stage 4 is in the head, which keeps its norms
    'faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py': 16,
    'regnet/faster-rcnn_regnetx-400MF_fpn_ms-3x_coco.py': 22,
    'resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py': 16,
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': 16,
    'mask_rcnn/mask-rcnn_r50-caffe_fpn_ms-poly-1x_coco.py': 16,
    'gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py': 16,
    'gcnet/mask-rcnn_r50-syncbn-gcb-r16-c3-c5_fpn_1x_coco.py': 16,
    'retinanet/retinanet_r18_fpn_1x_coco.py': 8,
    'retinanet/retinanet_r50_fpn_1x_coco.py': 16,
    'regnet/retinanet_regnetx-800MF_fpn_1x_coco.py': 16,
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py': 16,
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': 16,
}
# Built only, without memory for the weights: a longer form of one above, too slow for a step here, or (ResNeXt, whose
# blocks mmdet does not zero-init) not finite without the pretrained statistics.
BUILT_ONLY = {
    'cascade_rcnn/cascade-rcnn_r50-caffe_fpn_1x_coco.py': 16,
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_20e_coco.py': 16,
    'retinanet/retinanet_r101-caffe_fpn_1x_coco.py': 33,
    'faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py': 33,
    'gn+ws/mask-rcnn_x50-32x4d_fpn_gn-ws-all_2x_coco.py': 16,
    'faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py': 33,
    'faster_rcnn/faster-rcnn_x101-64x4d_fpn_1x_coco.py': 33,
    'mask_rcnn/mask-rcnn_r101-caffe_fpn_1x_coco.py': 33,
    'res2net/mask-rcnn_res2net-101_fpn_2x_coco.py': 33,
    'cascade_rcnn/cascade-mask-rcnn_r101_fpn_1x_coco.py': 33,
    'resnest/cascade-rcnn_s101_fpn_syncbn-backbone+head_ms-range-1x_coco.py': 33,
}


def command_config(path, norm='bnet5'):
    """The config that ``tools/train.py mmdet::PATH --norm NORM`` trains."""
    name = f'mmdet::{path}'
    if '+' in path:  # mmengine's :: syntax knows no such folder
        name = os.path.join(get_installed_path('mmdet'), '.mim', 'configs', path)
    cfg = load_config(parse_args([name, '--norm', norm]))
    assert 'mmdet_norms' in cfg.custom_imports.imports  # what is dumped to the work dir runs in stock mmdet
    return cfg


def shrink(model):
    """No downloads, fewer proposals and narrower fc layers; nothing that the backbone could notice."""
    small_configs.shrink(model)
    for _, part in mappings(model):
        if (part.get('init_cfg') or {}).get('type') == 'Pretrained':
            part['init_cfg'] = None


def bnets(model):
    return [module for module in model.modules() if isinstance(module, BNET)]


def off_centre(layer):
    weight = layer.bnconv.weight.detach().clone()
    centre = layer.kernel_size // 2
    weight[:, :, centre, centre] = 0
    return weight


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope('mmdet')
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize('path, blocks', STOCK.items(), ids=lambda value: str(value).rpartition('/')[2])
def test_a_stock_config_trains_with_the_norm_of_the_command_line(path, blocks):
    cfg = command_config(path)
    shrink(cfg.model)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))  # as mmengine's Runner does with one process
    model.init_weights()
    model.train()
    assert len(bnets(model.backbone)) == len(bnets(model)) == blocks
    assert all(layer.kernel_size == 5 and not off_centre(layer).any() for layer in bnets(model))

    from mmdet.testing import demo_mm_inputs  # imports mmcv's ops, which mmdet_norms may have to supply first

    data = demo_mm_inputs(2, [[3, 64, 64], [3, 64, 64]], num_items=[2, 1], with_mask=model.with_mask)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    losses = model.train_step(data, optim_wrapper)

    assert all(value.isfinite().all() for value in losses.values())
    # Around its centre a kernel starts at 0 and weight decay leaves it there: a nonzero one got a gradient.
    trainable = [layer for layer in bnets(model) if layer.bnconv.weight.requires_grad]
    assert len(trainable) >= blocks - 4  # frozen stages
    assert all(off_centre(layer).any() for layer in trainable)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('path, blocks', BUILT_ONLY.items(), ids=lambda value: str(value).rpartition('/')[2])
def test_a_larger_stock_config_builds_with_the_norm_of_the_command_line(path, blocks):
    cfg = command_config(path)
    with on_meta():
        model = MODELS.build(cfg.model)
    assert len(bnets(model.backbone)) == len(bnets(model)) == blocks


@pytest.mark.parametrize('norm, kernel_size', [('bnet3', 3), ('bnet7', 7)])
def test_the_other_names_do_the_same_with_their_kernel(norm, kernel_size):
    cfg = command_config('retinanet/retinanet_r50_fpn_1x_coco.py', norm)
    with on_meta():
        model = MODELS.build(cfg.model)
    assert [layer.kernel_size for layer in bnets(model)] == [kernel_size] * 16


def test_the_name_bn_leaves_a_stock_detector_as_it_is():
    cfg = command_config('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', 'bn')
    with on_meta():
        model = MODELS.build(cfg.model)
    assert type(model.backbone).__name__ == 'ResNet' and not bnets(model)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules()) == 53
