"""BNET's Triton kernels, run by Triton's interpreter on a CPU.

Collected by test_triton_interpreted.py, which sets it.
"""

import pytest
import torch
from torch.nn import functional as F

from helpers.references import bnet
from mmdet_norms.kernels import depthwise as everywhere
from mmdet_norms.kernels import gpu
from mmdet_norms.kernels.gpu import depthwise_triton

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CASES = [  # kernel size, dtype, layout, shape
    (1, torch.float32, CONTIGUOUS, (2, 3, 4, 5)),
    (3, torch.float64, CONTIGUOUS, (2, 2, 3, 9)),  # four columns a lane, each by itself
    (3, torch.float64, CONTIGUOUS, (1, 2, 5, 12)),  # four columns at once
    (3, torch.float32, CONTIGUOUS, (1, 1, 6, 3)),  # strips of one row
    (3, torch.float32, CONTIGUOUS, (3, 2, 1, 1)),
    (3, torch.float32, LAST, (1, 33, 2, 3)),  # two blocks of channels
    (3, torch.bfloat16, CONTIGUOUS, (1, 2, 3, 12)),
    (3, torch.float16, LAST, (1, 3, 3, 18)),  # two blocks of columns
    (5, torch.float64, CONTIGUOUS, (1, 1, 3, 12)),
    (5, torch.float32, LAST, (1, 2, 3, 9)),
    (7, torch.float64, CONTIGUOUS, (1, 2, 3, 4)),  # the map is smaller than the kernel
    (7, torch.float16, CONTIGUOUS, (1, 1, 2, 12)),
    (5, torch.float64, CONTIGUOUS, (1, 2, 3, 10)),  # two columns at once
    (3, torch.float32, LAST, (1, 64, 3, 9)),  # two channels a thread
    (7, torch.float64, CONTIGUOUS, (1, 1, 5, 9)),  # strips of fewer rows than the border
]
GIVEN = [CASES[i] for i in (0, 1, 2, 7)]


def by_triton(x, weight, bias, *statistics):
    return depthwise_triton.normalize_and_convolve(x, weight, bias, 1e-5, *statistics)[0]


def tensors(size, dtype, layout, shape, seed=0):
    torch.manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(shape[1], 1, size, size, dtype=wide), torch.randn(shape[1], dtype=wide)
    return x, weight, bias, torch.randn(shape[1], dtype=wide), torch.rand(shape[1], dtype=wide) + 0.5


def run(function, leaves, statistics, grad):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = function(*leaves, *statistics)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def compare(results, expected, dtype):
    for name, actual, exact in zip(('y', 'grad_x', 'grad_weight', 'grad_bias'), results, expected):
        assert actual.shape == exact.shape
        tolerance = TOLERANCE[dtype] if name in ('y', 'grad_x') else min(TOLERANCE[dtype], 1e-5)
        assert (actual.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1), name


@pytest.mark.parametrize('case, given', [(case, False) for case in CASES] + [(case, True) for case in GIVEN], ids=str)
def test_output_and_gradients_are_those_of_the_two_modules(case, given):
    _, dtype, layout, shape = case
    x, weight, bias, *statistics = tensors(*case)
    statistics = statistics if given else []
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)  # contiguous: autograd promises no layout
    exact = run(bnet, [t.double() for t in (x, weight, bias)], [t.double() for t in statistics], grad.double())
    results = run(by_triton, [x, weight, bias], statistics, grad)
    assert results[0].dtype == results[1].dtype == dtype
    assert results[0].is_contiguous(memory_format=layout)
    compare(results, exact, dtype)


@pytest.mark.parametrize('layout', [CONTIGUOUS, LAST])
def test_programs_may_share_out_instances_and_rows_as_they_like(layout, monkeypatch):
    # 2 + 1 instances, 3 + 2 rows
    monkeypatch.setattr(depthwise_triton, 'pieces', lambda count, others, least: min(count, 2))
    case = 3, torch.float64, layout, (3, 1, 5, 6)
    x, weight, bias, *_ = tensors(*case)
    grad = torch.randn_like(x)
    compare(run(by_triton, [x, weight, bias], [], grad), run(bnet, [x, weight, bias], [], grad), torch.float64)


def test_statistics_are_returned_and_survive_a_huge_mean():
    x = (torch.randn(2, 3, 7, 9, dtype=torch.float64) + 1e4).float()
    weight = torch.ones(3, 1, 1, 1, requires_grad=True)
    _, mean, var = depthwise_triton.normalize_and_convolve(x, weight, torch.zeros(3), 1e-5)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize('leaf', ['x', 'weight', 'bias'])
@pytest.mark.parametrize('given', [False, True])
def test_only_what_is_asked_for_gets_a_gradient(leaf, given):
    x, weight, bias, *statistics = tensors(3, torch.float64, CONTIGUOUS, (2, 2, 3, 4))
    both = []
    for function in (bnet, by_triton):
        leaves = {name: t.clone() for name, t in dict(x=x, weight=weight, bias=bias).items()}
        leaves[leaf].requires_grad_()
        function(*leaves.values(), *(statistics if given else [])).square().sum().backward()
        assert all(t.grad is None for name, t in leaves.items() if name != leaf)
        both.append(leaves[leaf].grad)
    torch.testing.assert_close(*both)


def test_x_is_all_that_is_saved():
    x, weight, bias, *_ = tensors(3, torch.float32, CONTIGUOUS, (1, 2, 3, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        by_triton(x.requires_grad_(), weight, bias)
    assert sorted(t.numel() for t in saved) == [2, 2, 18, x.numel()]


@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('layout', [CONTIGUOUS, LAST])
def test_the_gradient_can_be_differentiated_again(layout, given):
    x, weight, bias, *statistics = tensors(3, torch.float64, layout, (1, 2, 3, 4))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    results = []
    for function in by_triton, bnet:
        y = function(*inputs, *(statistics if given else ()))
        gradient = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in gradient)
        results.append([*gradient, *torch.autograd.grad(penalty, inputs)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('layout', [CONTIGUOUS, LAST])
def test_inference_adds_the_bias_the_residual_and_relu(layout, residual, relu, monkeypatch):
    monkeypatch.setattr(gpu, '_DEVICES', ('cpu',))
    x, weight, bias, *_ = tensors(3, torch.float32, layout, (2, 3, 3, 9))
    x = torch.cat([x, x], 1)[:, :3]  # neither contiguous nor channels_last
    other = torch.randn(2, 3, 9, 3).transpose(2, 3) if residual else None
    y = F.conv2d(x.double(), weight.double(), bias.double(), 1, 1, 1, 3) + (other if residual else 0)
    assert gpu.is_supported(x)  # the first question tries every kernel
    launched, launch = [], depthwise_triton.launch
    monkeypatch.setattr(
        depthwise_triton, 'launch', lambda *args, **sizes: launched.append(args[0]) or launch(*args, **sizes)
    )
    result = everywhere.inference(x, weight, bias, other, relu)
    assert launched == [depthwise_triton._depthwise_kernel]
    torch.testing.assert_close(result.double(), y.relu() if relu else y, rtol=1e-5, atol=1e-5)


def test_relu_keeps_nan_and_halves_are_rounded_once():
    x, weight, bias, *_ = tensors(3, torch.float16, CONTIGUOUS, (1, 1, 3, 4))
    residual = torch.zeros_like(x)
    residual[0, 0, 0, 0] = torch.nan
    y = depthwise_triton.bnet_inference(x, weight, bias, residual, True)
    expected = (F.conv2d(x.float(), weight, bias, 1, 1) + residual).relu().half()
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=0, equal_nan=True)
    assert y.isnan().sum() == 1


def test_the_operators_keep_what_torch_requires_of_them():
    x, weight, bias, mean, var = tensors(1, torch.float32, LAST, (1, 2, 2, 3))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    ops = torch.ops.mmdet_norms
    for op, args in [
        (ops.bnet, (*leaves, 1e-5)),
        (ops.bnet_given, (*leaves, mean, var, 1e-5)),
        (ops.bnet_backward, (x.detach(), x.detach(), weight.detach(), mean, var, 1e-5, True, True, True)),
        (ops.bnet_backward, (x.detach(), x.detach(), weight.detach(), mean, var, 1e-5, False, True, False)),
        (ops.bnet_inference, (x.detach(), weight.detach(), bias.detach(), x.detach(), True)),
    ]:
        torch.library.opcheck(op.default, args)
