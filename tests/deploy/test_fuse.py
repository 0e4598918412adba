"""``fuse(model)``: what it folds, what it leaves alone, and that no number changes."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.model.efficient_conv_bn_eval import efficient_conv_bn_eval_forward, turn_on_efficient_conv_bn_eval
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from matrix.harness import batch, ready
from matrix.norms import BNETS, NORMS
from mmdet_norms import fuse
from mmdet_norms.layers import BNET, CBN, CenConv2d, FrozenBN, link_convs
from mmdet_norms.layers._fold import Folded
from mmdet_norms.layers.an import FoldedAN
from mmdet_norms.layers.bnet import FoldedBNET
from mmdet_norms.registry import MODELS

VANISHES = ('BN', 'SyncBN', 'FrozenBN', 'BRN', 'CBN', 'MABN')
VANISHES += ('BN norm_batch', 'BRN norm_batch', 'MABN norm_batch')
REMAINS = {**dict.fromkeys(BNETS, FoldedBNET), 'AN-BN': FoldedAN, 'AN-GN': FoldedAN}
STAYS = ('GN', 'IN', 'LN2d', 'LN2d CHW', 'SN', 'RBN', 'BIN')


def settled(module, seed=0):
    """Running statistics, weights and biases that are nowhere at their default; in eval mode and float64."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, low, high in (('running_mean', -1, 1), ('running_var', 0.3, 2)):
            if isinstance(getattr(part, name, None), torch.Tensor):
                getattr(part, name).uniform_(low, high, generator=generator)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    module.double().eval()
    return module


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def unchanged(model, *inputs, tolerance=1e-12):
    """The fused model, after checking that it puts out what ``model`` does."""
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    fused = fuse(twin)
    for ours, theirs in zip(_flat(fused(*inputs)), _flat(before(*inputs))):
        assert theirs.isfinite().all() and theirs.std() > 0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    return fused


def _flat(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


class Chain(nn.Module):
    """A host with a forward of one's own: ``Chain(run, conv=..., norm=...)``."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


# ------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize('norm', NORMS)
def test_a_conv_module_computes_the_same_with_any_norm(norm):
    module = ready(norm).eval()
    fused = unchanged(copy.deepcopy(module).double(), batch(9, (3, 4, 7, 5), dtype=torch.float64))
    unchanged(module, batch(9, (3, 4, 7, 5)), tolerance=1e-5)
    kind = Folded if norm in VANISHES else REMAINS.get(norm, type(module.norm))
    assert type(fused.norm) is kind
    assert type(fused.conv) is nn.Conv2d
    report = fused.fuse_report
    name = f'{module.norm_name}'
    assert (name in report.folded, name in report.reduced, name in report.kept) == (
        norm in VANISHES,
        norm in REMAINS,
        norm in STAYS,
    )


@pytest.mark.filterwarnings('ignore:Unnecessary conv bias')
def test_a_batch_norm_is_folded_by_the_formula():
    module = settled(ConvModule(3, 4, 3, norm_cfg=dict(type='BN', eps=0.1), bias=True, act_cfg=None))
    conv, bn = module.conv, module.bn
    factor = bn.weight / (bn.running_var + 0.1) ** 0.5
    fused = fuse(module)
    torch.testing.assert_close(fused.conv.weight, conv.weight * factor[:, None, None, None])
    torch.testing.assert_close(fused.conv.bias, (conv.bias - bn.running_mean) * factor + bn.bias)


def test_cbn_is_folded_with_eps_outside_of_the_root():
    conv, norm = nn.Conv2d(3, 4, 1, bias=False), CBN(4, eps=0.5)
    model = settled(nn.Sequential(conv, norm))
    factor = norm.weight / (norm.running_var**0.5 + 0.5)
    fused = unchanged(model, noise(2, 3, 4, 4))
    torch.testing.assert_close(fused[0].weight, conv.weight * factor[:, None, None, None])


def test_mabn_is_folded_into_the_centred_weight():
    model = settled(ConvModule(3, 4, 3, norm_cfg=dict(type='MABN'), conv_cfg=dict(type='CenConv'), act_cfg=None))
    weight, norm = model.conv.weight, model.norm
    factor = norm.weight / (norm.running_var.flatten() + 1e-5) ** 0.5
    fused = unchanged(model, noise(2, 3, 6, 6))
    expected = (weight - weight.mean((1, 2, 3), keepdim=True)) * factor[:, None, None, None]
    torch.testing.assert_close(fused.conv.weight, expected)
    torch.testing.assert_close(fused.conv.bias, norm.bias)
    assert type(fused.conv) is nn.Conv2d


def test_a_centred_convolution_that_a_hook_watches_stays():
    model = settled(ConvModule(3, 4, 3, norm_cfg=dict(type='GN', num_groups=2), conv_cfg=dict(type='CenConv')))
    seen = []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(module))
    fused = unchanged(model, noise(2, 3, 6, 6))
    assert isinstance(fused.conv, CenConv2d)


def test_a_centred_convolution_without_a_norm_to_fold_becomes_a_plain_one():
    for norm_cfg in (dict(type='GN', num_groups=2), None, dict(type='AN', k=2)):
        model = settled(ConvModule(3, 4, 3, norm_cfg=norm_cfg, conv_cfg=dict(type='CenConv'), act_cfg=None))
        assert type(unchanged(model, noise(2, 3, 6, 6)).conv) is nn.Conv2d


@pytest.mark.parametrize('kernel_size', [3, 5, 7])
def test_bnet_is_exact_at_the_borders_too(kernel_size):
    module = settled(ConvModule(3, 4, 3, padding=1, norm_cfg=dict(type='BNET', kernel_size=kernel_size), act_cfg=None))
    x = noise(2, 3, 9, 9)
    fused = unchanged(module, x)
    # the tempting alternative: mean into the bias of the depthwise convolution
    norm = module.norm
    std = (norm.bn.running_var + norm.bn.eps).sqrt()
    kernels = norm.bnconv.weight / std[:, None, None, None]
    bias = norm.bnconv.bias - kernels.sum((1, 2, 3)) * norm.bn.running_mean
    wrong = F.conv2d(module.conv(x), kernels, bias, padding=kernel_size // 2, groups=4)
    edge = kernel_size // 2
    inner = (..., slice(edge, 9 - edge), slice(edge, 9 - edge))
    torch.testing.assert_close(wrong[inner], fused(x)[inner])
    assert not torch.allclose(wrong, fused(x), atol=1e-3)


@pytest.mark.parametrize('kernel_size', [3, 5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_the_depthwise_convolution_of_a_bnet_is_one_in_every_layout_and_dtype(kernel_size, dtype, layout):
    model = settled(nn.Sequential(conv(), BNET(4, kernel_size=kernel_size)))
    rest = fuse(model)[1].to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.03}[dtype]
    for x in (noise(2, 4, 9, 7), noise(2, 4, 18, 14)[..., ::2, ::2], noise(0, 4, 9, 7)):
        x = x.to(dtype).to(memory_format=layout) if x.is_contiguous() else x.to(dtype)
        y = rest(x)
        expected = F.conv2d(x.double(), rest.weight.double(), rest.bias.double(), padding=kernel_size // 2, groups=4)
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        assert y.dtype == dtype and y.stride() == torch.empty_like(x, memory_format=torch.preserve_format).stride()


def test_an_keeps_its_attention_and_no_batch_norm():
    fused = fuse(settled(ConvModule(4, 8, 3, norm_cfg=dict(type='AN', k=3), act_cfg=None)))
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
    assert fused.norm.attention.weight.shape == (3, 8) and fused.norm.mixture.shape == (3, 16)


@pytest.mark.parametrize('cfg', [dict(norm='BN', k=3), dict(norm='GN', k=3, num_groups=2)])
class TestFoldedAN:
    @pytest.mark.parametrize('shape', [(0, 4, 5, 5), (1, 4, 1, 1), (3, 4, 1, 1), (2, 4, 1, 7)])
    def test_empty_batches_and_single_values(self, cfg, shape):
        model = settled(ConvModule(4, 4, 1, norm_cfg=dict(type='AN', **cfg), act_cfg=None))
        x = noise(*shape)
        torch.testing.assert_close(fuse(model)(x), model(x))

    @pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
    def test_means_far_from_zero(self, cfg, layout):
        model = settled(ConvModule(4, 4, 1, norm_cfg=dict(type='AN', **cfg), act_cfg=None))
        x = (noise(2, 4, 9, 9) + 1e4).to(memory_format=layout)
        torch.testing.assert_close(fuse(model).float()(x.float()).double(), model(x), rtol=1e-3, atol=0.05)

    def test_under_autocast_and_in_half_precision(self, cfg):
        model = settled(ConvModule(4, 4, 3, norm_cfg=dict(type='AN', **cfg), act_cfg=None)).float()
        x = noise(2, 4, 9, 9).float()
        expected, fused = model(x), fuse(model)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            half = fused(x)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.1)
        torch.testing.assert_close(fused.half()(x.half()).float(), expected, rtol=0.01, atol=0.03)


# ------------------------------------------------------------------------------------------------------ convolutions


CONVS = {
    'bias': dict(bias=True),
    'grouped': dict(groups=2),
    'depthwise': dict(groups=4),
    'stride and dilation': dict(stride=2, dilation=2),
    'reflected borders': dict(padding=1, padding_mode='reflect'),
    'circular borders': dict(padding=1, padding_mode='circular'),
    'transposed': dict(conv_cfg=dict(type='deconv'), stride=2),
    'transposed, grouped, bias': dict(conv_cfg=dict(type='deconv'), stride=2, groups=2, bias=True),
    'padded by a subclass': dict(conv_cfg=dict(type='Conv2dAdaptivePadding'), stride=2),
    'wrapped by mmcv': dict(conv_cfg=dict(type='Conv')),
}


@pytest.mark.filterwarnings('ignore:Unnecessary conv bias')
@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), dict(type='BNET', kernel_size=3)], ids=['BN', 'BNET'])
@pytest.mark.parametrize('kind', CONVS)
def test_any_convolution_takes_the_norm(kind, norm_cfg):
    module = settled(ConvModule(4, 8, 3, norm_cfg=norm_cfg, act_cfg=None, **CONVS[kind]))
    fused = unchanged(module, noise(2, 4, 8, 8))
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())


@pytest.mark.parametrize('dims', [1, 3])
def test_other_numbers_of_axes(dims):
    conv, norm = getattr(nn, f'Conv{dims}d'), getattr(nn, f'BatchNorm{dims}d')
    fused = unchanged(settled(nn.Sequential(conv(2, 4, 3), norm(4))), noise(2, 2, *[6] * dims))
    assert isinstance(fused[1], Folded)


def test_a_subclass_that_computes_its_weight_keeps_its_norm():
    module = settled(ConvModule(4, 8, 3, norm_cfg=dict(type='BN'), conv_cfg=dict(type='ConvWS'), act_cfg=None))
    fused = unchanged(module, noise(2, 4, 8, 8))
    assert 'more than an affine map' in fused.fuse_report.kept['bn']


def test_a_parametrized_convolution_keeps_its_norm():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    assert '1' in unchanged(settled(model), noise(2, 3, 6, 6)).fuse_report.kept


def test_a_layer_of_one_s_own_is_asked():
    class Halved(nn.Module):
        def forward(self, x):
            return x / 2

        def fold_into(self, conv):
            conv.weight.data /= 2
            conv.bias.data /= 2

    fused = unchanged(settled(nn.Sequential(nn.Conv2d(3, 4, 3), Halved())), noise(2, 3, 6, 6))
    assert fused.fuse_report.folded == {'1': '0'} and fused.fuse_report.types == {'1': 'Halved'}


def test_a_frozen_batch_norm_of_mmdet_is_folded():
    from mmdet.models.layers.brick_wrappers import FrozenBatchNorm2d

    fused = unchanged(settled(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))), noise(2, 3, 6, 6))
    assert isinstance(fused[1], Folded)


def test_a_batch_norm_without_affine_step_and_one_without_statistics():
    fused = unchanged(settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))), noise(2, 3, 6, 6))
    assert isinstance(fused[1], Folded)
    for norm in ('BN', 'SyncBN'):
        norm = MODELS.get(norm)(4, track_running_stats=False)
        fused = unchanged(settled(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), noise(2, 3, 6, 6))
        assert fused.fuse_report.kept == {'1': 'it has no running statistics'}


def test_memory_format_dtype_and_device_stay():
    model = settled(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).to(memory_format=torch.channels_last)
    x = noise(2, 4, 8, 8).to(memory_format=torch.channels_last)
    fused = unchanged(model, x)
    assert fused[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fused(x).is_contiguous(memory_format=torch.channels_last)
    assert fuse(model.bfloat16())[0].bias.dtype == torch.bfloat16


@pytest.mark.parametrize('norm', ['BN', 'BNET-5', 'CBN', 'MABN', 'AN-BN'])
def test_bf16_rounds_no_worse_than_unfused(norm):
    module = ready(norm).eval()
    x = batch(9, (3, 4, 7, 5))
    expected = module(x)
    plain = (copy.deepcopy(module).bfloat16()(x.bfloat16()).float() - expected).norm()
    fused = (fuse(module).bfloat16()(x.bfloat16()).float() - expected).norm()
    assert fused < 2 * plain + 0.01 * expected.norm()


# ------------------------------------------------------------------------------------------------- which convolution


def conv(channels=4):
    return nn.Conv2d(4, channels, 3, padding=1)


def bn(channels=4):
    return nn.BatchNorm2d(channels)


def test_the_order_of_calls_counts_not_that_of_registration():
    """mmcv's fusion would put ``first`` into ``late``, and ``second`` nowhere."""
    model = settled(
        Chain(
            lambda m, x: m.second(m.late(F.relu(m.first(m.early(x))))),
            second=bn(),
            late=conv(),
            first=bn(),
            early=conv(),
        )
    )
    fused = unchanged(model, noise(2, 4, 6, 6))
    assert fused.fuse_report.folded == {'second': 'late', 'first': 'early'}


def test_a_norm_may_be_called_by_keyword():
    model = settled(Chain(lambda m, x: m.norm(input=m.conv(x)), conv=conv(), norm=bn()))
    assert unchanged(model, noise(2, 4, 6, 6)).fuse_report.folded == {'norm': 'conv'}


def test_a_norm_before_its_convolution_stays():
    module = settled(ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), order=('norm', 'conv', 'act')))
    fused = unchanged(module, noise(2, 4, 6, 6))
    assert fused.fuse_report.kept == {'bn': 'its input is not the output of a convolution'}


ALONE = {
    'output used twice': lambda m, x: m.norm(y := m.conv(x)) + y,
    'output changed between': lambda m, x: m.norm(m.conv(x) * 2),
    'two norms': lambda m, x: m.norm(y := m.conv(x)) + m.other(y),
    'norm of two convolutions': lambda m, x: m.norm(m.conv(x)) + m.norm(m.twin(x)),
    'convolution also without norm': lambda m, x: m.norm(m.conv(x)) + m.conv(x + 1),
    'weight read beside': lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(),
    'norm of an input too': lambda m, x: m.norm(m.conv(x)) + m.norm(x),
}


@pytest.mark.parametrize('case', ALONE)
def test_a_pair_that_is_not_alone_stays(case):
    model = settled(Chain(ALONE[case], conv=conv(), norm=bn(), other=bn(), twin=conv()))
    fused = unchanged(model, noise(2, 4, 6, 6))
    assert 'norm' in fused.fuse_report.kept
    assert type(fused.norm) is nn.BatchNorm2d


def test_tied_weights_stay():
    model = settled(Chain(lambda m, x: m.norm(m.conv(x)) + m.twin(x), conv=conv(), norm=bn(), twin=conv()))
    model.twin.weight = model.conv.weight
    assert 'norm' in unchanged(model, noise(2, 4, 6, 6)).fuse_report.kept


def test_a_head_shared_over_levels_is_folded():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.ModuleList(ConvModule(4, 4, 3, padding=1, norm_cfg=dict(type='BN')) for _ in range(2))

        def forward(self, levels):
            assert len(levels) == 3  # nothing that symbolic tracing could answer
            return tuple(self.tower[1](self.tower[0](level)) for level in levels)

    fused = unchanged(settled(Head()), [noise(2, 4, n, n) for n in (8, 4, 2)])
    assert fused.fuse_report.folded == {'tower.0.bn': 'tower.0.conv', 'tower.1.bn': 'tower.1.conv'}


def test_convolutions_shared_over_levels_with_a_norm_per_level_stay():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList(ConvModule(4, 4, 3, padding=1, norm_cfg=dict(type='BN')) for _ in range(3))
            for tower in self.towers:
                tower.conv = self.towers[0].conv

        def forward(self, levels):
            assert len(levels) == 3
            return tuple(tower(level) for tower, level in zip(self.towers, levels))

    fused = unchanged(settled(Head()), [noise(2, 4, n, n) for n in (8, 4, 2)])
    assert not fused.fuse_report.folded
    assert set(fused.fuse_report.kept.values()) == {'its convolution also feeds other modules'}


def test_parts_of_a_forward_that_cannot_be_traced_are_folded_each_for_itself():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(), bn()
            self.inner = ConvModule(4, 4, 3, norm_cfg=dict(type='BN'))

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.inner(x) if float(x.sum()) < 1e9 else x

    fused = unchanged(settled(nn.Sequential(conv(), bn(), Picky())), noise(2, 4, 6, 6))
    report = fused.fuse_report
    assert set(report.folded) == {'1', '2.inner.bn'}
    assert 'the forward of Picky cannot be traced' in report.kept['2.norm']


def test_a_module_in_a_plain_list_stays():
    model = settled(Chain(lambda m, x: m.norms[0](m.conv(x)), conv=conv(), norm=bn()))
    model.norms = [model.norm]
    assert 'several places' in unchanged(model, noise(2, 4, 6, 6)).fuse_report.kept['norm']


def test_a_pair_under_two_names_is_folded_where_every_use_is_seen():
    model = settled(Chain(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=bn()))
    model.alias = model.norm
    fused = unchanged(model, noise(2, 4, 6, 6))
    assert isinstance(fused.norm, Folded) and fused.alias is fused.norm


@pytest.mark.parametrize('part', [0, 1])
def test_what_a_hook_watches_stays(part):
    model = settled(nn.Sequential(conv(), bn()))
    seen = []
    model[part].register_forward_hook(lambda module, args, output: seen.append(output))
    fused = unchanged(model, noise(2, 4, 6, 6))
    assert fused.fuse_report.kept == {'1': 'a hook watches it or its convolution'}
    torch.testing.assert_close(seen[0], seen[1])


def test_the_link_of_a_cbn_to_its_convolution_does_not_matter_and_goes():
    model = settled(nn.Sequential(conv(), CBN(4)))
    link_convs(model)
    fused = unchanged(model, noise(2, 4, 6, 6))
    assert isinstance(fused[1], Folded) and not fused[0]._forward_hooks


@pytest.mark.parametrize('conv_type', ['Conv2d', 'CenConv'])
def test_efficient_evaluation_by_mmcv_is_undone_and_folded(conv_type):
    module = ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), conv_cfg=dict(type=conv_type), efficient_conv_bn_eval=True)
    fused = unchanged(settled(module), noise(2, 4, 6, 6))
    assert isinstance(fused.norm, Folded)


def test_efficient_evaluation_by_mmengine_is_undone_and_folded():
    model = nn.Sequential(settled(nn.Sequential(conv(), bn(), nn.ReLU())))
    expected = model(noise(2, 4, 6, 6))
    turn_on_efficient_conv_bn_eval(model, '0')
    fused = fuse(model)
    torch.testing.assert_close(fused(noise(2, 4, 6, 6)), expected)
    assert isinstance(fused[0][1], Folded)


def test_efficient_evaluation_of_a_centred_convolution_uses_the_centred_weight():
    module = settled(ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), conv_cfg=dict(type='CenConv'), act_cfg=None))
    x, expected = noise(2, 4, 6, 6), module(noise(2, 4, 6, 6))
    torch.testing.assert_close(efficient_conv_bn_eval_forward(module.norm, module.conv, x), expected)
    module.turn_on_efficient_conv_bn_eval()
    torch.testing.assert_close(module(x), expected)
    assert isinstance(module.conv, CenConv2d)


# -------------------------------------------------------------------------------------------------------- backbones


def backbone(**cfg):
    return settled(MODELS.build(dict(norm_eval=False, **cfg)))


BOTTLENECKS = dict(depth=50, base_channels=8, stem_channels=8)
BACKBONES = {
    'basic blocks': dict(type='mmdet.ResNet', depth=18, base_channels=4),
    'bottlenecks, checkpointing': dict(type='mmdet.ResNet', with_cp=True, **BOTTLENECKS),
    'deep stem, pooled shortcut': dict(type='mmdet.ResNetV1d', **BOTTLENECKS),
    'grouped': dict(type='mmdet.ResNeXt', groups=4, base_width=4, **BOTTLENECKS),
    'BNET': dict(type='NormResNet', norm_at=dict(last=dict(type='BNET')), **BOTTLENECKS),
    'AN': dict(type='NormResNet', norm_at=dict(norm2=dict(type='AN', k=2)), **BOTTLENECKS),
    'BNET everywhere': dict(
        type='NormResNetV1d', norm_cfg=dict(type='BNET'), norm_at=dict(downsample=dict(type='MABN')), **BOTTLENECKS
    ),
    'hierarchical': dict(type='NormRes2Net', scales=4, base_width=4, depth=50, norm_at=dict(last=dict(type='BNET'))),
    'split attention': dict(type='mmdet.ResNeSt', norm_cfg=dict(type='BN'), **BOTTLENECKS),
}


@pytest.mark.parametrize('kind', BACKBONES)
def test_every_batch_norm_of_a_residual_network_goes(kind):
    model = backbone(**BACKBONES[kind])
    fused = unchanged(model, noise(1, 3, 64, 64), tolerance=1e-10)
    assert not any(isinstance(m, (_BatchNorm, BNET)) for m in fused.modules())
    assert not fused.fuse_report.kept
    if hasattr(fused, 'norm1'):
        assert isinstance(fused.norm1, Folded)
    if kind.endswith('checkpointing'):
        assert fused.layer1[0].with_cp and model.layer1[0].with_cp


def test_an_aognet_keeps_only_the_norms_behind_sums():
    arch = dict(filter_list=(8, 16, 32), blocks=(1, 1), dims=(2, 2), pruning=(1, 1), dropout=(0, 0))
    model = settled(MODELS.build(dict(type='AOGNet', arch=arch, out_indices=(0, 1))))
    report = unchanged(model, noise(1, 3, 32, 32), tolerance=1e-10).fuse_report
    assert set(report.kept.values()) <= {'its input is not the output of a convolution'}
    assert len(report.folded) > 10 * len(report.kept)


# -------------------------------------------------------------------------------------------------- the fused model


@pytest.fixture
def small():
    model = nn.Sequential(
        ConvModule(3, 4, 3, norm_cfg=dict(type='BN')),
        ConvModule(4, 4, 3, norm_cfg=dict(type='BNET')),
        ConvModule(4, 4, 3, norm_cfg=dict(type='AN', k=2)),
        ConvModule(4, 4, 3, norm_cfg=dict(type='GN', num_groups=2)),
    )
    return settled(model)


def test_the_given_model_stays_as_it_is(small):
    small.train()
    before = copy.deepcopy(small.state_dict())
    fused = fuse(small)
    assert small.training and not fused.training
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert all(p.requires_grad for p in small.parameters())


def test_in_place_the_given_model_is_fused(small):
    expected, x = small(noise(1, 3, 12, 12)), noise(1, 3, 12, 12)
    assert fuse(small, inplace=True) is small
    torch.testing.assert_close(small(x), expected)
    assert isinstance(small[0].norm, Folded)


def test_a_model_in_training_mode_is_fused_with_its_running_statistics(small):
    expected = small(noise(1, 3, 12, 12))
    torch.testing.assert_close(fuse(small.train())(noise(1, 3, 12, 12)), expected)


def test_fusing_again_changes_nothing(small):
    once = fuse(small)
    twice = fuse(once)
    assert twice is not once and repr(twice) == repr(once)
    assert twice.fuse_report == once.fuse_report
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(value, twice.state_dict()[key]) for key, value in once.state_dict().items())


def test_the_report_counts_norms_and_parameters(small):
    report = fuse(small).fuse_report
    assert report.folded == {'0.bn': '0.conv'}
    assert report.reduced == {'1.bnet': 'FoldedBNET', '2.bn': 'FoldedAN'}
    assert report.kept == {'3.gn': 'its statistics come from the input'}
    # convs 3*4*9 and three times 4*4*9; BN 4+4; BNET 4*9+4; AN tables 2*8, attention 2*4, its norm 2+2; GN 4+4
    before = 108 + 3 * 144 + 8 + 40 + (16 + 8 + 4) + 8
    # two conv biases; kernels as before; AN: attention 2*4+2, mixture 2*8; GN 4+4
    assert report.parameters == (before, 108 + 3 * 144 + 2 * 4 + 40 + (10 + 16) + 8)
    # running mean, variance, counter: BN, BNET, AN and AN's logits
    assert report.buffers == (3 * (4 + 4 + 1) + (2 + 2 + 1), 0)
    text = str(report)
    for part in ('1 of 4 norms', 'folded 1 BatchNorm2d (0.bn)', 'reduced 1 BNET (1.bnet) to FoldedBNET', 'kept 1 GN'):
        assert part in text


class OwnGroupNorm(nn.GroupNorm):
    """With fixed statistics, say: nobody can know."""

    def forward(self, x):
        return x * self.weight[:, None, None]


@pytest.mark.parametrize(
    'norm, reason',
    [
        (nn.GroupNorm(2, 4), 'its statistics come from the input'),
        (type('Renamed', (nn.GroupNorm,), {})(2, 4), 'its statistics come from the input'),
        (nn.InstanceNorm2d(4), 'its statistics come from the input'),
        (nn.InstanceNorm2d(4, track_running_stats=True), 'it has running statistics, .* instance norms are left'),
        (nn.BatchNorm2d(4, track_running_stats=False), 'it has no running statistics'),
        (OwnGroupNorm(2, 4), r'a OwnGroupNorm has no fold_into\(conv\), which would say how it folds'),
    ],
)
def test_the_report_says_of_each_norm_why_it_was_kept(norm, reason):
    report = fuse(nn.Sequential(nn.Conv2d(4, 4, 1), norm)).fuse_report
    assert list(report.kept) == ['1'] and re.match(reason, report.kept['1'])


def test_it_does_not_train(small):
    fused = fuse(small)
    assert not any(p.requires_grad for p in fused.parameters())
    for part in (fused, fused[1], fused[2]):
        with pytest.raises(RuntimeError, match='fused for inference'):
            part.train()
    fused.eval()


@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict], ids=['torch', 'mmengine'])
@pytest.mark.parametrize('part', [0, 1, 2])
def test_weights_of_the_unfused_model_are_refused(small, load, part):
    fused = fuse(small[part])
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(RuntimeError, match=r'is fused for inference, but the state dict has the norm'):
        load(fused, small[part].state_dict(), strict=False)
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items() if not k.startswith('conv'))


def test_a_state_dict_of_a_fused_model_loads_into_a_fused_model(small):
    other = fuse(settled(copy.deepcopy(small), seed=5))
    x = noise(1, 3, 12, 12)
    assert not torch.allclose(other(x), small(x))
    other.load_state_dict(fuse(small).state_dict())
    torch.testing.assert_close(other(x), small(x))


def test_it_copies_and_pickles(small):
    fused, x = fuse(small), noise(1, 3, 12, 12)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(x), fused(x))


def test_no_norm_no_change():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fused = fuse(model)
    assert fused.fuse_report.types == {} and torch.equal(fused[0].weight, model[0].weight)


def test_a_norm_that_is_the_whole_model_stays():
    for norm in (FrozenBN(4), BNET(4), MODELS.get('AN')(4, k=2)):
        fused = fuse(settled(norm))
        torch.testing.assert_close(fused(noise(2, 4, 5, 5)), norm(noise(2, 4, 5, 5)))
        assert len(fused.fuse_report.kept) == 1


def test_something_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match='takes a torch module, not dict: build the model first'):
        fuse(dict(type='FasterRCNN'))
