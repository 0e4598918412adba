"""BNET against its reference in float64, the published numbers, and the states a layer lives through."""

import copy

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.analysis import get_model_complexity_info
from mmengine.model import BaseModule, Sequential, normal_init, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from torch import nn
from torch.fx.experimental.optimization import fuse as fx_fuse

from mmdet_norms.layers import BNET
from mmdet_norms.reference import ReferenceBNET


def random_bnet(channels=3, kernel_size=5, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = BNET(channels, kernel_size).to(dtype)
    nn.init.normal_(layer.bnconv.weight)
    nn.init.normal_(layer.bnconv.bias)
    layer.bn.running_mean.normal_()
    layer.bn.running_var.uniform_(0.5, 2)
    return layer


def reference_of(layer, **state):
    reference = ReferenceBNET(layer.num_features, layer.kernel_size, layer.bn.eps).double().train(layer.training)
    reference.load_state_dict(layer.state_dict() | state)
    return reference


class TestMaths:
    @pytest.mark.parametrize('kernel_size', [1, 3, 5, 7])
    @pytest.mark.parametrize('training', [True, False])
    def test_forward_equals_the_formula_written_out(self, kernel_size, training):
        layer = random_bnet(kernel_size=kernel_size).train(training)
        x = torch.randn(2, 3, 5, 4, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(layer(x), reference_of(layer)(x), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize('kernel_size', [3, 7])
    def test_twelve_iterations_equal_the_published_layer(self, kernel_size, golden):
        data = golden(f'bnet/bnet_k{kernel_size}.npz')
        state = {k[len('init.') :]: torch.from_numpy(np.array(data[k])) for k in data if k.startswith('init.')}
        layer = BNET(data['x'].shape[2], kernel_size).double()
        layer.load_state_dict(state, strict=True)

        def close(actual, key, i):
            expected = torch.from_numpy(data[key][i])
            scale = expected.abs().max().clamp(min=1)
            assert (actual - expected).abs().max() <= 1e-10 * scale, (key, i)

        for i, (x, gy) in enumerate(zip(data['x'], data['gy'])):
            for mode, suffix, grad in (('y_train', '', 'g'), ('y_eval', '_eval', 'g_eval')):
                layer.train(mode == 'y_train').zero_grad()
                x_in = torch.from_numpy(x).requires_grad_()
                y = layer(x_in)
                y.backward(torch.from_numpy(gy))
                close(y, mode, i)
                close(x_in.grad, f'gx{suffix}', i)
                close(layer.bnconv.weight.grad, f'{grad}_bnconv_weight', i)
                close(layer.bnconv.bias.grad, f'{grad}_bnconv_bias', i)
                close(layer.bn.running_mean, 'running_mean', i)
                close(layer.bn.running_var, 'running_var', i)

    def test_a_new_layer_is_a_plain_batch_norm(self):
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(BNET(4, 5)(x), nn.BatchNorm2d(4)(x))

    def test_statistics_ignore_the_kernels_and_follow_torch(self):
        layer, plain = random_bnet(4, dtype=torch.float32), nn.BatchNorm2d(4, affine=False)
        plain.load_state_dict(layer.bn.state_dict())
        for _ in range(3):
            x = torch.randn(2, 4, 6, 6)
            layer(x), plain(x)
        for ours, theirs in zip(layer.bn.buffers(), plain.buffers()):
            torch.testing.assert_close(ours, theirs)


class TestStateDict:
    PUBLISHED = {'running_mean', 'running_var', 'num_batches_tracked', 'bnconv.weight', 'bnconv.bias'}

    def test_saves_the_published_keys(self):
        assert set(BNET(4).state_dict()) == self.PUBLISHED
        assert set(nn.Sequential(BNET(4)).state_dict()) == {f'0.{key}' for key in self.PUBLISHED}

    @pytest.mark.parametrize('kernel_size', [1, 3, 5, 7])
    def test_a_batch_norm_checkpoint_gives_the_identical_function(self, kernel_size):
        plain = nn.BatchNorm2d(4)
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
        plain.running_mean.normal_(), plain.running_var.uniform_(0.5, 2)
        layer = BNET(4, kernel_size)
        nn.init.normal_(layer.bnconv.weight)
        nn.Sequential(layer).load_state_dict(nn.Sequential(plain).state_dict(), strict=True)
        x = torch.randn(2, 4, 9, 9)
        for training in (False, True):
            torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))

    def test_missing_keys_are_reported_by_their_published_names(self):
        result = nn.Sequential(BNET(4)).load_state_dict({}, strict=False)
        assert set(result.missing_keys) == {f'0.{key}' for key in self.PUBLISHED - {'num_batches_tracked'}}

    def test_an_affine_pair_beside_kernels_is_left_over_not_swallowed(self):
        state = BNET(4).state_dict() | {'weight': torch.ones(4), 'bias': torch.ones(4)}
        assert set(BNET(4).load_state_dict(state, strict=False).unexpected_keys) == {'weight', 'bias'}

    def test_a_weight_of_another_width_is_a_size_mismatch(self):
        with pytest.raises(RuntimeError, match='size mismatch for weight'):
            BNET(4).load_state_dict(nn.BatchNorm2d(5).state_dict())

    def test_loading_does_not_change_the_callers_dict(self):
        state = nn.BatchNorm2d(4).state_dict()
        keys = list(state)
        BNET(4).load_state_dict(state)
        assert list(state) == keys


class TestGenericTools:
    """Each of these silently breaks a layer that subclasses BatchNorm."""

    def conv_bnet(self, kernel_size=5):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(2, 4, 1), random_bnet(4, kernel_size, torch.float32)).eval()

    def assert_same_function(self, tool):
        before, x = self.conv_bnet(), torch.randn(2, 2, 7, 7)
        expected = copy.deepcopy(before)(x)
        torch.testing.assert_close(tool(before)(x), expected, rtol=1e-4, atol=1e-5)

    def test_sync_bn_conversion_and_back_is_the_identity(self):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(self.conv_bnet())
        assert isinstance(converted[1], BNET) and isinstance(converted[1].bn, nn.SyncBatchNorm)
        assert set(converted[1].state_dict()) == TestStateDict.PUBLISHED
        self.assert_same_function(lambda m: revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(m)))

    def test_mmcv_conv_bn_fusion_keeps_the_function(self):
        self.assert_same_function(fuse_conv_bn)

    def test_fx_conv_bn_fusion_folds_the_inner_norm_and_keeps_the_function(self):
        self.assert_same_function(fx_fuse)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fx_fuse(self.conv_bnet()).modules())

    def test_torch_conv_bn_fusion_of_the_inner_norm_keeps_the_function(self):
        def fuse(model):
            return nn.Sequential(torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1].bn), model[1].bnconv)

        self.assert_same_function(fuse)

    def test_efficient_conv_bn_eval_of_mmengine_keeps_the_function(self):
        def turn_on(model):
            turn_on_efficient_conv_bn_eval_for_single_model(model)
            return model

        self.assert_same_function(turn_on)

    def test_flop_counters_see_the_depthwise_convolution(self):
        model = self.conv_bnet()
        depthwise = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        written_out = nn.Sequential(model[0], nn.BatchNorm2d(4, affine=False), depthwise).eval()
        ours, theirs = (
            get_model_complexity_info(m, (2, 7, 7), show_table=False, show_arch=False) for m in (model, written_out)
        )
        assert ours['flops'] == theirs['flops'] and ours['params'] == theirs['params']

    @pytest.mark.parametrize('training', [True, False])
    def test_efficient_conv_bn_eval_of_conv_module_keeps_the_function(self, training):
        torch.manual_seed(0)
        norm_cfg = dict(type='BNET', kernel_size=3)
        plain = ConvModule(2, 4, 1, norm_cfg=norm_cfg).train(training)
        nn.init.normal_(plain.norm.bnconv.weight)
        tuned = ConvModule(2, 4, 1, norm_cfg=norm_cfg, efficient_conv_bn_eval=True).train(training)
        tuned.load_state_dict(plain.state_dict())
        x = torch.randn(2, 2, 6, 6)
        torch.testing.assert_close(tuned(x), plain(x))

    def test_precise_bn_re_estimates_the_statistics_it_finds(self):
        """The recipe of PreciseBN hooks: momentum 1, average the batch statistics of the norms found."""
        layer = random_bnet(4, dtype=torch.float32).train()
        found = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(found) == 1 and found[0].track_running_stats
        batches = [torch.randn(2, 4, 5, 5) * 3 + 1 for _ in range(4)]
        momentum, found[0].momentum, means, variances = found[0].momentum, 1.0, [], []
        for batch in batches:
            layer(batch)
            means.append(found[0].running_mean.clone()), variances.append(found[0].running_var.clone())
        found[0].running_mean = torch.stack(means).mean(0)
        found[0].running_var = torch.stack(variances).mean(0)
        found[0].momentum = momentum
        of_batches = [(b.double().mean((0, 2, 3)), b.double().var((0, 2, 3))) for b in batches]
        mean, var = (torch.stack(values).mean(0) for values in zip(*of_batches))
        expected = reference_of(layer.eval(), running_mean=mean, running_var=var)(batches[0].double())
        torch.testing.assert_close(layer(batches[0]).double(), expected, rtol=1e-4, atol=1e-4)


class Drawing(BaseModule):
    """A head as some of mmdet are: its init draws all that is a convolution."""

    def __init__(self, kernel_size):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), BNET(4, kernel_size)

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                normal_init(module, std=0.01, bias=0.5)


class TestInit:
    @pytest.mark.parametrize('rule', ['Kaiming', 'Xavier', 'Caffe2Xavier', 'Normal', 'TruncNormal', 'Uniform'])
    def test_rules_for_convolutions_leave_the_identity_alone(self, rule):
        model = Sequential(nn.Conv2d(2, 4, 1), BNET(4, 5), init_cfg=dict(type=rule, layer='Conv2d'))
        model.init_weights()
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(model[1](x), nn.BatchNorm2d(4)(x))

    def test_conv_module_leaves_the_identity_alone(self):
        module = ConvModule(2, 4, 1, norm_cfg=dict(type='BNET', kernel_size=5))
        module.init_weights()
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(module.norm(x), nn.BatchNorm2d(4)(x))

    @pytest.mark.parametrize('kernel_size', [1, 3])
    def test_a_host_that_draws_all_convolutions_leaves_the_identity_alone(self, kernel_size):
        head = Drawing(kernel_size)
        drawn = head.conv.weight.detach().clone()
        Sequential(Sequential(head)).init_weights()
        new = BNET(4, kernel_size)
        assert not torch.equal(head.conv.weight, drawn) and (head.conv.bias == 0.5).all()
        assert all(torch.equal(a, b) for a, b in zip(head.norm.parameters(), new.parameters()))

    def test_a_rule_that_names_the_convolution_acts_on_them(self):
        model = Sequential(BNET(4, 3), init_cfg=dict(type='Constant', val=2, layer='DepthwiseConv'))
        model.init_weights()
        assert (model[0].bnconv.weight == 2).all()


class TestSituations:
    def test_statistics_of_large_half_inputs_do_not_overflow(self):
        layer = BNET(2, 3)
        y = layer((torch.randn(4, 2, 16, 16) * 300 + 1000).half())
        assert y.dtype == torch.half and y.isfinite().all() and layer.bn.running_var.isfinite().all()

    @pytest.mark.parametrize('child', ['bn', 'bnconv'])
    def test_a_forward_that_another_tool_put_on_a_child_is_called(self, child):
        layer, x = random_bnet(dtype=torch.float32), torch.randn(2, 3, 8, 8)
        plain, seen = copy.deepcopy(layer)(x), []
        module = layer.get_submodule(child)
        module.forward = lambda x, forward=module.forward: seen.append(child) or forward(x)
        torch.testing.assert_close(layer(x), plain)
        assert seen == [child]

    def test_one_value_per_channel_is_normalized_with_the_running_statistics(self):
        layer = random_bnet(4, dtype=torch.float32)
        x, before = torch.randn(1, 4, 1, 1), copy.deepcopy(layer.state_dict())
        torch.testing.assert_close(layer.train()(x), layer.eval()(x))
        assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())

    def test_norm_eval_freezes_statistics_while_kernels_train(self):
        layer = random_bnet(4, dtype=torch.float32).train()
        for module in layer.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        mean = layer.bn.running_mean.clone()
        layer(torch.randn(2, 4, 6, 6)).square().sum().backward()
        assert torch.equal(layer.bn.running_mean, mean) and layer.bnconv.weight.grad.abs().sum() > 0


class TestBadArguments:
    @pytest.mark.parametrize('kernel_size', [0, 2, 4, -3, 3.0, '5', True, None, (3, 3)])
    def test_a_kernel_size_that_is_not_odd_and_positive_is_refused(self, kernel_size):
        with pytest.raises(ValueError, match=r"norm_cfg.*'BNET'.*kernel_size=.*odd positive.*3, 5 or 7"):
            BNET(4, kernel_size)

    def test_an_unknown_key_is_named_with_the_valid_ones(self):
        with pytest.raises(TypeError, match=r"unknown key kernal_size=5 \(did you mean 'kernel_size'\?\).*momentum"):
            BNET(4, kernal_size=5)

    @pytest.mark.parametrize('key, value', [('eps', 0), ('eps', -1e-5), ('momentum', 1.5), ('momentum', 'x')])
    def test_a_number_out_of_range_is_named(self, key, value):
        with pytest.raises(ValueError, match=f'{key}={value!r}'):
            BNET(4, **{key: value})
