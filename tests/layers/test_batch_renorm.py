"""BRN against the paper's formulas, its schedule, and its place between batch norm in training and in eval."""

import copy

import numpy as np
import pytest
import torch
from mmcv.cnn import build_norm_layer
from torch import nn

from mmdet_norms.kernels import image_groups
from mmdet_norms.layers._args import ConfigError
from mmdet_norms.layers.batch_renorm import BRN


def random_brn(channels=3, done=10**6, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = BRN(channels, **kwargs).double()
    nn.init.normal_(layer.bn.weight), nn.init.normal_(layer.bn.bias)
    layer.bn.running_mean.normal_(), layer.bn.running_var.uniform_(0.2, 3)
    layer.bn.num_batches_tracked.fill_(done)
    return layer


def oracle(layer, x, r_max, d_max):
    """y, d(sum of y * gy)/dx for a given gy, and the new running values, as the paper writes them."""
    values = {key: value.numpy().copy() for key, value in layer.state_dict().items()}
    eps, momentum = layer.bn.eps, layer.bn.momentum
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    sigma_b, sigma = np.sqrt(var + eps), np.sqrt(values['running_var'] + eps)
    r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
    d = np.clip((mean - values['running_mean']) / sigma, -d_max, d_max)

    def channel(v):
        return v.reshape(1, -1, 1, 1)

    x_hat = (x - channel(mean)) / channel(sigma_b) * channel(r) + channel(d)
    y = channel(values['weight']) * x_hat + channel(values['bias'])
    n = x.size // x.shape[1]

    def grad_x(gy):
        """Paper, section 3: r and d are constants, so batch norm's gradient times r."""
        g = gy * channel(values['weight'] * r)
        z = (x - channel(mean)) / channel(sigma_b)
        g_mean, gz_mean = g.mean((0, 2, 3)), (g * z).mean((0, 2, 3))
        return (g - channel(g_mean) - z * channel(gz_mean)) / channel(sigma_b)

    running_mean = values['running_mean'] + momentum * (mean - values['running_mean'])
    running_var = values['running_var'] + momentum * (var * n / (n - 1) - values['running_var'])
    return y, grad_x, (lambda gy: (gy * x_hat).sum((0, 2, 3))), running_mean, running_var


class TestMaths:
    @pytest.mark.parametrize('r_max, d_max', [(3, 5), (1.2, 0.3), (1, 0), (1e6, 1e6)])
    def test_three_training_steps_equal_the_formulas_written_out(self, r_max, d_max):
        layer = random_brn(r_max=r_max, d_max=d_max, momentum=0.1, eps=1e-3)
        for step in range(3):
            x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + step
            gy = torch.randn_like(x)
            y, grad_x, grad_weight, mean, var = oracle(layer, x.numpy(), r_max, d_max)
            layer.zero_grad()
            x.requires_grad_()
            out = layer(x)
            out.backward(gy)
            np.testing.assert_allclose(out.detach().numpy(), y, rtol=1e-11, atol=1e-11)
            np.testing.assert_allclose(x.grad.numpy(), grad_x(gy.numpy()), rtol=1e-10, atol=1e-11)
            np.testing.assert_allclose(layer.bn.weight.grad.numpy(), grad_weight(gy.numpy()), rtol=1e-10)
            np.testing.assert_allclose(layer.bn.bias.grad.numpy(), gy.sum((0, 2, 3)).numpy(), rtol=1e-10)
            np.testing.assert_allclose(layer.bn.running_mean.numpy(), mean, rtol=1e-12)
            np.testing.assert_allclose(layer.bn.running_var.numpy(), var, rtol=1e-12)

    def test_without_clipping_training_computes_what_eval_computes(self):
        layer = random_brn(r_max=1e9, d_max=1e9)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(layer(x), random_brn().eval()(x))

    def test_it_is_batch_norm_during_warm_up_and_in_eval(self):
        layer, plain = BRN(4, momentum=0.1), nn.BatchNorm2d(4)
        for _ in range(3):
            x = torch.randn(2, 4, 6, 6)
            torch.testing.assert_close(layer(x), plain(x))
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-6, atol=1e-7)
        layer.load_state_dict(plain.state_dict())
        assert torch.equal(layer.eval()(x), plain.eval()(x))


class TestSchedule:
    @pytest.mark.parametrize(
        'done, r_max, d_max',
        [(0, 1, 0), (4999, 1, 0), (5000, 1, 0), (15000, 1 + 2 * 10 / 35, 2.5), (25000, 1 + 2 * 20 / 35, 5),
         (40000, 3, 5), (10**7, 3, 5)],
    )  # fmt: skip
    def test_defaults_are_the_papers(self, done, r_max, d_max):
        r, d = random_brn(done=done).limits()
        assert r.item() == pytest.approx(r_max) and d.item() == pytest.approx(d_max)

    def test_limits_may_jump_after_the_warm_up(self):
        layer = BRN(4, warmup_iters=2, r_iters=2, d_iters=2)
        limits = []
        for _ in range(4):
            limits.append(tuple(limit.item() for limit in layer.limits()))
            layer(torch.randn(2, 4, 3, 3))
        assert limits == [(1, 0), (1, 0), (1, 0), (3, 5)]


class TestPlace:
    def test_the_state_dict_is_batch_norms_and_loads_into_one(self):
        layer, plain = BRN(4), nn.BatchNorm2d(4)
        layer(torch.randn(2, 4, 3, 3))
        assert layer.state_dict().keys() == plain.state_dict().keys()
        plain.load_state_dict(layer.state_dict(), strict=True)
        x = torch.randn(2, 4, 3, 3)
        assert torch.equal(plain.eval()(x), layer.eval()(x))

    def test_mmcv_builds_it_under_batch_norms_name(self):
        name, layer = build_norm_layer(dict(type=BRN, r_max=2, requires_grad=False), 4, postfix=2)
        assert name == 'bn2' and layer.r_max == 2 and not any(p.requires_grad for p in layer.parameters())

    def test_a_single_value_is_the_shift_and_leaves_the_variance(self):
        layer = random_brn()
        before, x = copy.deepcopy(layer.state_dict()), torch.randn(1, 3, 1, 1, dtype=torch.float64)
        d = ((x.flatten() - layer.bn.running_mean) / (layer.bn.running_var + 1e-5).sqrt()).clamp(-5, 5)
        torch.testing.assert_close(layer(x).flatten(), (layer.bn.weight * d + layer.bn.bias))
        assert torch.equal(layer.bn.running_var, before['running_var'])
        assert not torch.equal(layer.bn.running_mean, before['running_mean'])

    @pytest.mark.parametrize('reentrant', [True, False])
    def test_recomputation_uses_the_corrections_of_the_forward_it_repeats(self, reentrant):
        """They depend on running statistics, which have moved on by then."""
        plain = random_brn(momentum=0.5)
        saved = copy.deepcopy(plain)
        grads = []
        for layer, wrap in ((plain, lambda f, x: f(x)), (saved, torch.utils.checkpoint.checkpoint)):
            torch.manual_seed(3)
            xs = [(torch.randn(2, 3, 4, 4, dtype=torch.float64) + i).requires_grad_() for i in range(3)]
            options = {} if layer is plain else dict(use_reentrant=reentrant)
            outputs = [wrap(layer, x, **options) for x in xs]
            sum(y.pow(3).sum() for y in outputs).backward()
            grads.append([x.grad for x in xs])
        for ours, theirs in zip(*grads):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(plain.state_dict()[k], v) for k, v in saved.state_dict().items())

    def test_of_equal_batches_recomputation_finds_the_newest(self):
        plain = random_brn(momentum=0.5)
        saved = copy.deepcopy(plain)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            expected = torch.autograd.grad(plain(x).pow(3).sum(), x)[0]
            y = torch.utils.checkpoint.checkpoint(saved, x, use_reentrant=False)
            torch.testing.assert_close(torch.autograd.grad(y.pow(3).sum(), x)[0], expected, rtol=1e-12, atol=1e-12)

    def test_a_first_forward_inside_a_backward_pass_is_no_error(self):
        layer, x = random_brn(), torch.ones(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        expected, results = copy.deepcopy(layer)(x), []
        y = x * 1
        y.register_hook(lambda grad: results.append(layer(x)))
        y.sum().backward()
        torch.testing.assert_close(results[0], expected)


class TestNormBatch:
    @pytest.mark.parametrize('way', ['kernels', 'operators'])
    @pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize('r_max, d_max', [(3, 5), (1.2, 0.3)])
    def test_each_group_equals_the_formulas_written_out_and_the_batch_counts_once(
        self, r_max, d_max, layout, way, monkeypatch
    ):
        if way == 'operators':  # what compiled code and other devices get
            monkeypatch.setattr(image_groups, 'is_supported', lambda x: False)
        layer = random_brn(r_max=r_max, d_max=d_max, momentum=0.1, eps=1e-3, norm_batch=2)
        for step in range(3):
            x = (torch.randn(6, 3, 4, 5, dtype=torch.float64) * 3 + step).contiguous(memory_format=layout)
            gy = torch.randn_like(x)
            pairs = [oracle(layer, pair.numpy(), r_max, d_max) for pair in x.split(2)]
            gs = [g.numpy() for g in gy.split(2)]
            done = layer.bn.num_batches_tracked.item()
            layer.zero_grad()
            out = layer(x.requires_grad_())
            out.backward(gy)
            wanted = dict(
                y=(out.detach(), np.concatenate([pair[0] for pair in pairs])),
                gx=(x.grad, np.concatenate([pair[1](g) for pair, g in zip(pairs, gs)])),
                gw=(layer.bn.weight.grad, sum(pair[2](g) for pair, g in zip(pairs, gs))),
                gb=(layer.bn.bias.grad, gy.sum((0, 2, 3)).numpy()),
                mean=(layer.bn.running_mean, np.mean([pair[3] for pair in pairs], 0)),
                var=(layer.bn.running_var, np.mean([pair[4] for pair in pairs], 0)),
            )
            for name, (actual, expected) in wanted.items():
                np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10, atol=1e-11, err_msg=name)
            assert layer.bn.num_batches_tracked == done + 1 and out.is_contiguous(memory_format=layout)

    def test_with_the_whole_batch_as_group_it_is_as_without(self):
        plain, grouped = random_brn(), random_brn(norm_batch=4)
        for _ in range(3):
            x = torch.randn(4, 3, 5, 4, dtype=torch.float64)
            torch.testing.assert_close(grouped(x), plain(x))
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(grouped.state_dict()[key], value)

    def test_a_batch_that_is_no_multiple_is_refused_in_training_only(self):
        layer = random_brn(norm_batch=2)
        before, x = copy.deepcopy(layer.state_dict()), torch.randn(3, 3, 4, 4, dtype=torch.float64)
        with pytest.raises(ConfigError, match="'BRN': norm_batch=2 does not divide this batch of 3"):
            layer(x)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
        assert layer(x[:0]).shape == (0, 3, 4, 4) and layer.eval()(x).isfinite().all()

    @pytest.mark.parametrize('reentrant', [True, False])
    def test_recomputation_uses_the_corrections_of_the_forward_it_repeats(self, reentrant):
        plain = random_brn(momentum=0.5, norm_batch=2)
        saved = copy.deepcopy(plain)
        xs = [(torch.randn(n, 3, 4, 4, dtype=torch.float64) + n).requires_grad_() for n in (4, 2, 4)]
        expected = torch.autograd.grad(sum(plain(x).pow(3).sum() for x in xs), xs)
        for x in xs:
            x.grad = None
        ys = [torch.utils.checkpoint.checkpoint(saved, x, use_reentrant=reentrant) for x in xs]
        sum(y.pow(3).sum() for y in ys).backward()
        for x, wanted in zip(xs, expected):
            torch.testing.assert_close(x.grad, wanted, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(plain.state_dict()[k], v) for k, v in saved.state_dict().items())


class TestBadArguments:
    @pytest.mark.parametrize(
        'key, value, rest',
        [('r_max', 0.5, 'a number of at least 1'), ('d_max', -1, 'a number of at least 0'),
         ('r_max', 'x', 'a number'), ('d_max', float('inf'), 'a number'), ('warmup_iters', -1, 'an integer'),
         ('warmup_iters', 1.5, 'an integer'), ('r_iters', 4999, r'an integer of at least 5000 \(warmup_iters\)'),
         ('norm_batch', 0, 'an integer of at least 1'),
         ('d_iters', 10, r'at least 5000 \(warmup_iters\)'), ('r_iters', None, 'an integer')],
    )  # fmt: skip
    def test_a_limit_or_schedule_out_of_range_is_named(self, key, value, rest):
        with pytest.raises(ValueError, match=f"'BRN': {key}={value!r} must be .*{rest}"):
            BRN(4, **{key: value})
