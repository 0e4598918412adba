"""Another norm in the blocks of backbones outside the ResNet family, and of the ResNets with an init of their own."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmdet_norms  # noqa: F401
from mmdet_norms.layers import AN, BNET

BNET3 = dict(type='BNET', kernel_size=3)

_STAGE = dict(num_modules=1, block='BASIC')
HRNET = dict(
    stage1=dict(_STAGE, num_branches=1, block='BOTTLENECK', num_blocks=[1], num_channels=[4]),
    stage2=dict(_STAGE, num_branches=2, num_blocks=[1, 2], num_channels=[4, 8]),
    stage3=dict(_STAGE, num_branches=3, num_blocks=[1, 1, 1], num_channels=[4, 8, 16]),
    stage4=dict(_STAGE, num_branches=4, num_blocks=[1, 1, 1, 1], num_channels=[4, 8, 16, 32]),
)
TRIDENT = dict(num_branch=2, test_branch_idx=1, trident_dilations=(1, 2), num_stages=3, out_indices=(2,))
TRIDENT |= dict(strides=(1, 2, 2), dilations=(1, 1, 1))
CSP = dict(widen_factor=0.25, deepen_factor=0.33)
# The plain backbone, and its number of blocks.
PLAIN = {
    'Darknet': (dict(type='Darknet'), 1 + 2 + 8 + 8 + 4),
    'CSPDarknet': (dict(type='CSPDarknet', **CSP), 1 + 3 + 3 + 1),
    'CSPDarknet-depthwise': (dict(type='CSPDarknet', use_depthwise=True, **CSP), 1 + 3 + 3 + 1),
    'CSPNeXt': (dict(type='CSPNeXt', **CSP), 1 + 2 + 2 + 1),
    'MobileNetV2': (dict(type='MobileNetV2', widen_factor=0.5), 1 + 2 + 3 + 4 + 3 + 3 + 1),
    'EfficientNet': (dict(type='EfficientNet', arch='b0', out_indices=(3, 4, 5)), 1 + 2 + 2 + 6 + 5),
    'EfficientNet-edge': (dict(type='EfficientNet', arch='es', out_indices=(3, 4, 5)), 1 + 2 + 4 + 9 + 2),
    'HRNet': (dict(type='HRNet', extra=HRNET), 1 + 3 + 3 + 4),
    'DetectoRS_ResNet': (dict(type='DetectoRS_ResNet', depth=50, base_channels=4), 3 + 4 + 6 + 3),
    'DetectoRS_ResNeXt': (dict(type='DetectoRS_ResNeXt', depth=50, groups=4, base_width=4), 3 + 4 + 6 + 3),
    'TridentResNet': (dict(type='TridentResNet', depth=50, base_channels=4, **TRIDENT), 3 + 4 + 6),
}


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope('mmdet')
    torch.manual_seed(0)


def build(kind, **norm_at):
    """The plain backbone, or its variant where there are positions."""
    cfg = PLAIN[kind][0]
    backbone = MODELS.build(dict(cfg, type=f'Norm{cfg["type"]}', norm_at=norm_at) if norm_at else cfg)
    for name, parameter in backbone.named_parameters():
        if 'layer3' in name and kind == 'TridentResNet' and name.endswith('conv2.weight'):
            nn.init.kaiming_normal_(parameter)  # mmdet leaves it as it finds the memory
    return backbone


def bnets(module):
    return [m for m in module.modules() if isinstance(m, BNET)]


@pytest.mark.parametrize('kind', PLAIN)
def test_every_block_ends_in_the_norm_and_a_checkpoint_of_the_plain_backbone_gives_the_same_function(kind):
    plain = build(kind)
    norm = next(m for m in plain.modules() if isinstance(m, _BatchNorm))
    variant = build(kind, last=dict(BNET3, eps=norm.eps, momentum=norm.momentum))
    blocks = PLAIN[kind][1]
    assert len(bnets(variant)) == blocks
    assert sum(isinstance(m, _BatchNorm) and m.affine for m in variant.modules()) == (
        sum(isinstance(m, _BatchNorm) for m in plain.modules()) - blocks
    )
    for m in plain.modules():  # as if trained
        if isinstance(m, _BatchNorm):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight, 1, 0.1), nn.init.normal_(m.bias, 0, 0.1)
    result = variant.load_state_dict(plain.state_dict(), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    variant.load_state_dict(variant.state_dict())
    plain, variant, x = plain.double(), variant.double(), torch.randn(2, 3, 64, 64, dtype=torch.double)
    for mode in (True, False):
        plain.train(mode)
        assert variant.train(mode) is variant
        for a, b in zip(plain(x), variant(x)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    'kind, position, path',
    [
        ('Darknet', 'norm1', 'conv_res_block1.res0.conv1.bn'),
        ('Darknet', 'norm2', 'conv_res_block1.res0.conv2.bn'),
        ('Darknet', 'last', 'conv_res_block1.res0.conv2.bn'),
        ('CSPDarknet', 'last', 'stage1.1.blocks.0.conv2.bn'),
        ('CSPDarknet-depthwise', 'norm2', 'stage1.1.blocks.0.conv2.depthwise_conv.bn'),
        ('CSPDarknet-depthwise', 'last', 'stage1.1.blocks.0.conv2.pointwise_conv.bn'),
        ('CSPNeXt', 'norm2', 'stage1.1.blocks.0.conv2.depthwise_conv.bn'),
        ('CSPNeXt', 'last', 'stage1.1.blocks.0.conv2.pointwise_conv.bn'),
        ('MobileNetV2', 'norm2', 'layer2.0.depthwise_conv.bn'),
        ('MobileNetV2', 'last', 'layer2.0.linear_conv.bn'),
        ('EfficientNet', 'last', 'layers.2.0.linear_conv.bn'),
        ('EfficientNet-edge', 'last', 'layers.1.0.conv2.bn'),
        ('HRNet', 'last', 'layer1.0.bn3'),
        ('HRNet', 'norm2', 'stage2.0.branches.1.1.bn2'),
        ('TridentResNet', 'last', 'layer3.0.bnet3'),
    ],
)
def test_positions_are_the_norms_of_a_block_in_the_order_in_which_they_run(kind, position, path):
    variant = build(kind, **{position: BNET3})
    assert isinstance(variant.get_submodule(path), BNET)


def test_the_shortcut_of_a_block_and_what_lies_between_blocks_keep_their_norms():
    placed = {name for name, m in build('HRNet', last=BNET3).named_modules() if isinstance(m, BNET)}
    assert not any('downsample' in name or 'fuse' in name or 'transition' in name for name in placed)


@pytest.mark.parametrize(
    'kind, stages',
    [('Darknet', 5), ('CSPDarknet', 4), ('CSPNeXt', 4), ('MobileNetV2', 7), ('EfficientNet', 5), ('HRNet', 4)],
)
def test_a_list_has_one_norm_per_stage(kind, stages):
    norms = [None] + [dict(type='AN', k=k) for k in range(2, stages + 1)]
    found = [m.k for m in build(kind, norm2=norms).modules() if isinstance(m, AN)]
    assert sorted(set(found)) == list(range(2, stages + 1)) and found == sorted(found)
    with pytest.raises(ValueError, match=rf'norm_at\.norm2 lists {stages + 1} norm_cfgs for a backbone of {stages} st'):
        build(kind, norm2=[*norms, BNET3])


@pytest.mark.parametrize(
    'norm_at, message',
    [
        (dict(stem=BNET3), r'norm_at\.stem: ResBlock has no stem; choose from: norm1, norm2, last'),
        (dict(norm3=BNET3), r'norm_at\.norm3: ResBlock has no norm3; choose from: norm1, norm2, last'),
        (dict(last=BNET3, norm2=BNET3), 'norm_at names one position twice: in ResBlock, last is norm2; keep one'),
        (dict(last=['BNET'] * 5), r"norm_at\.last='BNET' must be a norm_cfg such as dict\(type='BNET'"),
    ],
)
def test_a_wrong_position_says_what_there_is(norm_at, message):
    with pytest.raises(ValueError, match=message):
        build('Darknet', **norm_at)


def test_a_backbone_without_norms_has_no_position():
    cfg = dict(type='NormDarknet', norm_cfg=None, norm_at=dict(last=BNET3))
    with pytest.raises(ValueError, match=r'norm_at\.last: ResBlock has no last; choose from: none'):
        MODELS.build(cfg)


@pytest.mark.parametrize('kind', ['CSPDarknet', 'CSPNeXt', 'MobileNetV2', 'EfficientNet'])
def test_frozen_stages_freeze_the_placed_norms_from_the_start(kind):
    cfg = dict(PLAIN[kind][0], type=f'Norm{PLAIN[kind][0]["type"]}', norm_at=dict(last=BNET3), frozen_stages=2)
    variant = MODELS.build(cfg)
    first, last = bnets(variant)[0], bnets(variant)[-1]
    assert not any(p.requires_grad for p in first.parameters()) and all(p.requires_grad for p in last.parameters())
    variant.train()
    assert not first.bn.training and last.bn.training


@pytest.mark.parametrize('zero_init_residual', [True, False])
def test_the_init_of_detectors_leaves_bnet_as_batch_norm(zero_init_residual):
    cfg = PLAIN['DetectoRS_ResNet'][0] | dict(type='NormDetectoRS_ResNet', norm_at=dict(last=BNET3, norm1=BNET3))
    variant = MODELS.build(dict(cfg, zero_init_residual=zero_init_residual))
    drawn = variant.conv1.weight.clone()
    variant.init_weights()
    identity = torch.zeros(3, 3)
    identity[1, 1] = 1
    for block in (block for name in variant.res_layers for block in getattr(variant, name)):
        assert (block.norm1.bnconv.weight == identity).all()
        assert (block.norm3.bnconv.weight == (0 if zero_init_residual else identity)).all()
        assert not block.norm3.bnconv.bias.any()
    assert not torch.equal(variant.conv1.weight, drawn)
