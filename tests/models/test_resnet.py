"""A norm per position in mmdet's ResNets: placement, rules of mmdet that stay, pretrained batch-norm checkpoints."""

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmdet_norms  # noqa: F401
from mmdet_norms.layers import BNET

BNET5 = dict(type='BNET', kernel_size=5)


def build(**kwargs):
    torch.manual_seed(0)
    kwargs = dict(type='NormResNet', depth=50, base_channels=4, norm_at=dict(last=BNET5)) | kwargs
    return MODELS.build(kwargs)


def stock(**kwargs):
    return MODELS.build(dict(type='ResNet', depth=50, base_channels=4) | kwargs)


def blocks(backbone):
    return [block for name in backbone.res_layers for block in getattr(backbone, name)]


def randomize(model):
    """In eval mode, with statistics and affine parameters that matter."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.1), nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize('depth, count', [(18, 8), (34, 16), (50, 16), (101, 33), (152, 50)])
def test_every_block_ends_in_bnet_and_all_other_norms_stay_batch_norm(depth, count):
    backbone = build(depth=depth)
    kind = 'norm3' if depth >= 50 else 'norm2'
    assert len(blocks(backbone)) == count
    assert all(isinstance(getattr(block, kind), BNET) for block in blocks(backbone))
    assert sum(isinstance(m, BNET) for m in backbone.modules()) == count
    reference = stock(depth=depth)
    norms = [m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len([m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]) == len(norms) - count


def test_keys_and_parameter_count_are_those_of_the_published_r50():
    backbone = build(base_channels=64, norm_at=dict(last=dict(type='BNET', kernel_size=3)))
    extra = sum(p.numel() for p in backbone.parameters()) - sum(p.numel() for p in stock(base_channels=64).parameters())
    assert extra == 120_832
    keys = set(backbone.state_dict())
    assert {f'layer1.0.bnet3.{k}' for k in ('running_mean', 'bnconv.weight', 'bnconv.bias')} <= keys
    assert 'layer1.0.bn2.weight' in keys and 'layer1.0.downsample.1.weight' in keys
    assert not any('.bn3.' in key for key in keys)


@pytest.mark.parametrize('depth', [18, 50])
def test_a_batch_norm_checkpoint_of_the_stock_backbone_gives_the_identical_function(depth):
    source = randomize(stock(depth=depth))
    target = build(depth=depth)
    result = target.load_state_dict(source.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(target.eval()(x), source(x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_pretrained_init_loads_a_batch_norm_file(tmp_path, prefix):
    source = randomize(stock())
    torch.save({prefix + k: v for k, v in source.state_dict().items()}, tmp_path / 'r50.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'r50.pth'))
    if prefix:
        init_cfg['prefix'] = prefix
    target = build(init_cfg=init_cfg)
    target.init_weights()
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(target.eval()(x), source(x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_bnet_checkpoint_round_trips():
    source, target = randomize(build()), build()
    target.load_state_dict(source.state_dict(), strict=True)
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize('as_built', [True, False])  # the optimizer is made before train() is called
def test_frozen_stages_freeze_the_placed_norms_too(as_built):
    backbone = build(frozen_stages=1) if as_built else build(frozen_stages=1).train()
    for block in backbone.layer1:
        assert not block.norm3.bn.training
        assert not any(p.requires_grad for p in block.norm3.parameters())
    assert all(p.requires_grad for p in backbone.layer2[0].norm3.parameters())


def test_norm_eval_freezes_statistics_everywhere_but_trains_the_kernels():
    backbone = build(norm_eval=True).train()
    assert not any(m.training for m in backbone.modules() if isinstance(m, _BatchNorm))
    before = {k: v.clone() for k, v in backbone.state_dict().items() if 'running' in k}
    sum(out.sum() for out in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in before.items())
    assert backbone.layer4[0].norm3.bnconv.weight.grad.abs().sum() > 0


def test_activation_checkpointing_inside_blocks_gives_the_same_gradients():
    plain, saved = build(norm_eval=False).double(), build(norm_eval=False, with_cp=True).double()
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for backbone in (plain, saved):
        sum(out.square().mean() for out in backbone.train()(x.clone().requires_grad_())).backward()
    for (name, a), b in zip(plain.named_parameters(), saved.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize('depth, kind', [(18, 'norm2'), (50, 'norm3')])
@pytest.mark.parametrize('zero_init', [True, False])
def test_init_from_scratch_zeroes_the_last_norm_or_leaves_it_the_identity(depth, kind, zero_init):
    backbone = build(depth=depth, zero_init_residual=zero_init)
    backbone.init_weights()
    for block in blocks(backbone):
        conv = getattr(block, kind).bnconv
        expected = torch.zeros_like(conv.weight)
        expected[:, :, 2, 2] = 0 if zero_init else 1
        assert torch.equal(conv.weight, expected) and conv.bias.abs().max() == 0
        assert (block.norm1.weight == 1).all()


def test_conv_bn_fusion_keeps_the_backbones_function():
    backbone, x = randomize(build()).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(x)
        fused = fuse_conv_bn(backbone)
        for ours, theirs in zip(fused(x), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_list_places_one_norm_per_stage_and_none_leaves_the_stage():
    per_stage = [None, dict(type='BNET', kernel_size=3), dict(type='BNET', kernel_size=7), None]
    backbone = build(norm_at=dict(norm2=per_stage))
    kinds = [getattr(getattr(backbone, name)[0].norm2, 'kernel_size', None) for name in backbone.res_layers]
    assert kinds == [None, 3, 7, None]


def test_stem_and_downsample_are_positions_too():
    norm_at = dict(stem=BNET5, downsample=dict(type='GN', num_groups=2))
    backbone = build(norm_at=norm_at)
    assert isinstance(backbone.norm1, BNET) and isinstance(backbone.layer2[0].downsample[1], nn.GroupNorm)
    deep = build(type='NormResNetV1d', norm_at=norm_at)
    assert sum(isinstance(m, BNET) for m in deep.stem) == 3
    deep(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    'cfg',
    [
        dict(type='NormResNetV1d'),
        dict(type='NormResNeXt', groups=4, base_width=4, base_channels=64),
        dict(type='NormRegNet', arch='regnetx_400mf', depth=None, base_channels=None),
        dict(type='NormRes2Net', scales=4, base_width=26, base_channels=64),
        dict(type='NormResNeSt', base_channels=64),
    ],
    ids=lambda cfg: cfg['type'],
)
def test_the_resnet_family_takes_norms_by_position(cfg):
    cfg = {k: v for k, v in (dict(depth=50, base_channels=4, norm_at=dict(last=BNET5)) | cfg).items() if v is not None}
    backbone = MODELS.build(cfg)
    assert all(isinstance(block.norm3, BNET) for block in blocks(backbone))
    with torch.no_grad():
        backbone.eval()(torch.randn(1, 3, 64, 64))


def test_builds_without_a_default_scope_and_with_one():
    from mmengine.registry import MODELS as ROOT
    from mmengine.registry import DefaultScope, init_default_scope

    assert isinstance(ROOT.build(dict(type='NormResNet', depth=18, base_channels=4)), nn.Module)
    before = DefaultScope.get_current_instance()
    init_default_scope('mmdet')
    try:
        build()
    finally:
        if before is not None:
            init_default_scope(before.scope_name)


@pytest.mark.parametrize(
    'norm_at, message',
    [
        (dict(norm4=BNET5), "no position 'norm4'; choose from: stem, norm1"),
        (dict(last=[BNET5, None]), 'lists 2 norm_cfgs for a backbone of 4 stages'),
        (dict(last=[BNET5, 'BNET', None, None]), r"norm_at.last='BNET' must be a norm_cfg such as dict\(type="),
        (dict(last=dict(kernel_size=5)), 'must be a norm_cfg'),
        (dict(last='BNET'), r"norm_at.last='BNET' must be a norm_cfg such as dict\(type="),
        (dict(stem=[BNET5] * 4), r'norm_at.stem=\[.*\] must be a norm_cfg'),
        (dict(last=BNET5, norm3=BNET5), 'last is norm3; keep one'),
        (dict(last=dict(type='BNET', kernel_size=4)), 'kernel_size=4 must be an odd'),
        (dict(last=dict(type='BNETT')), "did you mean 'BNET'"),
    ],
)
def test_a_wrong_norm_at_is_one_clear_error(norm_at, message):
    with pytest.raises((ValueError, KeyError), match=message):
        build(norm_at=norm_at)


def test_a_position_that_the_block_lacks_names_those_it_has():
    with pytest.raises(ValueError, match='BasicBlock has no norm3; choose from: norm1, norm2, last'):
        build(depth=18, norm_at=dict(norm3=BNET5))
