"""apply_norm on image classifiers: what each name means there, and that a training and a test step work with it."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from torch import nn

from mmdet_norms import PLACEMENTS, apply_norm
from mmdet_norms.layers import AN, BNET, CBN, MABN, NORMS, CenConv2d, link_convs
from mmdet_norms.layers._args import ConfigError

# backbone, channels of its last output
RESNET = (dict(type='ResNet', depth=50, base_channels=8, norm_eval=False), 256)
BACKBONES = {
    'ResNet': (dict(type='ResNet', depth=18, base_channels=8, norm_eval=False), 64),
    'CSPDarknet': (dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.125), 128),
    'MobileNetV2': (dict(type='MobileNetV2', widen_factor=0.25), 1280),
    'AOGNet': (dict(type='AOGNet', arch='12m', norm='BN'), 824),
}
EVERYWHERE = {
    'bn': nn.BatchNorm2d,
    'cbn': CBN,
    'gn': nn.GroupNorm,
    'gn-ws': nn.GroupNorm,
    'syncbn': 'SyncBN',
    'mabn': MABN,
    'brn': 'BRN',
    'sn': 'SN',
    'rbn': 'RBN',
    'bin': 'BIN',
    'frozen': 'FrozenBN',
}


@pytest.fixture(scope='module', autouse=True)
def scope():
    init_default_scope('mmdet')


def classifier(backbone, channels, **more):
    head = dict(type='LinearClsHead', num_classes=3, in_channels=channels)
    return ConfigDict(dict(type='ImageClassifier', backbone=dict(copy.deepcopy(backbone), **more), head=head))


def norms_of(model):
    kinds = (*NORMS.values(), nn.modules.batchnorm._NormBase, nn.GroupNorm)
    found = {path: module for path, module in model.backbone.named_modules() if isinstance(module, kinds)}
    # BRN, SN and others have a batch norm inside
    return [module for path, module in found.items() if path.rpartition('.')[0] not in found]


def step(cfg):
    """One training step, and one of testing."""
    torch.manual_seed(0)
    model = MODELS.build(cfg).train()
    link_convs(model)
    images = torch.randn(4, 3, 32, 32)
    samples = [BaseDataElement(gt_label=torch.tensor(i % 3)) for i in range(4)]
    loss = model(images, samples, mode='loss')['loss']
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        found = model.eval()(images, samples, mode='predict')
    assert torch.isfinite(torch.stack([sample.pred_score for sample in found])).all()
    return model


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('name', [name for name in PLACEMENTS if name != 'an-gn-head'])
def test_every_name_trains_and_tests_or_is_refused_in_words(name, backbone):
    cfg = classifier(*BACKBONES[backbone])
    if backbone == 'AOGNet' and name.startswith('bnet'):
        with pytest.raises(ValueError, match=rf"norm '{name}': model.backbone.type='AOGNet' .*use one of: ResNet") as e:
            apply_norm(cfg, name)
        assert 'leave the backbone alone' not in str(e.value)  # which is so in a detector
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cfg = apply_norm(cfg, name)
        if name in ('gn', 'gn-ws') and backbone != 'ResNet':
            with pytest.raises(ConfigError, match=r'num_groups=32 must divide the .* write one of'):
                MODELS.build(copy.deepcopy(cfg))
            if backbone == 'AOGNet':  # 155 channels and others: no number divides them all
                return
            cfg.backbone.norm_cfg.num_groups = 4 if backbone == 'MobileNetV2' else 2
        if name == 'cbn' and backbone == 'AOGNet':
            with pytest.raises(ConfigError, match='choose another norm'):
                MODELS.build(cfg)
            return
        model = step(cfg)
    assert norms_of(model)


@pytest.mark.parametrize('name', EVERYWHERE)
def test_these_names_mean_every_norm_of_the_backbone_with_statistics_of_the_batch(name):
    cfg = apply_norm(classifier(*RESNET, frozen_stages=1, norm_eval=True), name)
    model = MODELS.build(cfg)
    kind = EVERYWHERE[name] if isinstance(EVERYWHERE[name], type) else NORMS[EVERYWHERE[name]]
    assert len(norms_of(model)) == 53 and all(isinstance(norm, kind) for norm in norms_of(model))
    if name not in ('bn', 'frozen'):  # which leave these as they are
        assert (cfg.backbone.frozen_stages, cfg.backbone.norm_eval) == (-1, False)
    convs = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]
    assert all(isinstance(conv, CenConv2d) == (name == 'mabn') for conv in convs)
    assert all(isinstance(conv, ConvWS2d) == (name == 'gn-ws') for conv in convs)


@pytest.mark.parametrize('name, kind, place', [('bnet3', BNET, 'bnet3'), ('bnet7', BNET, 'bnet3'), ('an', AN, 'bn2')])
def test_these_names_mean_one_norm_of_every_block(name, kind, place):
    model = MODELS.build(apply_norm(classifier(*RESNET), name))
    placed = [path for path, module in model.backbone.named_modules() if isinstance(module, kind)]
    assert len(placed) == 16 and all(path.endswith(f'.{place}') for path in placed)


def test_the_name_of_heads_is_refused_with_the_one_to_write():
    with pytest.raises(ValueError, match=r"norm 'an-gn-head' sits in the convolutions of a detector's heads.*'an'"):
        apply_norm(classifier(*RESNET), 'an-gn-head')
    assert [name for name, placement in PLACEMENTS.items() if not placement.in_classifier] == ['an-gn-head']


@pytest.mark.parametrize('name', ['bn', 'bnet5', 'an'])
@pytest.mark.parametrize('other', [name for name in PLACEMENTS if name != 'an-gn-head'])
def test_what_another_name_put_there_goes_first(name, other):
    plain = apply_norm(classifier(*RESNET), name)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # a classifier has no pretrained statistics to speak of
        again = apply_norm(apply_norm(classifier(*RESNET), other), name)
    for cfg in (plain, again):
        cfg.backbone.setdefault('norm_cfg', dict(type='BN', requires_grad=True))
        cfg.backbone.pop('frozen_stages', None)
    assert again == plain


def test_batch_norm_of_the_config_is_kept():
    own = dict(type='BN', momentum=0.01, eps=1e-3)
    cfg = apply_norm(classifier(*RESNET, norm_cfg=own), 'bnet5')
    assert cfg.backbone.norm_cfg == own
    assert cfg.backbone.norm_at.last == dict(type='BNET', kernel_size=5, momentum=0.01, eps=1e-3)


def test_group_norm_has_as_many_groups_as_fit():
    assert apply_norm(classifier(*RESNET), 'gn').backbone.norm_cfg.num_groups == 8
    wide = dict(type='ResNet', depth=50)
    assert apply_norm(classifier(wide, 2048), 'gn').backbone.norm_cfg.num_groups == 32


def test_the_table_of_the_documentation_says_what_each_name_means_in_a_classifier():
    text = (Path(__file__).resolve().parents[2] / 'docs' / 'train.md').read_text()
    table = re.search(r'\| where it sits in a classifier \|\n(.*?)\n\n', text, re.DOTALL)[1]
    rows = [row.strip('|').split('|') for row in table.splitlines()]
    said = {name: row[2].strip() for row in rows for name in re.findall(r'`([\w-]+)`', row[0])}
    assert {*said} == {*PLACEMENTS}
    for name, placement in PLACEMENTS.items():
        assert said[name].startswith(placement.in_classifier.partition(' is a ')[0] or 'refused'), name
