"""Residual blocks of a fused model: the last BNET adds the shortcut and applies ReLU itself."""

import copy
import pickle

import pytest
import torch
from mmcv.cnn import build_plugin_layer
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from torch import nn

from mmdet_norms import fuse
from mmdet_norms.deploy import residual
from mmdet_norms.kernels import compiled, depthwise_compiled
from mmdet_norms.registry import MODELS

BNET5 = dict(type='BNET', kernel_size=5)
SMALL = dict(base_channels=4, norm_at=dict(last=BNET5), norm_eval=False)
BACKBONES = {
    'ResNet-18': (dict(type='NormResNet', depth=18, **SMALL), 8),
    'ResNet-50': (dict(type='NormResNet', depth=50, stem_channels=4, **SMALL), 16),
    'checkpointing': (dict(type='NormResNet', depth=18, with_cp=True, **SMALL), 8),
    'ResNeXt': (dict(type='NormResNeXt', depth=50, groups=4, base_width=4, stem_channels=4, **SMALL), 16),
    'pooled shortcut': (dict(type='NormResNetV1d', depth=50, stem_channels=4, **SMALL), 16),
}


def settled(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in model.modules():
            if isinstance(getattr(module, 'running_mean', None), torch.Tensor):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.3, 2)
    model.eval()
    return model


def bottleneck(norm, **options):
    made = Bottleneck(16, 4, **options)
    made._modules.pop('bn3')
    made.norm3_name = 'bnet3'
    made.add_module('bnet3', MODELS.build(dict(num_features=16, **norm)))
    return made


def basic(norm, **options):
    made = BasicBlock(16, 16, **options)
    made._modules.pop('bn2')
    made.norm2_name = 'bnet2'
    made.add_module('bnet2', MODELS.build(dict(num_features=16, **norm)))
    return made


BLOCKS = {Bottleneck: bottleneck, BasicBlock: basic}


def block(kind=Bottleneck, norm=BNET5, **options):
    return settled(BLOCKS[kind](norm, **options))


@pytest.mark.parametrize('kind', BACKBONES)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_every_block_ends_in_one_pass_and_no_number_changes(kind, dtype, tolerance):
    cfg, blocks = BACKBONES[kind]
    model = settled(MODELS.build(cfg)).to(dtype)
    fused = fuse(model)
    assert len(fused.fuse_report.joined) == blocks
    assert f'{blocks} residual blocks end in one pass (layer1.0, ...)' in str(fused.fuse_report)
    x = torch.randn(1, 3, 64, 80, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            for ours, theirs in zip(fused(x.contiguous(memory_format=layout)), model(x)):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize('kind', [Bottleneck, BasicBlock])
def test_the_input_of_a_block_stays_as_it_is(kind):
    fused, x = fuse(block(kind)), torch.randn(2, 16, 9, 7)
    before = x.clone()
    with torch.no_grad():
        fused(x)
    assert torch.equal(x, before)


@pytest.mark.skipif(compiled.library() is None, reason='installed without a C compiler')
def test_the_map_of_the_last_convolution_becomes_the_output(monkeypatch):
    calls = []
    run = depthwise_compiled.inference
    monkeypatch.setattr(depthwise_compiled, 'inference', lambda *args: calls.append(args) or run(*args))
    y = fuse(block())(torch.randn(2, 16, 9, 7))
    ((x, _, _, shortcut, relu, inplace),) = calls
    assert relu and inplace and shortcut is not None
    assert y.data_ptr() == x.data_ptr()


@pytest.mark.parametrize('kind', [Bottleneck, BasicBlock])
def test_gradients_of_the_input_are_those_of_the_block(kind):
    plain = block(kind).double()
    grads = []
    for model in (plain, fuse(plain)):
        x = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_a_watched_part_shows_what_it_does_in_a_plain_block():
    fused, x, seen = fuse(block()), torch.randn(1, 16, 6, 6), []
    with torch.no_grad():
        expected = fused(x)
        for part in (fused.conv3, fused.norm3, fused.relu):
            handle = part.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
            torch.testing.assert_close(fused(x), expected)
            handle.remove()
    torch.testing.assert_close((seen[1] + x).relu(), expected)
    torch.testing.assert_close(fused.norm3(seen[0]), seen[1])


def test_blocks_that_do_more_at_their_end_stay_as_they_are():
    plugin = dict(cfg=dict(type='ContextBlock', ratio=0.25), position='after_conv3')
    after = block(plugins=[plugin])
    assert build_plugin_layer(plugin['cfg'], in_channels=16)  # one that exists
    other_act = block()
    other_act.relu = nn.LeakyReLU()
    own_forward = block()
    own_forward.__class__ = type('Own', (Bottleneck,), dict(forward=lambda self, x: Bottleneck.forward(self, x) + 1))
    for model in (after, other_act, own_forward):
        fused = fuse(model)
        assert not fused.fuse_report.joined and len(fused.fuse_report.reduced) == 1
        x = torch.randn(1, 16, 6, 6)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_plugins_before_the_last_convolution_still_run():
    plugins = [dict(cfg=dict(type='ContextBlock', ratio=0.5, postfix=i), position=f'after_conv{i}') for i in (1, 2)]
    model = block(plugins=plugins)
    fused, x = fuse(model), torch.randn(1, 16, 6, 6)
    assert fused.fuse_report.joined == ['']
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_and_a_second_fusion_end_the_same_way():
    fused, x = fuse(block()), torch.randn(1, 16, 6, 6)
    again = fuse(fused)
    assert again.fuse_report.joined == ['']
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), again):
        assert type(other) is type(fused) and isinstance(other, Bottleneck) and repr(other) == repr(fused)
        assert isinstance(other, residual._Joined)
        assert torch.equal(other(x), fused(x))


def test_the_traced_graph_is_made_of_torchs_operators():
    fused, x = fuse(block()), torch.randn(1, 16, 6, 6)
    traced = torch.jit.trace(fused, x)
    torch.testing.assert_close(traced(x), fused(x))
    graph = torch.export.export(fused, (x,)).graph
    assert all('mmdet_norms' not in str(node.target) for node in graph.nodes)
