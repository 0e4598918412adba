"""Every family of detectors with every ``--norm``: a training and a test step, on ``shapes`` and on photos in turn."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from helpers.small_configs import shrink
from mmdet_norms import PLACEMENTS
from mmdet_norms.cli.common import load_config
from mmdet_norms.cli.train import parse_args
from mmdet_norms.datasets import shapes
from mmdet_norms.entries import mappings

PHOTOS = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'coco_mini'
FAMILIES = {
    'faster-rcnn': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask-rcnn': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'retinanet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'cascade-rcnn': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'cascade-mask-rcnn': 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
}
WIDTH = 64  # 32 groups of GN fit


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """The generated data set, a few images of it."""
    folder = tmp_path_factory.mktemp('shapes')
    shapes.make_shapes(folder, num_train=8, num_val=2)
    return folder


def load(family, root, norm):
    """What ``tools/train.py mmdet::... --norm NORM --data-root ROOT`` trains, at a quarter of the width."""
    cfg = load_config(parse_args([f'mmdet::{FAMILIES[family]}', '--norm', norm, '--data-root', str(root)]))
    narrow(cfg.model)
    cfg.model.backbone.update(base_channels=WIDTH // 4, init_cfg=None)
    if norm == 'gn-ws':
        cfg.model.backbone.norm_cfg.num_groups = WIDTH // 4
    cfg.model.neck.update(in_channels=[WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH])
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False, batch_size=2 if loader is cfg.train_dataloader else 1)
        for step in loader.dataset.pipeline:
            if step['type'] == 'Resize':
                step['scale'] = (160, 128)
    return cfg


def narrow(model):
    shrink(model, out_channels=WIDTH, feat_channels=WIDTH, conv_out_channels=WIDTH)
    for _, part in mappings(model):
        if part.get('in_channels') == 256:
            part['in_channels'] = WIDTH


@cache
def batches(root):
    """A batch to train on and one to test, with masks, which detectors of boxes leave aside."""
    cfg = load('mask-rcnn', root, 'bn')
    loaders = [Runner.build_dataloader(cfg[f'{split}_dataloader'], seed=0) for split in ('train', 'test')]
    return [next(iter(loader)) for loader in loaders]


def step(family, norm, root):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    cfg = load(family, root, norm)
    train_batch, test_batch = (copy.deepcopy(batch) for batch in batches(root))
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    losses = model.train_step(train_batch, build_optim_wrapper(model, cfg.optim_wrapper))
    assert all(value.isfinite().all() for value in losses.values())
    after = dict(model.named_parameters())
    assert all(after[name].isfinite().all() for name in before)
    assert sum(not torch.equal(after[name], value) for name, value in before.items()) > len(before) / 2
    model.eval()
    with torch.no_grad():
        (sample,) = model.test_step(test_batch)
    assert sample.pred_instances.bboxes.isfinite().all() and sample.pred_instances.scores.isfinite().all()
    assert ('masks' in sample.pred_instances) == ('mask' in family)


PAIRS = [(family, norm) for family in FAMILIES for norm in PLACEMENTS]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('family, norm', PAIRS[::2])
def test_a_step_of_training_and_one_of_testing_on_shapes(family, norm, drawn):
    step(family, norm, drawn)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('family, norm', PAIRS[1::2])
def test_a_step_of_training_and_one_of_testing_on_photos(family, norm, drawn):
    step(family, norm, PHOTOS if PHOTOS.is_dir() else drawn)
