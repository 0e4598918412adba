"""BNET's CPU kernels against the two modules they stand for, and when the layer takes them."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.references import bnet
from mmdet_norms.kernels import compiled, depthwise, depthwise_compiled, depthwise_torch
from mmdet_norms.layers import BNET

WAYS = [
    pytest.param(depthwise_torch._InTorch, id='in torch'),
    pytest.param(
        depthwise_compiled._Compiled,
        id='compiled',
        marks=pytest.mark.skipif(compiled.library() is None, reason='installed without a C compiler'),
    ),
]
SHAPES = [(2, 3, 5, 4), (1, 5, 17, 33), (3, 4, 1, 9), (2, 37, 6, 7), (2, 3, 40, 70), (2, 4, 2, 2)]


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('given', [False, True], ids=['batch statistics', 'given statistics'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize('size', [1, 3, 5, 7, 9])
def test_output_and_gradients_are_those_of_the_two_modules(way, given, layout, dtype, tolerance, size):
    torch.manual_seed(size)
    for shape in SHAPES:
        channels = shape[1]
        x = (torch.randn(shape, dtype=dtype) * 2 + 3).contiguous(memory_format=layout)
        grad = torch.randn(shape, dtype=dtype)  # in the other layout: autograd does not promise this one
        weight, bias = torch.randn(channels, 1, size, size, dtype=dtype), torch.randn(channels, dtype=dtype)
        stats = (torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5) if given else (None, None)
        results = []
        for function in (bnet, lambda *a: way.apply(*a[:3], 1e-5, *a[3:])[0]):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = function(*leaves, *stats)
            y.backward(grad)
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for name, expected, actual in zip(('y', 'grad_x', 'grad_weight', 'grad_bias'), *results):
            error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
            assert error < tolerance, (name, shape, error)


@pytest.mark.parametrize('given', [False, True], ids=['batch statistics', 'given statistics'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [1, 3, 7])
def test_a_few_channels_at_a_time_are_what_all_at_once_are(monkeypatch, size, layout, given):
    """What fits into the cache is all that is computed at once, the last time fewer channels than before."""
    x = torch.randn(2, 75, 6, 7, dtype=torch.float64).contiguous(memory_format=layout)
    weight, bias = torch.randn(75, 1, size, size).double(), torch.randn(75).double()
    stats = (torch.randn(75).double(), torch.rand(75).double() + 0.5) if given else (None, None)
    results, parts = [], []
    for values in (1, 1 << 30):
        monkeypatch.setattr(depthwise_torch, '_IN_CACHE', values)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        outputs = depthwise_torch._InTorch.apply(*leaves, 1e-5, *stats)
        outputs[0].square().sum().backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
        parts.append(len(depthwise_torch.channels_at_a_time(x)))
    assert parts == [3 if layout == torch.channels_last else 5, 1]
    assert outputs[0].is_contiguous(memory_format=layout)
    for few, all_at_once in zip(*results):
        torch.testing.assert_close(few, all_at_once)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_statistics_survive_a_huge_mean(way, layout):
    x = (torch.randn(2, 16, 20, 30, dtype=torch.float64) + 1e4).float().contiguous(memory_format=layout)
    mean, var = way.apply(x, torch.ones(16, 1, 3, 3), torch.zeros(16), 1e-5, None, None)[1:]
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('leaf', ['x', 'weight', 'bias'])
def test_only_what_is_asked_for_gets_a_gradient(way, leaf):
    tensors = dict(x=torch.randn(2, 3, 5, 4), weight=torch.randn(3, 1, 3, 3), bias=torch.randn(3))
    tensors[leaf].requires_grad_()
    way.apply(*tensors.values(), 1e-5, None, None)[0].square().sum().backward()
    expected = {name: t.detach().clone() for name, t in tensors.items()}
    expected[leaf].requires_grad_()
    bnet(*expected.values(), None, None).square().sum().backward()
    torch.testing.assert_close(tensors[leaf].grad, expected[leaf].grad, rtol=1e-3, atol=1e-3)
    assert all(t.grad is None for name, t in tensors.items() if name != leaf)


def taken(layer, x):
    return '_Compiled' in str(layer(x).grad_fn) or '_InTorch' in str(layer(x).grad_fn)


def test_the_layer_takes_them_in_training_and_saves_its_input_only():
    layer, x = BNET(64, 5), torch.randn(2, 64, 20, 20, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel() * 4) or t, lambda t: t):
        assert taken(layer, x)
    assert sum(saved) / 2 <= 1.1 * x.numel() * 4  # taken() calls twice
    layer.bn.eval()  # norm_eval
    assert taken(layer, x)


def test_the_layer_does_without_them_where_another_tool_must_see_its_modules():
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    assert taken(BNET(4), x)
    assert not taken(BNET(4).eval(), x)
    assert not taken(nn.SyncBatchNorm.convert_sync_batchnorm(BNET(4)).eval(), x)
    assert not taken(BNET(4).bfloat16(), x.bfloat16())
    watched = BNET(4)
    watched.bn.register_forward_hook(lambda *_: None)
    assert not taken(watched, x)
    parametrized = BNET(4)
    nn.utils.parametrizations.weight_norm(parametrized.bnconv)
    assert not taken(parametrized, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert not taken(BNET(4), x)


def test_an_environment_variable_switches_the_library_off(monkeypatch):
    monkeypatch.setenv('MMDET_NORMS_COMPILED', '0')
    assert compiled.library.__wrapped__() is None


@pytest.mark.skipif(compiled.library() is None, reason='installed without a C compiler')
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_the_number_of_threads_does_not_change_the_result(layout):
    x = torch.randn(2, 40, 50, 60).contiguous(memory_format=layout)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf, layer = x.clone().requires_grad_(), BNET(40, 5)
            layer(leaf).square().sum().backward()
            results.append((leaf.grad, layer.bnconv.weight.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


needs_library = pytest.mark.skipif(compiled.library() is None, reason='installed without a C compiler')


@needs_library
def test_new_threads_compute_what_those_of_torch_do(monkeypatch):
    x, before, results = torch.randn(2, 40, 50, 60), torch.get_num_threads(), []
    openmp = compiled._openmp
    try:
        torch.set_num_threads(3)
        for threads in (openmp, lambda: None):
            monkeypatch.setattr(compiled, '_openmp', threads)
            leaf, layer = x.clone().requires_grad_(), BNET(40, 5)
            layer(leaf).square().sum().backward()
            results.append((leaf.grad, layer.bnconv.weight.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_threads_of_torch_are_found_where_it_has_openmp():
    if not torch.backends.openmp.is_available() or sys.platform != 'linux':
        pytest.skip('this torch does without OpenMP')
    assert compiled._openmp()


@needs_library
def test_a_library_of_another_version_is_not_called(monkeypatch):
    path = Path(compiled.library()._name)
    assert compiled._load(path) is not None
    monkeypatch.setattr(compiled, '_INTERFACE', -1)
    with pytest.warns(UserWarning, match=r'another version.*make install'):
        assert compiled._load(path) is None
    with pytest.warns(UserWarning, match='another version'):
        assert compiled._load(Path('libc.so.6')) is None  # knows no interface at all


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('size', [1, 3, 5, 7, 9])
def test_inference_adds_the_residual_and_applies_relu(size, dtype, tolerance, layout, residual, relu):
    for shape in [*SHAPES, (0, 3, 4, 5)]:
        torch.manual_seed(size)
        x, other = (t.contiguous(memory_format=layout) for t in torch.randn(2, *shape).to(dtype))
        weight, bias = torch.randn(shape[1], 1, size, size).to(dtype), torch.randn(shape[1]).to(dtype)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=size // 2, groups=shape[1])
        exact = exact + other if residual else exact
        exact = exact.relu() if relu else exact
        before = x.clone(), other.clone()
        y = depthwise.inference(x, weight, bias, other if residual else None, relu)
        assert torch.equal(x, before[0]) and torch.equal(other, before[1])
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * size)
        for given in (other, other.transpose(2, 3).contiguous().transpose(2, 3)):  # dense or not
            y = depthwise.inference(x.clone(), weight, bias, given if residual else None, relu, inplace=True)
            torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * size)


@needs_library
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('residual', [False, True])
def test_the_librarys_relu_keeps_what_is_not_a_number(residual, layout):
    x = torch.randn(2, 19, 5, 6).contiguous(memory_format=layout)
    other = torch.zeros_like(x)
    x[0, 0, 2, 2] = other[1, 18, 0, 0] = torch.nan
    weight, bias = torch.randn(19, 1, 3, 3), torch.randn(19)
    y = depthwise_compiled.inference(x, weight, bias, other if residual else None, True, False)
    expected = F.conv2d(x, weight, bias, padding=1, groups=19)
    torch.testing.assert_close(y, (expected + other if residual else expected).relu(), equal_nan=True)
    assert y.isnan().sum() == 9 + residual


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('residual', [False, True])
def test_inference_is_differentiable_where_a_gradient_is_wanted(residual, relu):
    x, other = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 1, 5, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    y = depthwise.inference(x, weight, bias, other if residual else None, relu, inplace=True)
    expected = F.conv2d(x, weight.double(), bias.double(), padding=2, groups=3) + (other if residual else 0)
    torch.testing.assert_close(y, expected.relu() if relu else expected)
    y.sum().backward()
    assert weight.grad is not None and bias.grad is not None
