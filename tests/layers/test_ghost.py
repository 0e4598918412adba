"""BN with a simulated normalization batch: as many batch norms as there are groups, and one step of the statistics."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.models.backbones import ResNet
from mmengine.config import ConfigDict
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from mmdet_norms import fuse
from mmdet_norms.cli.config_checks import norm_problems
from mmdet_norms.kernels import image_groups
from mmdet_norms.layers import GN, GhostBN
from mmdet_norms.layers._args import ConfigError

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def ghost_bn(channels=4, norm_batch=2, **kwargs):
    layer = GhostBN(channels, norm_batch, **kwargs)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@pytest.fixture(params=['kernels', 'operators'])
def way(request, monkeypatch):
    """Eager code on a CPU, and what compiled code and other devices get."""
    if request.param == 'operators':
        monkeypatch.setattr(image_groups, 'is_supported', lambda x: False)


class TestMaths:
    @pytest.mark.parametrize('layout', LAYOUTS)
    @pytest.mark.parametrize('norm_batch', [1, 2, 8, 32])
    def test_it_equals_a_batch_norm_for_each_group(self, norm_batch, layout, way):
        torch.manual_seed(0)
        layer = ghost_bn(norm_batch=norm_batch, eps=1e-3, momentum=0.3).double()
        alone = [copy.deepcopy(layer.bn) for _ in range(32 // norm_batch)]
        x = (torch.randn(32, 4, 5, 3, dtype=torch.float64) * 2 + 3).contiguous(memory_format=layout).requires_grad_()
        g = torch.randn_like(x)
        y, expected = layer(x), torch.cat([bn(part) for bn, part in zip(alone, x.split(norm_batch))])
        actual = torch.autograd.grad(y, [x, layer.bn.weight, layer.bn.bias], g, create_graph=True)
        each = torch.autograd.grad(expected, [x, *(p for bn in alone for p in bn.parameters())], g, create_graph=True)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(actual[0], each[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(actual[1], sum(each[1::2]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(actual[2], sum(each[2::2]), rtol=1e-12, atol=1e-12)
        second = [torch.autograd.grad(gradient.sin().sum(), x)[0] for gradient in (actual[0], each[0])]
        torch.testing.assert_close(*second, rtol=1e-11, atol=1e-11)
        assert y.is_contiguous(memory_format=layout)
        for key in ('running_mean', 'running_var'):
            average = torch.stack([getattr(bn, key) for bn in alone]).mean(0)
            torch.testing.assert_close(getattr(layer.bn, key), average, rtol=1e-12, atol=1e-12)
        assert layer.bn.num_batches_tracked == 1

    def test_with_the_whole_batch_as_group_it_is_batch_norm(self):
        layer, plain = GhostBN(4, 8, affine=False), nn.BatchNorm2d(4, affine=False)
        for _ in range(3):
            x = torch.randn(8, 4, 3, 3)
            torch.testing.assert_close(layer(x), plain(x))
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value)

    def test_eval_is_batch_norm_of_any_batch(self):
        layer = ghost_bn()
        layer(torch.randn(4, 4, 3, 3))
        plain = nn.BatchNorm2d(4)
        plain.load_state_dict(layer.state_dict(), strict=True)
        for n in (0, 1, 3):
            x = torch.randn(n, 4, 3, 3)
            assert torch.equal(layer.eval()(x), plain.eval()(x))

    @pytest.mark.parametrize('shape, norm_batch', [((0, 4, 3, 3), 2), ((3, 4, 1, 1), 1)])
    def test_where_there_is_no_variance_the_running_statistics_serve_and_stay(self, shape, norm_batch):
        layer = ghost_bn(norm_batch=norm_batch)
        layer(torch.randn(4, 4, 3, 3))
        before, x = copy.deepcopy(layer.state_dict()), torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        torch.testing.assert_close(y, copy.deepcopy(layer).eval()(x))
        assert x.grad.shape == shape
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


class TestBatches:
    @pytest.mark.parametrize('images', [1, 3, 33])
    def test_a_batch_that_is_no_multiple_is_one_error_and_no_trace(self, images):
        layer = ghost_bn()
        with pytest.raises(ConfigError) as error:
            layer(torch.randn(images, 4, 3, 3))
        said = str(error.value)
        assert f'norm_batch=2 does not divide this batch of {images}' in said and 'drop_last=True' in said
        assert f'such as {images + 1}, ' in said and layer.bn.num_batches_tracked == 0

    @pytest.mark.parametrize('wrong', [0, -2, 1.5, '2', True, [2]])
    def test_no_number_of_images_is_named(self, wrong):
        with pytest.raises(ConfigError, match=r"'BN': norm_batch=.* must be an integer of at least 1"):
            build_norm_layer(dict(type='BN', norm_batch=wrong), 4)


class TestByName:
    @pytest.mark.parametrize('name', ['BN', 'BN2d', 'mmengine.BN', 'torch.nn.BatchNorm2d'])
    def test_bn_is_torchs_own_unless_it_has_a_norm_batch(self, name):
        for cfg in (dict(type=name), dict(type=name, norm_batch=None)):
            found, layer = build_norm_layer(cfg, 4, postfix=1)
            assert type(layer) is nn.BatchNorm2d and found == 'bn1'
        found, layer = build_norm_layer(dict(type=name, norm_batch=4, eps=0.1, requires_grad=False), 4, postfix=1)
        assert type(layer) is GhostBN and found == 'bn1' and (layer.norm_batch, layer.bn.eps) == (4, 0.1)
        assert not any(p.requires_grad for p in layer.parameters())

    def test_a_stock_backbone_takes_it_with_the_keys_of_batch_norm(self):
        plain = ResNet(18, base_channels=4, norm_cfg=dict(type='BN'))
        grouped = ResNet(18, base_channels=4, norm_cfg=dict(type='BN', norm_batch=2), norm_eval=False)
        grouped.load_state_dict(plain.state_dict(), strict=True)
        grouped.init_weights()
        assert sum(isinstance(module, GhostBN) for module in grouped.modules()) == 20
        grouped.train()
        assert len(grouped(torch.randn(4, 3, 32, 32))) == 4
        with pytest.raises(ConfigError, match='does not divide this batch of 3'):
            grouped(torch.randn(3, 3, 32, 32))
        grouped.norm_eval = True
        grouped.train()
        grouped(torch.randn(3, 3, 32, 32))

    def test_a_config_with_it_is_checked(self):
        assert not list(norm_problems(dict(norm_cfg=dict(type='BN', norm_batch=2, momentum=0.1)), 'model'))
        assert not list(norm_problems(dict(norm_cfg=dict(type='GhostBN', norm_batch=2)), 'model'))
        (said,) = norm_problems(dict(norm_cfg=dict(type='BN', normbatch=2)), 'model')
        assert 'an unknown key normbatch=2' in said
        (said,) = norm_problems(ConfigDict(norm_cfg=dict(type=nn.BatchNorm2d, norm_batch=2)), 'model')
        assert "write type='BN', or the class mmdet_norms.layers.GhostBN" in said
        for other in ('IN', 'GN', 'BNET', 'SyncBN'):
            (said,) = norm_problems(dict(norm_cfg=dict(type=other, norm_batch=2)), 'model')
            assert 'an unknown key norm_batch=2 (the norms that take statistics over groups of images are BN, ' in said
        with pytest.raises(ConfigError, match=r'key norm_batch=2 .the norms that take statistics over groups'):
            GN(8, num_groups=2, norm_batch=2)


class TestState:
    def test_checkpointing_counts_nothing_twice(self):
        plain = ghost_bn()
        x = torch.randn(4, 4, 3, 3, requires_grad=True)
        for reentrant in (True, False):
            saved = copy.deepcopy(plain)
            checkpoint(saved, x, use_reentrant=reentrant).sum().backward()
            once = copy.deepcopy(plain)
            once(x)
            assert all(torch.equal(value, once.state_dict()[key]) for key, value in saved.state_dict().items())

    def test_sync_bn_conversion_keeps_the_groups(self):
        layer = ghost_bn()
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
        x = torch.randn(4, 4, 3, 3)
        torch.testing.assert_close(converted(x), layer(x))
        assert isinstance(converted, GhostBN) and converted.state_dict().keys() == layer.state_dict().keys()
        for key, value in layer.state_dict().items():
            torch.testing.assert_close(converted.state_dict()[key], value)

    def test_fused_nothing_remains(self):
        net = ConvModule(3, 4, 3, norm_cfg=dict(type='BN', norm_batch=2))
        net(torch.randn(4, 3, 6, 6))
        fused, x = fuse(net.eval()), torch.randn(3, 3, 6, 6)
        assert not any(isinstance(module, GhostBN) for module in fused.modules())
        torch.testing.assert_close(fused(x), net(x))

    def test_averages_over_batches_are_those_of_the_groups(self):
        layer, batches = ghost_bn(), [torch.randn(4, 4, 3, 3) + i for i in range(3)]
        update_bn(batches, layer)
        groups = torch.cat(batches).split(2)
        variance = torch.stack([group.transpose(0, 1).flatten(1).var(1) for group in groups]).mean(0)
        torch.testing.assert_close(layer.bn.running_mean, torch.cat(batches).mean((0, 2, 3)))
        torch.testing.assert_close(layer.bn.running_var, variance)
