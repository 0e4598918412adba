"""MABN over groups of images (`norm_batch`) against its reference in float64, and the states that it lives through."""

import copy
import pickle
import warnings

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_norms import fuse
from mmdet_norms.layers import MABN, CenConv2d
from mmdet_norms.layers._args import ConfigError
from mmdet_norms.layers.mabn_groups import GroupedMABN
from mmdet_norms.reference import ReferenceGroupedMABN


def grouped(channels=3, dtype=torch.float32, seed=0, norm_batch=2, **kwargs):
    torch.manual_seed(seed)
    layer = MABN(channels, norm_batch=norm_batch, **{'buffer_size': 4, 'warmup_iters': 3, **kwargs}).to(dtype)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer


def close(actual, expected, what, tolerance=1e-12):
    expected = torch.as_tensor(expected)
    error = ((actual.detach() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    assert error <= tolerance, f'{what}: {error}'


def train(layer, xs, scale=1.0):
    results = []
    for i, x in enumerate(xs):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(x)
        g = torch.randn(
            y.shape, generator=torch.Generator().manual_seed(i), dtype=torch.promote_types(y.dtype, torch.float)
        )
        y.backward(g.to(y.dtype) * scale)
        results += [y.detach(), x.grad]
    return results


def state_of(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def against_the_reference(layer, batches, changes=(), layout=torch.contiguous_format):
    """Batches of these sizes, those of ``changes`` on another scale. The renorm factors."""
    arguments = dict(norm_batch=layer.norm_batch, buffer_size=layer.buffer_size, warmup_iters=layer.warmup_iters)
    reference, seen = ReferenceGroupedMABN(3, **arguments).double(), []
    renorm = reference.renorm
    reference.renorm = lambda v, t: seen.append(renorm(v, t)) or seen[-1]
    generator = torch.Generator().manual_seed(5)
    for i, images in enumerate(batches):
        for parameter, other in zip(layer.parameters(), reference.parameters()):
            parameter.data.normal_(generator=generator)
            other.data.copy_(parameter)
        x, g = (torch.randn(images, 3, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
        x = (x * (1 + i % 3) + torch.arange(3.0)[:, None, None]) * dict(changes).get(i, 1)
        results = []
        for norm in (layer, reference):
            leaf = x.clone(memory_format=layout).requires_grad_()
            norm.zero_grad()
            y = norm(leaf)
            y.backward(g)
            gradients = {f'gradient of {name}': parameter.grad for name, parameter in norm.named_parameters()}
            results.append(dict(y=y, gx=leaf.grad, **gradients, **state_of(norm)))
        actual, expected = results
        for name, value in expected.items():
            close(actual[name], value, (i, name))
        assert layer.iters.item() == i + 1 and actual['y'].is_contiguous(memory_format=layout)
    return seen


class TestMaths:
    @pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
    def test_150_iterations_equal_the_published_variant(self, layout):
        """As published: as many groups of two as rows in the window, the factor from the 100th iteration on."""
        layer = MABN(3, norm_batch=2, real_B=8).double()
        changes = {105: 30, 106: 30, **dict.fromkeys(range(110, 130), 1e-3)}
        seen = against_the_reference(layer, [8] * 150, changes, layout)
        assert all((factors == 1).all() for factors in seen[:99]) and (seen[99] != 1).any()
        assert max(f.max() for f in seen) == 5 and min(f.min() for f in seen) == 1 / 5

    @pytest.mark.parametrize(
        'norm_batch, window, images', [(2, 5, 4), (2, 5, 6), (2, 2, 10), (1, 4, 4), (4, 1, 8), (3, 4, 3)]
    )
    def test_fewer_and_more_groups_than_rows(self, norm_batch, window, images):
        layer = grouped(dtype=torch.float64, norm_batch=norm_batch, buffer_size=window, warmup_iters=6)
        against_the_reference(layer, [images] * 20)

    def test_batches_of_changing_size(self):
        layer = grouped(dtype=torch.float64, norm_batch=2, buffer_size=4, warmup_iters=6)
        against_the_reference(layer, [8, 2, 6, 12, 2, 2, 8, 8])
        layer = grouped(dtype=torch.float64, norm_batch=2, buffer_size=4, warmup_iters=6)
        against_the_reference(layer, [2, 8, 4, 6, 2, 8, 2])

    def test_one_group_a_batch_has_the_window_of_the_detection_variant(self):
        layer = grouped(dtype=torch.float64, norm_batch=2, warmup_iters=1000)
        other = MABN(3, buffer_size=4, warmup_iters=0).double()
        other.load_state_dict(dict(weight=layer.weight, bias=layer.bias), strict=False)
        xs = torch.randn(9, 2, 3, 4, 5, dtype=torch.float64)
        for i, (ours, theirs) in enumerate(zip(train(layer, xs), train(other, xs))):
            close(ours, theirs, i)

    @pytest.mark.parametrize('training', [True, False])
    def test_while_each_group_stands_alone_and_in_eval_the_backward_is_the_true_gradient(self, training):
        layer = grouped(2, torch.float64).train(training)

        def run(x, weight, bias):
            return torch.func.functional_call(copy.deepcopy(layer), {'weight': weight, 'bias': bias}, (x,))

        x = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
        params = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]
        assert torch.autograd.gradcheck(run, (x, *params))

    def test_a_second_derivative_is_refused_not_wrong(self):
        x = torch.randn(4, 3, 4, 4, requires_grad=True)
        with pytest.raises(RuntimeError, match='MABN has no second derivative'):
            torch.autograd.grad(grouped()(x).square().sum(), x, create_graph=True)

    def test_eval_is_a_batch_norm_with_mean_zero_of_any_batch(self):
        layer = grouped()
        train(layer, torch.randn(5, 4, 3, 4, 4))
        before, x = state_of(layer), torch.randn(3, 3, 5, 4) + 1
        y = layer.eval()(x)
        weight, bias, var = (p.detach()[:, None, None] for p in (layer.weight, layer.bias, layer.running_var))
        close(y, weight * x / (var + 1e-5).sqrt() + bias, 'y', 1e-6)
        close(layer.to_batch_norm()(x), y.detach(), 'to_batch_norm', 1e-6)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


class TestArguments:
    def test_by_name_and_in_code(self):
        name, layer = build_norm_layer(dict(type='MABN', norm_batch=2, requires_grad=False), 4, postfix=2)
        assert name == 'bn2' and type(layer) is GroupedMABN and isinstance(layer, MABN)
        assert (layer.norm_batch, layer.buffer_size, layer.warmup_iters) == (2, 16, 100)
        assert type(MABN(4)) is type(MABN(4, norm_batch=None)) is MABN
        assert MABN(4, 2, 16, 10, 0.9, 1e-3, None, 2).buffer_size == 8

    @pytest.mark.parametrize('norm_batch, window', [(1, 32), (4, 8), (32, 1)])
    def test_the_window_is_the_batch_to_imitate_in_groups(self, norm_batch, window):
        assert (
            MABN(4, norm_batch=norm_batch).buffer_size
            == MABN(4, B=norm_batch, norm_batch=norm_batch).buffer_size
            == window
        )

    @pytest.mark.parametrize(
        'keys, said',
        [
            (dict(norm_batch=0), 'norm_batch=0 must be an integer of at least 1'),
            (dict(norm_batch=2, B=4), 'norm_batch=2 stands in place of B=4'),
            (dict(norm_batch=3), 'real_B=32 is no multiple of B=3'),
            (dict(norm_batch=2, buffersize=3), "'MABN' has an unknown key buffersize=3 .did you mean 'buffer_size'"),
        ],
    )
    def test_what_does_not_fit_is_named(self, keys, said):
        with pytest.raises(ConfigError, match=said):
            build_norm_layer(dict(type='MABN', **keys), 4)

    def test_a_batch_that_is_no_multiple_leaves_no_trace(self):
        layer = grouped()
        train(layer, torch.randn(3, 4, 3, 4, 4))
        before = state_of(layer)
        with pytest.raises(ConfigError, match=r"'MABN': norm_batch=2 does not divide this batch of 3.*drop_last=True"):
            layer(torch.randn(3, 3, 4, 4))
        assert layer(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def published(channels=3, window=4, seed=0):
    """What the authors' ImageNet code saves of a layer."""
    generator = torch.Generator().manual_seed(seed)
    return dict(
        weight=torch.rand(channels, generator=generator),
        bias=torch.rand(channels, generator=generator),
        running_var=torch.rand(channels, generator=generator),
        sta_matrix=torch.rand(window, 2 * window, generator=generator),
        pre_x2=torch.rand(window, channels, generator=generator),
        pre_gz=torch.rand(window, channels, generator=generator),
        iters=torch.tensor([6e5]),
    )


class TestStateDict:
    def test_saves_the_published_names_and_shapes(self):
        shapes = {key: tuple(value.shape) for key, value in MABN(5, norm_batch=2).state_dict().items()}
        assert shapes == dict(weight=(5,), bias=(5,), running_var=(5,), iters=(1,), pre_x2=(16, 5), pre_gz=(16, 5))

    def test_a_published_file_loads_strictly_with_its_windows(self):
        layer, state = grouped(seed=3), published()
        nn.Sequential(layer).load_state_dict({f'0.{key}': value for key, value in state.items()}, strict=True)
        for key in ('weight', 'bias', 'running_var', 'pre_x2', 'pre_gz'):
            assert torch.equal(getattr(layer, key), state[key]), key
        assert layer.iters.item() == 600000 and 'sta_matrix' in state
        x = torch.randn(2, 3, 4, 4)
        chi = x.square().mean((0, 2, 3))
        v = (state['pre_x2'][1:].sum(0) + chi) / 4
        r = ((v + 1e-5) / (state['running_var'] + 1e-5)).sqrt().clamp(1 / 5, 5)
        scale = (state['weight'] * r / (v + 1e-5).sqrt())[:, None, None]
        torch.testing.assert_close(layer(x), x * scale + state['bias'][:, None, None])

    @pytest.mark.parametrize('into, window', [('iterations', 'buffer_x2'), ('groups of images', 'pre_x2')])
    def test_the_other_variant_takes_all_but_the_windows_and_says_so(self, into, window):
        source, target = (grouped(), MABN(3, buffer_size=4)) if into == 'iterations' else (MABN(3), grouped())
        train(source, torch.randn(3, 2, 3, 4, 4)), train(target, torch.randn(3, 2, 3, 4, 4))
        files = [source.state_dict(), *([published()] if into == 'iterations' else [])]
        for state in files:
            with pytest.warns(UserWarning, match=f'into one of {into}; iters, {window} and .* start from 0'):
                nn.Sequential(target).load_state_dict({f'0.{key}': value for key, value in state.items()}, strict=True)
            x = torch.randn(2, 3, 4, 4)
            scale = state['weight'] / (state['running_var'].flatten() + 1e-5).sqrt()
            expected = x * scale[:, None, None] + state['bias'][:, None, None]
            torch.testing.assert_close(copy.deepcopy(target).eval()(x), expected)
            assert target.iters.item() == 0

    @pytest.mark.parametrize('old, new', [(4, 2), (4, 6)])
    def test_a_window_of_another_length_keeps_the_newest_groups(self, old, new):
        source, target = grouped(buffer_size=old), grouped(buffer_size=new, seed=1)
        train(source, torch.randn(3, 8, 3, 4, 4))
        with pytest.warns(UserWarning, match=f'a window of {old} groups of images into one of {new}'):
            target.load_state_dict(source.state_dict(), strict=True)
        for name in ('pre_x2', 'pre_gz'):
            rows, kept = getattr(target, name), min(old, new)
            assert torch.equal(rows[-kept:], getattr(source, name)[-kept:])
            torch.testing.assert_close(rows[:-kept], getattr(source, name).mean(0).expand_as(rows[:-kept]))

    def test_a_state_without_windows_restarts_the_counter_too(self):
        layer, fresh = grouped(), grouped()
        train(layer, torch.randn(3, 8, 3, 4, 4))
        state = dict(weight=torch.ones(3), bias=torch.zeros(3), running_var=torch.ones(1, 3, 1, 1), iters=torch.ones(1))
        assert layer.load_state_dict(state, strict=False).missing_keys == ['pre_x2', 'pre_gz']
        assert layer.iters.item() == 0 and torch.equal(layer.pre_x2, fresh.pre_x2)

    def test_a_batch_norm_is_the_identical_function_in_eval(self):
        plain, layer = nn.BatchNorm2d(3), grouped()
        plain.running_mean.normal_(), plain.running_var.uniform_(0.5, 2), nn.init.normal_(plain.weight)
        with pytest.warns(UserWarning, match='mean went into the bias.*iters, pre_x2 and pre_gz start from 0'):
            layer.load_state_dict(plain.state_dict(), strict=True)
        x = torch.randn(3, 3, 5, 5)
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x))

    def test_resume_deepcopy_and_pickle_go_on_bit_for_bit(self):
        for done in (0, 1, 2, 6):  # before the window, with it, with the factor
            layer, xs = grouped(), torch.randn(9, 4, 3, 4, 4)
            train(layer, xs[:done])
            resumed = grouped(seed=4)
            resumed.load_state_dict(state_of(layer), strict=True)
            clones = resumed, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
            train(layer, xs[done:])
            for clone in clones:
                assert type(clone) is GroupedMABN
                train(clone, xs[done:])
                assert_same_state(clone, layer)


class TestSituations:
    @pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
    def test_half_maps_keep_their_dtype_and_the_state_is_fp32(self, dtype, tolerance):
        reference, layer = grouped(), grouped()
        xs = torch.randn(6, 4, 3, 6, 6)
        for a, e in zip(train(layer, xs.to(dtype)), train(reference, xs)):
            assert a.dtype == dtype
            torch.testing.assert_close(a.float(), e, rtol=tolerance, atol=tolerance * 3)
        for key, value in layer.state_dict().items():
            assert value.dtype == (torch.int64 if key == 'iters' else torch.float32)
        large = (torch.randn(4, 3, 6, 6) * 3000).to(dtype)
        assert all(v.isfinite().all() for v in train(layer, [large])) and layer.pre_x2.isfinite().all()

    def test_layers_cast_to_half_run(self):
        layer = grouped().half()
        assert all(v.isfinite().all() for v in train(layer, torch.randn(6, 4, 3, 4, 4).half()))

    @pytest.mark.parametrize('reentrant', [True, False])
    def test_checkpointing_repeats_the_call_it_had(self, reentrant):
        plain = nn.Sequential(CenConv2d(3, 3, 3, padding=1), grouped()).double()
        saved = copy.deepcopy(plain)
        for _ in range(6):
            xs = [torch.randn(n, 3, 5, 5, dtype=torch.float64).requires_grad_() for n in (4, 2, 8)]
            results = []
            for net, run in ((plain, plain), (saved, lambda x: checkpoint(saved, x, use_reentrant=reentrant))):
                net.zero_grad()
                sum(run(x).pow(3).sum() for x in xs).backward()
                results.append([p.grad.clone() for p in (*net.parameters(), *xs)])
                for x in xs:
                    x.grad = None
            torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(state_of(plain), state_of(saved), rtol=1e-11, atol=1e-11)

    def test_an_inf_or_nan_changes_nothing_and_is_not_counted(self):
        for bad_batch in (0, 3):
            layer, xs = grouped(), torch.randn(8, 4, 3, 4, 4)
            train(layer, xs[:bad_batch])
            before, bad = state_of(layer), xs[0].clone()
            bad[1, 1, 0, 0] = float('inf')
            train(layer, [bad])
            assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
            train(layer, xs[:1], scale=float('inf'))  # an overflow in the backward pass
            assert torch.equal(layer.pre_gz, before['pre_gz']) and layer.iters.item() == bad_batch + 1
            assert all(v.isfinite().all() for v in train(layer, xs))

    def test_folded_with_its_centred_convolution_nothing_remains(self):
        net = ConvModule(3, 4, 3, norm_cfg=dict(type='MABN', norm_batch=2), conv_cfg=dict(type='CenConv'), act_cfg=None)
        train(net, torch.randn(3, 4, 3, 8, 8))
        fused, x = fuse(net.eval()), torch.randn(3, 3, 8, 8)
        assert not any(isinstance(module, (MABN, CenConv2d)) for module in fused.modules())
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)

    def test_it_warns_of_a_convolution_that_does_not_centre(self):
        net = ConvModule(3, 4, 3, norm_cfg=dict(type='MABN', norm_batch=2))
        with pytest.warns(UserWarning, match='does not centre its weight'):
            net(torch.randn(2, 3, 8, 8))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            net(torch.randn(2, 3, 8, 8))
