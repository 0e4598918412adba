"""BNET's CPU kernels against the two modules they stand for, and when the layer takes them."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdet_norms.kernels import bnet, compiled
from mmdet_norms.layers import BNET

WAYS = [
    pytest.param(bnet._InTorch, id='in torch'),
    pytest.param(
        bnet._Compiled,
        id='compiled',
        marks=pytest.mark.skipif(compiled.library() is None, reason='installed without a C compiler'),
    ),
]
SHAPES = [(2, 3, 5, 4), (1, 5, 17, 33), (3, 4, 1, 9), (2, 37, 6, 7), (2, 3, 40, 70), (2, 4, 2, 2)]


def literal(x, weight, bias, mean, var):
    """Batch norm, then a depthwise convolution, each by torch."""
    of_batch = mean is None
    normalized = F.batch_norm(x, mean, var, None, None, of_batch, 0.0, 1e-5)
    return F.conv2d(normalized, weight, bias, 1, weight.shape[-1] // 2, 1, x.shape[1])


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
        for function in (literal, lambda *a: way.apply(*a[:3], 1e-5, *a[3:])[0]):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = function(*leaves, *stats)
            y.backward(grad)
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for name, expected, actual in zip(('y', 'grad_x', 'grad_weight', 'grad_bias'), *results):
            error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
            assert error < tolerance, (name, shape, error)


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
    literal(*expected.values(), None, None).square().sum().backward()
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


def test_an_environment_variable_switches_the_library_off():
    code = 'from mmdet_norms.kernels import compiled; print(compiled.library())'
    done = subprocess.run(
        [sys.executable, '-c', code], env={'MMDET_NORMS_COMPILED': '0', 'PATH': ''}, capture_output=True, text=True
    )
    assert done.stdout.split()[-1] == 'None', done.stderr


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
