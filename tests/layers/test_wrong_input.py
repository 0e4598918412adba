"""What is no map of the layer's channels is refused by every norm, in every mode, in one and the same sentence."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_norms.deploy import fuse
from mmdet_norms.engine.tune import tune_mode
from mmdet_norms.layers import NORMS

VARIANTS = {
    'AN-GN': lambda: NORMS['AN'](8, norm='GN', num_groups=4),
    'BNET-1': lambda: NORMS['BNET'](8, kernel_size=1),
    'BNET-7': lambda: NORMS['BNET'](8, kernel_size=7),
    'GN': lambda: NORMS['GN'](8, num_groups=2),
    'BRN-groups': lambda: NORMS['BRN'](8, norm_batch=2),
    'LN2d-CHW': lambda: NORMS['LN2d'](8, over='CHW'),
    'MABN-groups': lambda: NORMS['MABN'](8, norm_batch=2),
    'SyncBN-plain': lambda: NORMS['SyncBN'](8, affine=False, track_running_stats=False),
}
MAKE = {name: lambda cls=cls: cls(8) for name, cls in NORMS.items()} | VARIANTS
# Fewer and more channels, fewer and more dimensions, and those that a kernel would take for something else.
SHAPES = [(2, 6, 4, 4), (2, 12, 4, 4), (1, 64, 9, 9), (8, 2, 4, 4), (2, 1, 4, 4), (0, 6, 4, 4)]
SHAPES += [(2, 8), (0, 8), (2, 8, 5), (8, 4, 4), (1, 8, 8), (2, 8, 3, 4, 4), (8,), ()]
MODES = ['train', 'eval', 'norm_eval', 'frozen', 'no_grad', 'checkpoint', 'channels_last', 'float64', 'bfloat16']


def run(layer, x, mode):
    layer.train(mode != 'eval')
    if mode == 'norm_eval':
        for module in layer.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    elif mode == 'frozen':
        layer.requires_grad_(False)
    elif mode == 'channels_last' and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif mode in ('float64', 'bfloat16'):
        layer, x = layer.to(getattr(torch, mode)), x.to(getattr(torch, mode))
    with torch.set_grad_enabled(mode != 'no_grad'):
        return checkpoint(layer, x, use_reentrant=False) if mode == 'checkpoint' else layer(x)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', MAKE)
def test_every_norm_says_what_it_got_and_keeps_its_state(name, mode):
    layer = MAKE[name]()
    kind = type(layer).__name__
    run(layer, torch.randn(2, 8, 4, 4), mode)
    before = copy.deepcopy(layer.state_dict())
    for shape in SHAPES:
        said = re.escape(f'{kind}(8) got an input of shape {shape}; it must be (N, 8, H, W)')
        with pytest.raises(ValueError, match=f'^{said}$'):
            run(layer, torch.zeros(shape, requires_grad=True), mode)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    run(layer, torch.randn(2, 8, 4, 4), mode)  # nothing is broken after it


@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_numbers_that_are_not_floating_point_are_refused(name, dtype):
    for layer in (MAKE[name](), MAKE[name]().eval()):
        with pytest.raises(ValueError, match=rf'{type(layer).__name__}\(8\) got an input of {dtype}; it must be'):
            layer(torch.zeros(2, 8, 4, 4, dtype=dtype))


@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('training', [True, False])
def test_the_norm_behind_a_convolution_of_other_channels_says_it(name, training):
    for channels in (6, 12, 64):
        net = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), MAKE[name]()).train(training)
        with pytest.raises(ValueError, match=rf'\(8\).* got an input of shape \(2, {channels}, 16, 16\)'):
            net(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    'name', ['BNET', 'BNET-1', 'BNET-7', 'FrozenBN', 'GhostBN', 'SyncBN', 'BRN', 'CBN', 'MABN', 'MABN-groups']
)
def test_neither_fusing_nor_tune_mode_hides_it(name):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), MAKE[name]())
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(False)
    fused = fuse(net)
    assert fused.fuse_report.kept['1'] == 'it has 8 channels, and its convolution puts out 6'
    tuned = copy.deepcopy(net)
    tune_mode(tuned)
    for model in (fused, tuned):
        with pytest.raises(ValueError, match=r'\(8\).* got an input of shape \(2, 6, 4, 4\); it must be \(N, 8'):
            model(torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize('name', ['BNET', 'BNET-7', 'AN', 'AN-GN'])
def test_what_remains_of_a_folded_norm_refuses_it_too(name):
    fused = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), MAKE[name]()).eval())
    remains = fused[1]
    for shape in SHAPES:
        with pytest.raises(ValueError, match=r'^Folded.*\(8\) got an input of shape .*; it must be \(N, 8, H, W\)$'):
            remains(torch.randn(shape))


def test_a_shortcut_of_another_shape_is_not_spread_over_the_map():
    fused = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), NORMS['BNET'](8)).eval())
    x = torch.randn(2, 8, 4, 4)
    for shape in [(2, 8, 1, 1), (1, 8, 4, 4), (8, 4, 4), (2, 6, 4, 4), ()]:
        with pytest.raises(ValueError, match=r'FoldedBNET\(8\) got a residual of shape .*it must be .*\(2, 8, 4, 4\)'):
            fused[1](x, torch.randn(shape))


@pytest.mark.parametrize('name', ['BNET', 'AN', 'FrozenBN', 'GhostBN', 'GN', 'LN2d', 'SN', 'BRN'])
def test_compiled_code_says_it_as_well_and_asks_in_one_graph(name):
    layer = MAKE[name]().eval()
    torch.compiler.reset()
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(torch.compile(layer, backend='eager', fullgraph=True)(x), layer(x))
    with pytest.raises(ValueError, match=r'got an input of shape \(2, 6, 4, 4\)'):
        torch.compile(layer, backend='eager')(torch.randn(2, 6, 4, 4))
    torch.compiler.reset()
