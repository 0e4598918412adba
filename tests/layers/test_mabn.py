"""MABN and CenConv2d against their references in float64, the published numbers, and the states they live through."""

import copy
import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.model import kaiming_init
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers import warm
from mmdet_norms.layers import MABN, CenConv2d, warn_if_uncentred
from mmdet_norms.reference import ReferenceMABN

BUFFERS = ('running_var', 'iters', 'buffer_x2', 'buffer_gz')


def close(actual, expected, what, tolerance=1e-12):
    expected = torch.as_tensor(expected)
    scale = expected.abs().max().clamp(min=1e-30)
    error = ((actual.detach().reshape(expected.shape) - expected).abs().max() / scale).item()
    assert error <= tolerance, f'{what}: {error}'


def random_mabn(channels=3, dtype=torch.float32, seed=0, delay=1000, **kwargs):
    torch.manual_seed(seed)
    layer = MABN(channels, **{'buffer_size': 4, 'warmup_iters': 3, **kwargs}).to(dtype)
    layer.RENORM_DELAY = delay
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer


def reference_of(layer):
    reference = ReferenceMABN(
        layer.num_features, buffer_size=layer.buffer_size, warmup_iters=layer.warmup_iters
    ).double()
    reference.RENORM_DELAY = layer.RENORM_DELAY
    reference.load_state_dict(layer.state_dict())
    return reference


def step(layer, x, g):
    """y and the gradients of x, weight and bias, by name."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    return dict(y=y, gx=x.grad, gw=layer.weight.grad, gb=layer.bias.grad)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def upstream(y, seed):
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=wide).to(y.dtype)


def train(layer, xs, scale=1.0):
    """Iterations with a random upstream gradient; outputs and input gradients."""
    results = []
    for i, x in enumerate(xs):
        x = x.detach().clone().requires_grad_()
        y = layer(x)
        y.backward(upstream(y, i) * scale)
        results += [y.detach(), x.grad]
    return results


class TestMaths:
    @pytest.mark.parametrize('window, warmup, delay', [(4, 9, 1000), (6, 2, 1000), (3, 2, 8), (1, 0, 5), (5, 12, 3)])
    def test_every_phase_equals_the_formulas_written_out(self, window, warmup, delay):
        layer = random_mabn(dtype=torch.float64, buffer_size=window, warmup_iters=warmup, delay=delay)
        reference = reference_of(layer)
        for i in range(30):
            for parameter, other in zip(layer.parameters(), reference.parameters()):
                other.data.copy_(nn.init.normal_(parameter))
            x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * (1 + i % 3) + torch.arange(3.0)[:, None, None]
            g = torch.randn(2, 3, 4, 5, dtype=torch.float64)
            actual, expected = step(layer, x, g), step(reference, x, g)
            for name, wanted in (expected | state_of(reference)).items():
                close((actual | state_of(layer))[name], wanted, (i, name))
            assert layer.iters.item() == i + 1

    def test_past_iteration_1000_the_renorm_factor_runs_into_both_limits(self):
        layer, seen = random_mabn(dtype=torch.float64, warmup_iters=100), []
        assert (layer.RENORM_DELAY, layer.RENORM_LIMITS) == (1000, (0.2, 5.0))
        reference = reference_of(layer)
        renorm = reference.renorm
        reference.renorm = lambda v, t: seen.append(renorm(v, t)) or seen[-1]
        for t in range(1, 1101):
            x, g = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
            x *= {1040: 100, 1060: 100}.get(t, 1e-4 if 1065 <= t <= 1090 else 1)
            actual, expected = step(layer, x, g), step(reference, x, g)
            if t > 990:
                close(actual['y'], expected['y'], t, 1e-11), close(actual['gx'], expected['gx'], t, 1e-11)
        close(layer.running_var, reference.running_var, 'running_var')
        seen = torch.stack(seen)
        assert (seen[:1000] == 1).all() and (seen[1000] != 1).all()
        assert (seen == 5).any() and (seen == 1 / 5).any() and ((seen > 0.2) & (seen < 5) & (seen != 1)).any()

    def test_past_the_delay_the_forward_uses_the_running_moment(self):
        layer = random_mabn(dtype=torch.float64, delay=5)
        xs = torch.randn(9, 2, 3, 4, 4, dtype=torch.float64)
        train(layer, xs[:8])
        expected = copy.deepcopy(layer).eval()(xs[8])
        close(layer(xs[8]), expected.detach(), 'y')

    def test_24_iterations_equal_the_published_layer(self, golden):
        data = golden('mabn/mabn_main_w5.npz')
        layer = MABN(4, B=2, real_B=16, warmup_iters=5).double()
        layer.load_state_dict({k[5:]: torch.from_numpy(v) for k, v in data.items() if k.startswith('init.')})
        for i, (x, gy) in enumerate(zip(data['x'], data['gy'])):
            layer.weight.data.copy_(torch.from_numpy(data['pre_weight'][i]))
            layer.bias.data.copy_(torch.from_numpy(data['pre_bias'][i]))
            layer.zero_grad()
            x = torch.from_numpy(x).requires_grad_()
            y = layer(x)
            for name in BUFFERS:
                close(getattr(layer, name), data[f'fwd_{name}'][i], (i, name))
            y.backward(torch.from_numpy(gy))
            for name in BUFFERS:
                close(getattr(layer, name), data[f'post_{name}'][i], (i, name))
            close(y, data['y'][i], i), close(x.grad, data['gx'][i], i)
            close(layer.weight.grad, data['g_weight'][i], i), close(layer.bias.grad, data['g_bias'][i], i)
        layer.eval().zero_grad()
        layer.weight.data.copy_(torch.from_numpy(data['eval_weight']))
        layer.bias.data.copy_(torch.from_numpy(data['eval_bias']))
        x = torch.from_numpy(data['eval_x']).requires_grad_()
        y = layer(x)
        y.backward(torch.from_numpy(data['eval_gy']))
        close(y, data['eval_y'], 'eval y'), close(x.grad, data['eval_gx'], 'eval gx')
        close(layer.weight.grad, data['eval_g_weight'], 'gw'), close(layer.bias.grad, data['eval_g_bias'], 'gb')

    @pytest.mark.parametrize('training', [True, False])
    def test_with_single_batch_statistics_and_in_eval_the_backward_is_the_true_gradient(self, training):
        layer = random_mabn(2, torch.float64, warmup_iters=100).train(training)

        def run(x, weight, bias):
            return torch.func.functional_call(copy.deepcopy(layer), {'weight': weight, 'bias': bias}, (x,))

        x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
        params = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]
        assert torch.autograd.gradcheck(run, (x, *params))

    def test_with_the_window_the_backward_is_no_gradient_but_that_of_weight_and_bias(self):
        layer = random_mabn(2, torch.float64)
        train(layer, torch.randn(9, 2, 2, 3, 2, dtype=torch.float64))

        def run(x, weight, bias):
            return torch.func.functional_call(copy.deepcopy(layer), {'weight': weight, 'bias': bias}, (x,))

        x = torch.randn(2, 2, 3, 2, dtype=torch.float64)
        params = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]
        assert torch.autograd.gradcheck(run, (x, *params))
        assert not torch.autograd.gradcheck(run, (x.requires_grad_(), *params), raise_exception=False)

    def test_a_second_derivative_is_refused_not_wrong(self):
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        with pytest.raises(RuntimeError, match='MABN has no second derivative'):
            torch.autograd.grad(random_mabn()(x).square().sum(), x, create_graph=True)

    def test_eval_is_a_batch_norm_with_mean_zero(self):
        layer = random_mabn(dtype=torch.float64)
        train(layer, torch.randn(9, 2, 3, 4, 4, dtype=torch.float64))
        before, x = state_of(layer), torch.randn(2, 3, 5, 4, dtype=torch.float64) + 1
        y = layer.eval()(x)
        weight, bias = (p.detach()[:, None, None] for p in (layer.weight, layer.bias))
        close(y, weight * x / (layer.running_var + 1e-5).sqrt() + bias, 'y')
        close(layer.to_batch_norm()(x), y.detach(), 'to_batch_norm')
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


class TestCenConv:
    CASES = dict(
        k1={},
        k3s2=dict(stride=2, padding=1),
        grp=dict(groups=2, dilation=2, padding=2),
        bias=dict(padding=1, bias=True),
    )

    @pytest.mark.parametrize('name', CASES)
    def test_equals_the_published_layer(self, name, golden):
        arrays = golden('mabn/cenconv.npz').items()
        data = {key[len(name) + 1 :]: torch.from_numpy(value) for key, value in arrays if key.startswith(name + '.')}
        out_channels, _, size, _ = data['weight'].shape
        conv = CenConv2d(data['x'].shape[1], out_channels, size, **{'bias': False, **self.CASES[name]}).double()
        conv.load_state_dict({key: data[key] for key in ('weight', 'bias') if key in data}, strict=True)
        y = conv(data['x'].requires_grad_())
        y.backward(data['gy'])
        close(y, data['y'], 'y'), close(data['x'].grad, data['gx'], 'gx')
        close(conv.weight.grad, data['g_weight'], 'g_weight')
        if conv.bias is not None:
            close(conv.bias.grad, data['g_bias'], 'g_bias')
        close(conv.to_conv2d()(data['x']), data['y'], 'to_conv2d')

    def test_gradients_are_those_of_the_formula(self):
        conv = CenConv2d(2, 3, 3, padding=1).double()
        params = tuple(conv.parameters())

        def run(x, weight, bias):
            return torch.func.functional_call(conv, {'weight': weight, 'bias': bias}, (x,))

        x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(run, (x, *params))

    def test_a_constant_added_to_weight_or_input_changes_nothing(self):
        conv = CenConv2d(3, 4, 3).double()
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        y = conv(x)
        torch.testing.assert_close(conv(x + 7), y)
        conv.load_state_dict({'weight': conv.weight + torch.arange(4.0).view(4, 1, 1, 1), 'bias': conv.bias})
        torch.testing.assert_close(conv(x), y)

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_autocast_centres_in_fp32(self, dtype):
        conv, x = CenConv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
        conv.weight.data += 1000  # in 16 bits the weights would lose all their digits
        with torch.autocast('cpu', dtype=dtype):
            y = conv(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), conv(x), rtol=0.05, atol=0.05)

    def test_an_empty_batch_passes_through_with_zero_gradients(self):
        conv, x = CenConv2d(3, 4, 3), torch.zeros(0, 3, 6, 6, requires_grad=True)
        y = conv(x)
        y.sum().backward()
        assert y.shape == (0, 4, 4, 4) and conv.weight.grad.abs().sum() == 0 and x.grad.shape == x.shape

    def test_channels_last_is_kept(self):
        conv, x = CenConv2d(8, 8, 3), torch.randn(2, 8, 6, 6)
        y = conv(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(y, conv(x))
        assert y.is_contiguous(memory_format=torch.channels_last)

    def test_it_has_the_state_and_the_init_rules_of_a_convolution(self):
        from mmengine.model import Sequential

        assert set(CenConv2d(3, 4, 3).state_dict()) == {'weight', 'bias'}
        model = Sequential(CenConv2d(3, 64, 3), init_cfg=dict(type='Normal', layer='Conv2d', std=7.0))
        model.init_weights()
        assert 6 < model[0].weight.std() < 8
        kaiming_init(model[0])

    def test_generic_fusion_with_a_batch_norm_behind_keeps_the_function(self):
        model = nn.Sequential(CenConv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        model[1].running_var.uniform_(0.5, 2), model[1].running_mean.normal_(), nn.init.normal_(model[1].weight)
        x = torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(fuse_conv_bn(copy.deepcopy(model))(x), model(x))

    def test_deployed_as_plain_layers_it_folds_into_one_convolution(self):
        model = nn.Sequential(CenConv2d(3, 4, 3), random_mabn(4))
        train(model, torch.randn(5, 2, 3, 6, 6))
        x = torch.randn(2, 3, 6, 6)
        plain = nn.Sequential(model[0].to_conv2d(), model[1].to_batch_norm()).eval()
        torch.testing.assert_close(fuse_conv_bn(plain)(x), model.eval()(x), rtol=1e-4, atol=1e-5)


class TestStateDict:
    def test_saves_the_published_keys_and_shapes(self):
        shapes = {key: tuple(value.shape) for key, value in MABN(5).state_dict().items()}
        vector, window = (5,), (16, 5)
        assert shapes == dict(
            weight=vector, bias=vector, running_var=(1, 5, 1, 1), iters=(1,), buffer_x2=window, buffer_gz=window
        )
        assert MABN(5).iters.dtype == torch.int64

    @pytest.mark.parametrize('shape', [(1, 3, 1, 1), (3,)])
    def test_published_files_load_strictly_into_a_trained_model(self, shape):
        source, target = random_mabn(), random_mabn(seed=5)
        for layer in (source, target):
            train(layer, torch.randn(7, 2, 3, 4, 4))
        state = source.state_dict() | {'running_var': source.running_var.reshape(shape)}
        nn.Sequential(target).load_state_dict({f'0.{key}': value for key, value in state.items()}, strict=True)
        assert_same_state(source, target)
        assert state['running_var'].shape == shape, 'the dict of the caller changed'

    def test_resuming_is_bit_exact(self):
        def fresh():
            torch.manual_seed(3)
            model = nn.Sequential(CenConv2d(3, 4, 3), random_mabn(4, delay=6), CenConv2d(4, 4, 3), random_mabn(4))
            return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def steps(model, optimizer, batches):
            for batch in batches:
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()

        for cut in (2, 5, 9):  # in the warm-up, with the window, with the renorm factor
            batches = torch.randn(2 * cut, 2, 3, 8, 8)
            straight, optimizer = fresh()
            steps(straight, optimizer, batches)
            first, optimizer = fresh()
            steps(first, optimizer, batches[:cut])
            resumed, new_optimizer = fresh()
            resumed.load_state_dict(state_of(first))
            new_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            steps(resumed, new_optimizer, batches[cut:])
            assert_same_state(straight, resumed)

    def test_a_batch_norm_gives_the_identical_function_in_eval_and_says_what_starts_anew(self):
        plain = nn.BatchNorm2d(3)
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
        plain.running_mean.normal_(), plain.running_var.uniform_(0.5, 2)
        layer = random_mabn()
        train(layer, torch.randn(6, 2, 3, 4, 4))
        with pytest.warns(UserWarning, match='mean went into the bias.*iters, buffer_x2 and buffer_gz start from 0'):
            nn.Sequential(layer).load_state_dict(nn.Sequential(plain).state_dict(), strict=True)
        x = torch.randn(2, 3, 5, 5) + 1
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
        assert layer.iters.item() == 0 and layer.buffer_x2.abs().sum() == 0 and layer.buffer_gz.abs().sum() == 0

    @pytest.mark.filterwarnings('ignore:MABN loaded a batch norm')
    def test_its_own_batch_norm_loads_back(self):
        layer, x = random_mabn(), torch.randn(2, 3, 4, 4)
        train(layer, torch.randn(6, 2, 3, 4, 4))
        target = random_mabn(seed=1)
        target.load_state_dict(layer.to_batch_norm().state_dict())
        torch.testing.assert_close(target.eval()(x), layer.eval()(x))

    @pytest.mark.parametrize('iterations, old, new', [(9, 4, 2), (9, 4, 4), (9, 4, 7), (3, 4, 6), (2, 4, 1), (0, 4, 6)])
    def test_a_window_of_another_length_keeps_the_newest_rows(self, iterations, old, new):
        source, xs = random_mabn(buffer_size=old), torch.randn(9, 2, 3, 4, 4)
        direct = random_mabn(buffer_size=new)  # recorded the same iterations with its own window
        for layer in (source, direct):
            layer.warmup_iters = 100
            train(layer, xs[:iterations])
        target = random_mabn(buffer_size=new, seed=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            target.load_state_dict(source.state_dict(), strict=True)
        assert any('window of 4 iterations into one of' in str(w.message) for w in caught) == (old != new)
        for name in ('buffer_x2', 'buffer_gz'):
            rows = getattr(target, name)
            for i in range(iterations, max(iterations - min(old, new), 0), -1):
                assert torch.equal(rows[i % new], getattr(direct, name)[i % new])
            if old < new:
                known = getattr(source, name).sum(0) / max(min(iterations, old), 1)  # rows not yet written are 0
                torch.testing.assert_close(rows.mean(0), known)
        assert target.iters.item() == iterations

    def test_a_state_without_windows_restarts_the_counter_too(self):
        layer = random_mabn()
        train(layer, torch.randn(6, 2, 3, 4, 4))
        state = dict(weight=torch.ones(3), bias=torch.zeros(3), running_var=torch.ones(3), iters=torch.tensor([6e5]))
        result = layer.load_state_dict(state, strict=False)
        assert result.missing_keys == ['buffer_x2', 'buffer_gz'] and layer.iters.item() == 0
        with pytest.raises(RuntimeError, match=r'Missing key.*buffer_x2'):
            random_mabn().load_state_dict(state)

    def test_a_state_of_other_layers_changes_nothing(self):
        layer = random_mabn()
        train(layer, torch.randn(6, 2, 3, 4, 4))
        before = state_of(layer)
        nn.ModuleDict({'norm': layer, 'fc': nn.Linear(2, 2)}).load_state_dict({'fc.bias': torch.ones(2)}, strict=False)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

    def test_another_width_is_a_size_mismatch(self):
        for state in (MABN(5).state_dict(), nn.BatchNorm2d(5).state_dict()):
            with pytest.raises(RuntimeError, match='size mismatch for weight'):
                MABN(4).load_state_dict(state)


class TestSituations:
    @pytest.mark.parametrize('iterations', [1, 8])
    @pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
    def test_autocast_keeps_dtype_and_fp32_state_and_is_close(self, dtype, tolerance, iterations):
        reference, layer = random_mabn(delay=6), random_mabn(delay=6)
        xs = torch.randn(iterations, 2, 3, 6, 6)
        expected = train(reference, xs)
        with torch.autocast('cpu', dtype=dtype):
            actual = train(layer, xs.to(dtype))
        for a, e in zip(actual, expected):
            assert a.dtype == dtype
            torch.testing.assert_close(a.float(), e, rtol=tolerance, atol=tolerance * 3)
        for key, value in layer.state_dict().items():
            assert value.dtype == (torch.int64 if key == 'iters' else torch.float32)
            torch.testing.assert_close(value, reference.state_dict()[key], rtol=tolerance, atol=tolerance)
        assert layer.weight.grad.dtype == torch.float32

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_large_half_values_do_not_overflow_without_autocast(self, dtype):
        layer = random_mabn()
        x = (torch.randn(2, 3, 6, 6) * 3000).to(dtype).requires_grad_()
        y = layer(x)
        (y.float().square().sum() * 100).backward()
        assert y.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()
        close(layer.buffer_x2[1], x.detach().float().square().mean((0, 2, 3)), 'moment', 1e-6)
        assert layer.eval()(x).dtype == dtype

    def test_a_layer_cast_to_half_runs(self):
        layer = random_mabn().half()
        assert all(v.isfinite().all() for v in train(layer, torch.randn(8, 2, 3, 4, 4).half()))
        assert layer.eval()(torch.randn(1, 3, 2, 2).half()).dtype == torch.half

    @pytest.mark.parametrize('warmup', [3, 100])
    def test_an_overflow_of_one_iteration_stays_out_of_the_state(self, warmup):
        layer, xs = random_mabn(warmup_iters=warmup), torch.randn(8, 2, 3, 4, 4)
        train(layer, xs)
        before = state_of(layer)
        bad = xs[0].clone()
        bad[0, 1, 0, 0] = float('inf')
        train(layer, [bad])
        train(layer, xs[:1], scale=float('inf'))
        for key, value in layer.state_dict().items():
            assert value.isfinite().all(), key
        assert not torch.equal(layer.running_var, before['running_var'])  # the other channels moved
        assert all(v.isfinite().all() for v in train(layer, xs[:2]))

    @pytest.mark.parametrize('iterations', [1, 8])
    def test_an_empty_batch_changes_no_state_and_has_zero_gradients(self, iterations):
        layer = random_mabn()
        train(layer, torch.randn(iterations, 2, 3, 4, 4))
        layer.zero_grad()
        before = state_of(layer)
        for shape in ((0, 3, 6, 5), (2, 3, 0, 5)):
            x = torch.zeros(shape, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert y.shape == shape and x.grad.shape == shape
        assert layer.weight.grad.abs().sum() == 0 and layer.bias.grad.abs().sum() == 0
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

    @pytest.mark.parametrize('shape', [(1, 3, 1, 1), (5, 3, 1, 1), (1, 3, 7, 7), (7, 3, 2, 1)])
    def test_any_batch_size_and_single_pixels_follow_the_formula(self, shape):
        layer = random_mabn(dtype=torch.float64, delay=6)
        reference = reference_of(layer)
        xs = torch.randn(9, *shape, dtype=torch.float64)
        torch.testing.assert_close(train(layer, xs), train(reference, xs), rtol=1e-12, atol=1e-12)

    def test_constant_zero_and_huge_channels_stay_finite(self):
        layer = random_mabn()
        x = torch.tensor([0.0, 5.0, 1e8]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
        results = train(layer, [x] * 8)
        assert all(v.isfinite().all() for v in results) and all(v.isfinite().all() for v in layer.state_dict().values())
        torch.testing.assert_close(results[0][:, 0], layer.bias[0].expand(2, 4, 4))

    def test_frozen_parameters_or_input_leave_the_rest_as_it_is(self):
        xs = torch.randn(8, 2, 3, 4, 4)
        reference, frozen, no_input_grad = random_mabn(), random_mabn().requires_grad_(False), random_mabn()
        expected = train(reference, xs)
        for a, e in zip(train(frozen, xs), expected):
            assert torch.equal(a, e)
        for i, x in enumerate(xs):
            y = no_input_grad(x)
            y.backward(upstream(y, i))
        assert frozen.weight.grad is None and torch.equal(no_input_grad.weight.grad, reference.weight.grad)
        assert_same_state(reference, frozen), assert_same_state(reference, no_input_grad)

    def test_a_forward_without_backward_is_an_iteration_with_or_without_grad(self):
        x, layers = torch.randn(2, 3, 4, 4), [random_mabn() for _ in range(3)]
        layers[0](x)
        with torch.no_grad():
            layers[1](x)
        layers[2].requires_grad_(False)(x)
        for layer in layers:
            assert layer.iters.item() == 1 and layer.buffer_gz.abs().sum() == 0 and (layer.running_var != 1).all()
            assert torch.equal(layer.buffer_x2, layers[0].buffer_x2)

    def test_no_value_is_read_on_the_host_in_training(self):
        """The meta device has no values to read."""
        layer = random_mabn().to('meta')
        x = torch.empty(2, 3, 4, 4, device='meta', requires_grad=True)
        for _ in range(3):
            layer(x).sum().backward()
        (checkpoint(layer, x, use_reentrant=True) + checkpoint(layer, x, use_reentrant=False)).sum().backward()

    def test_it_saves_the_input_and_vectors_only(self):
        saved = []
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            random_mabn()(x)
        assert [t.data_ptr() for t in saved if t.numel() > 3] == [x.data_ptr()]

    def test_sync_bn_conversion_and_fusion_leave_it_alone(self):
        model = nn.Sequential(CenConv2d(3, 3, 1), random_mabn()).eval()
        x = torch.randn(2, 3, 4, 4)
        expected = model(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert type(converted[1]) is MABN and torch.equal(converted(x), expected)
        assert torch.equal(fuse_conv_bn(copy.deepcopy(model))(x), expected)

    def test_a_conv_module_names_it_bn_and_initializes_it(self):
        module = ConvModule(2, 4, 1, norm_cfg=dict(type=MABN, B=4, real_B=32, requires_grad=False))
        assert module.norm is module.bn and module.norm.buffer_size == 8 and not module.norm.weight.requires_grad


class TestSharedAndCheckpointed:
    def test_two_calls_before_one_backward_are_two_iterations(self):
        layer = random_mabn(2, torch.float64, buffer_size=3, warmup_iters=0)
        train(layer, torch.randn(5, 2, 2, 3, 3, dtype=torch.float64))
        old = layer.buffer_gz.clone()
        x1, x2, g1, g2 = torch.randn(4, 2, 2, 3, 3, dtype=torch.float64)
        x1.requires_grad_(), x2.requires_grad_()
        y1 = layer(x1)
        v1 = layer.buffer_x2.mean(0)
        y2 = layer(x2)
        v2 = layer.buffer_x2.mean(0)
        assert layer.iters.item() == 7
        y2.backward(g2, retain_graph=True)
        scale1, scale2 = (layer.weight / (v + 1e-5).sqrt() for v in (v1, v2))
        psi2 = (g2 * x2).mean((0, 2, 3)) * scale2
        close(layer.buffer_gz, torch.stack([old[0], psi2, old[2]]).detach(), 'row of call 7')
        y1.backward(g1)
        psi1 = (g1 * x1).mean((0, 2, 3)) * scale1
        rows = torch.stack([psi1, psi2, old[2]]).detach()
        close(layer.buffer_gz, rows, 'row of call 6')
        p = (rows.mean(0) / (v1 + 1e-5))[:, None, None]
        close(x1.grad, (g1 * scale1[:, None, None] - x1 * p).detach(), 'gx of call 6')

    @staticmethod
    def one(model, run, x):
        return run(model, x)

    @staticmethod
    def consecutive(model, run, x):
        return run(model[2:], run(model[:2], x))

    @staticmethod
    def shared(model, run, x):
        return run(model, x[:1]) + run(model, x[1:]) * 2

    @staticmethod
    def shared_within(model, run, x):
        return run(lambda x: model(x[:1]) + model(x[1:]) * 2, x)

    @staticmethod
    def same_input_twice(model, run, x):
        return run(model, x) + run(model, x)

    @staticmethod
    def nested(model, run, x):
        return run(lambda x: model[2:](run(model[:2], x)), x)

    @pytest.mark.parametrize('reentrant', [True, False])
    @pytest.mark.parametrize(
        'arrangement', ['one', 'consecutive', 'shared', 'shared_within', 'same_input_twice', 'nested']
    )
    def test_checkpointing_changes_neither_outputs_nor_gradients_nor_state(self, arrangement, reentrant):
        torch.manual_seed(0)
        plain = nn.Sequential(CenConv2d(3, 4, 3), random_mabn(4, delay=9), CenConv2d(4, 3, 1), random_mabn(3, delay=9))
        plain.double()
        saved = copy.deepcopy(plain)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (plain, saved)]
        arrange = getattr(self, arrangement)
        for i in range(14):
            x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
            grads = []
            for model, run, optimizer in zip(
                (plain, saved),
                (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)),
                optimizers,
            ):
                optimizer.zero_grad()
                x_in = x.clone().requires_grad_()
                y = arrange(model, run, x_in)
                y.square().mean().backward()
                optimizer.step()
                grads.append((y.detach(), x_in.grad))
            for a, b in zip(*grads):
                close(a, b, f'iteration {i}', 1e-10)
            for key, value in plain.state_dict().items():
                close(saved.state_dict()[key], value, f'iteration {i} {key}', 1e-10)

    @pytest.mark.parametrize('reentrant', [True, False])
    def test_a_second_backward_through_a_checkpoint_repeats_the_first(self, reentrant):
        layer, x = random_mabn(), torch.randn(2, 3, 4, 4, requires_grad=True)
        train(layer, torch.randn(6, 2, 3, 4, 4))
        y = checkpoint(layer, x, use_reentrant=reentrant)
        if reentrant:
            layer(torch.randn(2, 3, 4, 4))  # another call in between
        y.sum().backward(retain_graph=True)
        first, before = x.grad.clone(), state_of(layer)
        x.grad = None
        y.sum().backward()
        torch.testing.assert_close(x.grad, first)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

    def test_calls_recorded_before_a_move_to_another_device_are_forgotten(self):
        layer = random_mabn()
        train(layer, torch.randn(3, 2, 3, 4, 4))
        layer.to('meta')
        x = torch.empty(2, 3, 4, 4, device='meta', requires_grad=True)
        checkpoint(layer, x, use_reentrant=True).sum().backward()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.out = CenConv2d(3, 4, 3, padding=1), random_mabn(4, delay=6), CenConv2d(4, 4, 1)
        self.how = 'plain'

    def body(self, x):
        return torch.relu(self.norm(self.conv(x)))

    def forward(self, x):
        if self.how == 'shared':
            return self.norm(self.out(self.body(x)))
        if self.how == 'checkpoint':
            return self.out(checkpoint(self.body, x, use_reentrant=False))
        return self.out(self.body(x))


@pytest.mark.slow
class TestCompile:
    def compare(self, eager, compiled, model, tolerance=1e-5):
        for i in range(9):
            x, results = torch.randn(2, 3, 5, 5), []
            for run, net in ((eager, eager), (compiled, model)):
                x_in = x.clone().requires_grad_()
                net.zero_grad()
                y = run(x_in)
                y.backward(upstream(y, i))
                state = {k.replace('_orig_mod.', ''): v for k, v in net.state_dict().items()}
                results.append([y, x_in.grad, *(p.grad for p in net.parameters()), *(state[k] for k in sorted(state))])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        x = torch.randn(2, 3, 5, 5)
        torch.testing.assert_close(eager.eval()(x), compiled.eval()(x))

    @pytest.mark.parametrize('how', ['shared', 'checkpoint'])
    def test_a_compiled_model_equals_eager_with_a_graph_break_at_the_layer(self, how):
        torch._dynamo.reset()
        eager, model = Net(), Net()
        eager.how, model.how = 'shared' if how == 'shared' else 'plain', how
        with pytest.raises(torch._dynamo.exc.Unsupported, match='_forward_train'):
            torch.compile(Net(), backend='aot_eager', fullgraph=True)(torch.randn(2, 3, 5, 5))
        torch._dynamo.reset()
        self.compare(eager, torch.compile(model, backend='aot_eager'), model)

    def test_a_compiled_layer_inside_a_checkpoint_equals_eager(self):
        torch._dynamo.reset()
        eager, model = Net(), Net()
        model.how, model.norm = 'checkpoint', torch.compile(model.norm, backend='aot_eager')
        self.compare(eager, model, model)

    @pytest.mark.parametrize('how', ['plain', 'checkpoint'])
    def test_generated_code_equals_eager(self, how):
        torch._dynamo.reset()
        model = Net()
        model.how = how
        try:
            compiled = torch.compile(model)
            compiled(torch.randn(2, 3, 5, 5))
        except Exception as error:
            pytest.skip(f'no compiler for generated code here: {type(error).__name__}')
        model.load_state_dict(Net().state_dict())
        self.compare(Net(), compiled, model, 1e-4)


def _rank(out):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    model = nn.Sequential(CenConv2d(3, 4, 3), random_mabn(4, delay=6))
    parallel = nn.parallel.DistributedDataParallel(model)  # broadcasts the buffers before each forward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    for _ in range(8):
        optimizer.zero_grad()
        parallel(torch.randn(2, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f'{out}/{rank}.pth')
    dist.barrier()
    os._exit(0)  # freeing the process group can deadlock with its worker thread


@pytest.mark.slow
def test_distributed_processes_share_parameters_and_keep_their_own_statistics(tmp_path):
    warm.run_together([sys.executable, __file__, str(tmp_path)])
    a, b = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    for key in a:
        assert torch.equal(a[key], b[key]) == (key.split('.')[1] in ('weight', 'bias', 'iters')), key


class TestUncentred:
    def test_the_first_forward_behind_a_plain_convolution_warns_once_with_the_fix(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), random_mabn(4))
        with pytest.warns(UserWarning, match=r"does not centre its weight; write conv_cfg=dict\(type='CenConv'\)"):
            model(torch.randn(2, 3, 4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            model(torch.randn(2, 3, 4, 4))

    def test_it_warns_under_autocast_and_checkpointing_too(self):
        for context in (torch.autocast('cpu', dtype=torch.bfloat16), torch.enable_grad()):
            model = nn.Sequential(nn.Conv2d(3, 4, 1), random_mabn(4))
            with pytest.warns(UserWarning, match='CenConv'), context:
                y = checkpoint(model, torch.randn(2, 3, 4, 4, requires_grad=True), use_reentrant=True)
                y.sum().backward()

    def test_nothing_is_said_behind_a_centred_convolution_or_none(self):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            nn.Sequential(CenConv2d(3, 4, 1), random_mabn(4))(torch.randn(2, 3, 4, 4))
            random_mabn(4)(torch.randn(2, 4, 4, 4))
            assert warn_if_uncentred(nn.Sequential(CenConv2d(3, 4, 1), MABN(4), nn.Linear(2, 2), MABN(2))) == []

    def test_the_model_is_warned_of_once_naming_the_layers(self):
        model = nn.ModuleDict(
            {
                'neck': ConvModule(3, 4, 1, norm_cfg=dict(type=MABN)),
                'head': nn.Sequential(nn.Conv2d(3, 4, 1), MABN(4), nn.ReLU(), CenConv2d(4, 4, 1), MABN(4)),
            }
        )
        with pytest.warns(UserWarning, match=r"in front of neck\.bn, head\.1 do not.*type='CenConv'") as caught:
            assert warn_if_uncentred(model) == ['neck.bn', 'head.1']
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            model['head'](torch.randn(2, 3, 4, 4))

    def test_a_norm_before_its_convolution_is_not_behind_it(self):
        module = ConvModule(4, 4, 1, norm_cfg=dict(type=MABN), order=('norm', 'conv', 'act'))
        assert warn_if_uncentred(module) == []


class TestBadArguments:
    def test_the_default_window_is_16_and_buffer_size_is_the_window(self):
        assert MABN(4).buffer_size == 16 and MABN(4, B=4).buffer_size == 8 and MABN(4, real_B=8).buffer_size == 4
        assert MABN(4, buffer_size=5).buffer_x2.shape == (5, 4)

    @pytest.mark.parametrize('both', [dict(B=2), dict(real_B=32), dict(B=2, real_B=32)])
    def test_buffer_size_beside_b_is_refused(self, both):
        with pytest.raises(ValueError, match='buffer_size=16 stands in place of'):
            MABN(4, buffer_size=16, **both)

    def test_a_real_b_that_b_does_not_divide_is_refused(self):
        with pytest.raises(ValueError, match='real_B=32 is no multiple of B=3'):
            MABN(4, B=3)

    @pytest.mark.parametrize(
        'key, value',
        [
            ('B', 0),
            ('B', 2.0),
            ('real_B', True),
            ('buffer_size', 0),
            ('eps', 0),
            ('warmup_iters', -1),
            ('warmup_iters', '8e'),
            ('momentum', 1.5),
        ],
    )
    def test_a_number_out_of_range_is_named(self, key, value):
        with pytest.raises(ValueError, match=f"'MABN': {key}={value!r}"):
            MABN(4, **{key: value})

    def test_an_unknown_key_is_named_with_the_valid_ones(self):
        with pytest.raises(TypeError, match=r"unknown key real_b=32 \(did you mean 'real_B'\?\).*buffer_size"):
            MABN(4, real_b=32)

    @pytest.mark.parametrize('shape', [(2, 4), (2, 5, 3, 3), (4, 3, 3)])
    def test_an_input_of_another_shape_is_refused_before_the_state_moves(self, shape):
        layer = MABN(4)
        with pytest.raises(ValueError, match=r'MABN\(4\) got an input of shape .*must be \(N, 4, H, W\)'):
            layer(torch.randn(shape))
        assert layer.iters.item() == 0


if __name__ == '__main__':
    _rank(sys.argv[1])
