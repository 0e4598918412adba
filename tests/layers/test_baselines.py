"""What every baseline norm must hold, whatever it computes: the states that a training run puts a layer in."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.model import ExponentialMovingAverage, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from mmengine.runner.checkpoint import get_state_dict
from torch import nn
from torch.fx.experimental.optimization import fuse as fx_fuse
from torch.utils.checkpoint import checkpoint

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

    @pytest.mark.parametrize('channels_last', [False, True])
    def test_a_huge_mean_does_not_drown_the_deviation(self, name, channels_last):
        layer = random_layer(name).train()
        x = torch.randn(2, 4, 32, 32) + 1e4
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        expected = copy.deepcopy(layer).double()(x.double())
        y = layer(x)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=0.05)  # the ulp of 1e4 is 0.001
        assert all(value.isfinite().all() for value in layer.state_dict().values())

    @pytest.mark.parametrize('training', [True, False])
    def test_constant_channels_are_finite_with_finite_gradients(self, name, training):
        layer = random_layer(name).train(training)
        y, grad_x, grads = gradients(layer, torch.full((2, 4, 5, 5), 7.0), torch.randn(2, 4, 5, 5))
        assert all(t.isfinite().all() for t in (y, grad_x, *grads, *layer.state_dict().values()))

    @pytest.mark.parametrize('shape', [(1, 4, 5, 5), (3, 4, 1, 1), (1, 4, 1, 1)])
    @pytest.mark.parametrize('training', [True, False])
    def test_one_image_and_single_pixel_maps_are_finite(self, name, shape, training):
        layer = random_layer(name).train(training)
        x = torch.randn(shape)
        if name == 'SyncBN' and training and shape == (1, 4, 1, 1):
            before = state(layer)
            with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
                layer(x)
            return assert_same_state(state(layer), before)
        y, grad_x, grads = gradients(layer, x, torch.randn(shape))
        assert all(t.isfinite().all() for t in (y, grad_x, *grads, *layer.state_dict().values()))

    @pytest.mark.parametrize('training', [True, False])
    def test_an_empty_batch_passes_through_with_zero_gradients_and_no_trace(self, name, training):
        layer = random_layer(name).train(training)
        before = state(layer)
        y, grad_x, grads = gradients(layer, torch.zeros(0, 4, 6, 5), torch.zeros(0, 4, 6, 5))
        assert y.shape == grad_x.shape == (0, 4, 6, 5)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
        assert_same_state(state(layer), before, rtol=0, atol=0)

    @pytest.mark.parametrize('training', [True, False])
    def test_layouts_give_the_same_result_and_are_kept(self, name, training):
        layer = random_layer(name).train(training)
        x, grad = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
        expected = gradients(copy.deepcopy(layer), x, grad)
        after = copy.deepcopy(layer)
        after(x)
        for variant, memory_format in (
            (x, torch.contiguous_format),
            (x.to(memory_format=torch.channels_last), torch.channels_last),
            (x.transpose(2, 3).contiguous().transpose(2, 3), None),
            (torch.cat([x, x], 1)[:, :4], None),
        ):
            clone = copy.deepcopy(layer)
            y, grad_x, grads = gradients(clone, variant, grad)
            assert memory_format is None or y.is_contiguous(memory_format=memory_format)
            for ours, theirs in zip([y, grad_x, *grads], [*expected[:2], *expected[2]]):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert_same_state(state(clone), state(after), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize('training', [True, False])
    def test_gradients_are_those_of_the_function(self, name, training):
        layer = random_layer(name, channels=2).double().train(training)
        names = [key for key, _ in layer.named_parameters()]
        params = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
        if name == 'BRN' and training:
            layer.momentum = layer.bn.momentum = None
            layer.warmup_iters = layer.r_iters = layer.d_iters = 10**6  # r, d count as constants: see its own tests

        def run(x, *params):
            return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, params)), (x,))

        assert torch.autograd.gradcheck(run, (x, *params))


@every_norm
class TestTraining:
    def test_requires_grad_false_trains_nothing_and_passes_gradients_on(self, name):
        layer = random_layer(name).requires_grad_(False)
        before = dict(layer.named_parameters())
        x = torch.randn(2, 4, 5, 5, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad.abs().sum() > 0 and all(p.grad is None for p in before.values())

    def test_one_module_called_twice_before_backward_sums_the_gradients(self, name):
        layer = random_layer(name).train()
        reference = copy.deepcopy(layer)
        a, b = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 3, 3) + 1
        a.requires_grad_(), b.requires_grad_()
        (layer(a).square().mean() + layer(b).square().mean()).backward()
        grads_x, total = (a.grad.clone(), b.grad.clone()), {}
        for x, grad_x in zip((a, b), grads_x):
            x.grad = None
            reference.zero_grad()
            reference(x).square().mean().backward()
            torch.testing.assert_close(x.grad, grad_x)
            for key, p in reference.named_parameters():
                total[key] = total.get(key, 0) + p.grad
        for key, p in layer.named_parameters():
            torch.testing.assert_close(p.grad, total[key])
        assert_same_state(state(layer), state(reference), rtol=0, atol=0)

    @pytest.mark.parametrize('reentrant', [True, False])
    def test_activation_checkpointing_changes_neither_gradients_nor_statistics(self, name, reentrant):
        plain = random_layer(name).train()
        saved = copy.deepcopy(plain)
        for _ in range(3):  # two calls each, as in a head shared by pyramid levels
            inputs = [torch.randn(2, 4, 6 - i, 6, requires_grad=True) for i in range(2)]
            copies = [x.detach().clone().requires_grad_() for x in inputs]
            sum(plain(x).square().mean() * (i + 1) for i, x in enumerate(inputs)).backward()
            outputs = [checkpoint(saved, x, use_reentrant=reentrant) for x in copies]
            sum(y.square().mean() * (i + 1) for i, y in enumerate(outputs)).backward()
            for x, y in zip(inputs, copies):
                torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)
        for p, q in zip(plain.parameters(), saved.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-6)
        assert_same_state(state(plain), state(saved), rtol=0, atol=0)

    def test_resuming_from_a_file_is_bit_exact(self, name, tmp_path):
        batches = [torch.randn(2, 4, 6, 6) for _ in range(6)]

        def train(layer, optimizer, batches):
            for batch in batches:
                optimizer.zero_grad()
                layer(batch).square().mean().backward()
                optimizer.step()

        def fresh():
            torch.manual_seed(1)
            layer = nn.Sequential(nn.Conv2d(4, 4, 1), MAKE[name](4))
            return layer, torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

        straight, optimizer = fresh()
        train(straight, optimizer, batches)
        first, optimizer = fresh()
        train(first, optimizer, batches[:3])
        torch.save(dict(model=first.state_dict(), optimizer=optimizer.state_dict()), tmp_path / 'checkpoint.pth')
        resumed, optimizer = fresh()
        loaded = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)
        resumed.load_state_dict(loaded['model'])
        optimizer.load_state_dict(loaded['optimizer'])
        train(resumed, optimizer, batches[3:])
        assert_same_state(state(straight), state(resumed), rtol=0, atol=0)

    def test_ema_of_mmengine_follows_parameters_and_buffers(self, name):
        layer = random_layer(name).train()
        ema = ExponentialMovingAverage(layer, momentum=0.5, update_buffers=True)
        ema.update_parameters(layer)  # the first call copies
        old = state(layer)
        layer(torch.randn(2, 4, 6, 6))
        ema.update_parameters(layer)
        for key, value in ema.module.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, (old[key] + layer.state_dict()[key]) / 2)


@every_norm
class TestStateDict:
    def test_round_trip_is_exact_also_through_mmengine(self, name):
        source, target = random_layer(name), MAKE[name](4)
        assert get_state_dict(nn.Sequential(source)).keys() == nn.Sequential(source).state_dict().keys()
        nn.Sequential(target).load_state_dict(get_state_dict(nn.Sequential(source)), strict=True)
        assert_same_state(state(source), state(target), rtol=0, atol=0)

    def test_an_empty_checkpoint_reports_every_key_by_its_public_name(self, name):
        layer = nn.Sequential(random_layer(name))
        before = state(layer)
        missing = layer.load_state_dict({}, strict=False).missing_keys
        assert set(missing) == {key for key in before if not key.endswith('num_batches_tracked')}
        assert_same_state(state(layer), before)

    def test_deepcopy_and_pickle_keep_keys_values_and_go_on_alike(self, name):
        layer = random_layer(name).train()
        layer(torch.randn(2, 4, 6, 6))
        x = torch.randn(2, 4, 6, 6)
        clones = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for clone in (*clones, layer):
            assert_same_state(state(clone), state(clones[0]), rtol=0, atol=0)
        outputs = [clone(x) for clone in (*clones, layer)]
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[2])

    def test_a_saved_file_loads_with_weights_only(self, name):
        buffer = io.BytesIO()
        torch.save(random_layer(name).state_dict(), buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=True).keys() == MAKE[name](4).state_dict().keys()


@every_norm
class TestTools:
    @pytest.mark.parametrize('training', [True, False])
    def test_compiled_without_graph_breaks_it_equals_eager(self, name, training):
        torch._dynamo.reset()
        layer = random_layer(name).train(training)
        eager = copy.deepcopy(layer)
        compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
        for _ in range(2):
            x, grad = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
            expected = gradients(eager, x, grad)
            layer.zero_grad()
            x.requires_grad_()
            y = compiled(x)
            y.backward(grad)
            torch.testing.assert_close(y, expected[0])
            torch.testing.assert_close(x.grad, expected[1], rtol=1e-4, atol=1e-5)
            for p, theirs in zip(layer.parameters(), expected[2]):
                torch.testing.assert_close(p.grad, theirs, rtol=1e-4, atol=1e-5)
        assert_same_state(state(layer), state(eager))

    def model(self, name):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(2, 4, 1), random_layer(name)).eval()

    @pytest.mark.parametrize('tool', ['sync and back', 'mmcv fusion', 'fx fusion', 'efficient eval'])
    def test_model_surgery_keeps_the_eval_function(self, name, tool):
        def efficient(model):
            turn_on_efficient_conv_bn_eval_for_single_model(model)
            return model

        tools = {
            'sync and back': lambda m: revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(m)),
            'mmcv fusion': fuse_conv_bn,
            'fx fusion': fx_fuse,
            'efficient eval': efficient,
        }
        model, x = self.model(name), torch.randn(2, 2, 7, 7)
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(tools[tool](model)(x), expected, rtol=1e-4, atol=1e-5)

    def test_sync_bn_conversion_and_back_keeps_keys_and_the_training_function(self, name):
        layer = random_layer(name).train()
        expected, keys = copy.deepcopy(layer)(torch.ones(2, 4, 3, 3).cumsum(3)), layer.state_dict().keys()
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
        assert converted.state_dict().keys() == keys
        reverted = revert_sync_batchnorm(converted)
        assert reverted.training and reverted.state_dict().keys() == keys
        torch.testing.assert_close(reverted(torch.ones(2, 4, 3, 3).cumsum(3)), expected)

    def test_exported_eval_graph_equals_the_layer(self, name):
        layer = random_layer(name).eval()
        x = torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


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
