"""What every baseline norm must hold beside the rows of the matrix (tests/matrix), whatever it computes."""

import copy

import numpy as np
import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from torch import nn
from torch.fx.experimental.optimization import fuse as fx_fuse

from mmdet_norms.layers.batch_renorm import BRN
from mmdet_norms.layers.frozen_bn import FrozenBN
from mmdet_norms.layers.group_norm import GN
from mmdet_norms.layers.layer_norm import LN2d
from mmdet_norms.layers.switch_norm import SN
from mmdet_norms.layers.sync_bn import SyncBN

MAKE = {
    'FrozenBN': FrozenBN,
    'SyncBN': SyncBN,
    'GN': lambda channels: GN(channels, num_groups=2),
    'LN2d-C': LN2d,
    'LN2d-CHW': lambda channels: LN2d(channels, over='CHW'),
    'BRN': lambda channels: BRN(channels, warmup_iters=1, r_iters=3, d_iters=3, momentum=0.1),
    'SN': SN,
}
WITH_STATE = ('SyncBN', 'BRN', 'SN')
every_norm = pytest.mark.parametrize('name', MAKE)
with_state = pytest.mark.parametrize('name', WITH_STATE)


def random_layer(name, channels=4, seed=0):
    """Nothing at its default: weights and statistics random, BRN past its schedule."""
    torch.manual_seed(seed)
    layer = MAKE[name](channels)
    for key, value in layer.state_dict(keep_vars=True).items():
        if key.endswith('running_var'):
            value.data.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.data.normal_()
        elif name == 'BRN':
            value.fill_(10)
    return layer


def state(layer):
    return copy.deepcopy(layer.state_dict())


def assert_same_state(first, second, **tolerance):
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], **tolerance, msg=lambda text, key=key: f'{key}: {text}')


def gradients(layer, x, grad):
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad, [p.grad.clone() for p in layer.parameters()]


@every_norm
class TestNumbers:
    @pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
    @pytest.mark.parametrize('training', [True, False])
    def test_autocast_keeps_dtype_and_fp32_state_and_is_close(self, name, dtype, tolerance, training):
        layer = random_layer(name).train(training)
        exact = copy.deepcopy(layer)
        x = torch.randn(2, 4, 8, 8).to(dtype)
        grad = torch.randn(2, 4, 8, 8).to(dtype)
        expected = gradients(exact, x.float(), grad.float())
        with torch.autocast('cpu', dtype=dtype):
            y, grad_x, grads = gradients(layer, x, grad)
            assert copy.deepcopy(layer)(x.float()).dtype == torch.float32
        assert y.dtype == grad_x.dtype == dtype and all(g.dtype == torch.float32 for g in grads)
        torch.testing.assert_close(y, expected[0].to(dtype), rtol=1.01 * torch.finfo(dtype).eps, atol=1e-5)  # one ulp
        torch.testing.assert_close(grad_x.float(), expected[1], rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(grads, expected[2]):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)
        assert_same_state(state(layer), state(exact), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize('training', [True, False])
    def test_a_model_converted_to_half_runs_with_fp32_statistics(self, name, training):
        layer = random_layer(name).half().train(training)
        x = (torch.randn(4, 4, 16, 16) * 100 + 1000).half().requires_grad_()  # sums and squares overflow fp16
        expected = copy.deepcopy(layer).double()(x.double())
        y = layer(x)
        y.float().square().mean().backward()
        assert y.dtype == torch.half and x.grad.isfinite().all()
        # One ulp; but SyncBN is torch's batch norm bit for bit, which keeps the batch statistics in the weights' dtype.
        rtol, atol = (0.01, 0.01) if name == 'SyncBN' else (1.01 * torch.finfo(torch.half).eps, 1e-3)
        torch.testing.assert_close(y, expected.half(), rtol=rtol, atol=atol)


@every_norm
class TestStateDict:
    def test_an_empty_checkpoint_reports_every_key_by_its_public_name(self, name):
        layer = nn.Sequential(random_layer(name))
        before = state(layer)
        missing = layer.load_state_dict({}, strict=False).missing_keys
        assert set(missing) == {key for key in before if not key.endswith('num_batches_tracked')}
        assert_same_state(state(layer), before)


@every_norm
class TestTools:
    def model(self, name):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(2, 4, 1), random_layer(name)).eval()

    @pytest.mark.parametrize('tool', ['mmcv fusion', 'fx fusion', 'efficient eval'])
    def test_model_surgery_keeps_the_eval_function(self, name, tool):
        def efficient(model):
            turn_on_efficient_conv_bn_eval_for_single_model(model)
            return model

        tools = {
            'mmcv fusion': fuse_conv_bn,
            'fx fusion': fx_fuse,
            'efficient eval': efficient,
        }
        model, x = self.model(name), torch.randn(2, 2, 7, 7)
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(tools[tool](model)(x), expected, rtol=1e-4, atol=1e-5)


class TestBatchNormInside:
    @with_state
    def test_norm_eval_freezes_the_statistics_while_the_affine_pair_trains(self, name):
        layer = random_layer(name).train()
        for module in layer.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        before, x = state(layer), torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).eval()(x))
        layer(x).square().sum().backward()
        assert_same_state(state(layer), before, rtol=0, atol=0)
        assert all(p.grad.abs().sum() > 0 for p in layer.parameters())

    @with_state
    def test_momentum_none_averages_over_all_batches(self, name):
        layer = MAKE[name](4)
        (layer if name == 'SyncBN' else layer.bn).momentum = None
        batches = [torch.randn(2, 4, 6, 6) * 2 + 3 for _ in range(4)]
        for batch in batches:
            layer(batch)
        expected = np.mean([b.double().mean((0, 2, 3)).numpy() for b in batches], 0)
        np.testing.assert_allclose(layer.state_dict()['running_mean'].numpy(), expected, rtol=1e-5)
        assert layer.state_dict()['num_batches_tracked'] == 4


class TestBadArguments:
    @pytest.mark.parametrize('cls', [FrozenBN, SyncBN, GN, LN2d, BRN, SN])
    def test_an_unknown_key_is_named_with_the_valid_ones(self, cls):
        with pytest.raises(TypeError, match=rf"norm_cfg of type '{cls.__name__}'.*epz=1.*'eps'.*valid keys: .*eps"):
            cls(32, epz=1)

    @pytest.mark.parametrize('cls', [FrozenBN, SyncBN, GN, LN2d, BRN, SN])
    @pytest.mark.parametrize('eps', [0, -1e-5, '1e-5', None, True])
    def test_an_eps_out_of_range_is_named(self, cls, eps):
        with pytest.raises(ValueError, match=rf"'{cls.__name__}': eps={eps!r}"):
            cls(32, eps=eps)

    @pytest.mark.parametrize('cls', [SyncBN, BRN, SN])
    @pytest.mark.parametrize('momentum', [0, 1.5, 'x'])
    def test_a_momentum_out_of_range_is_named(self, cls, momentum):
        with pytest.raises(ValueError, match=rf"'{cls.__name__}': momentum={momentum!r}"):
            cls(32, momentum=momentum)
