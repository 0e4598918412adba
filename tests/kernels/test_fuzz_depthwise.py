"""BNET's compiled path, and torch's in its place, on drawn shapes and layouts, against the formula in fp64."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from helpers.layouts import LAYOUTS, as_channels_last, as_contiguous, as_later_part
from helpers.references import bnet
from mmdet_norms.kernels import compiled, depthwise
from mmdet_norms.layers import BNET

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
# Where every access is watched (make asan), the same cases several times over.
EXAMPLES = 5 * settings().max_examples
layouts = st.sampled_from(LAYOUTS)
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 67]))


@st.composite
def cases(draw):
    """Of all that decides which lines of C run: below, at and above a vector's width, no images, k over the map."""
    n = draw(st.integers(0, 3))
    c = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33])))
    h, w = draw(sizes), draw(sizes)
    return dict(
        shape=(n, c, h, w),
        k=draw(st.sampled_from([1, 3, 5, 7, 9, 11, 13])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        seed=draw(st.integers(0, 2**16)),
    )


def drawn(case):
    generator = torch.Generator().manual_seed(case['seed'])

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case['dtype'])

    c, k = case['shape'][1], case['k']
    return normal(*case['shape']) * 2 + 3, normal(c, 1, k, k), normal(c), normal(*case['shape'])


def expected_of(x, weight, bias, mean=None, var=None):
    if x.numel() == 0:
        return x * weight.sum() + bias.sum()
    return bnet(x, weight, bias, mean, var)


def assert_close(name, actual, expected, dtype):
    assert actual.shape == expected.shape and actual.dtype == dtype, name
    if expected.numel():
        scale = expected.abs().max().clamp(min=1)
        error = (actual.double() - expected).abs().max() / scale
        assert error < TOLERANCE[dtype], (name, error)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(
    cases(),
    layouts, layouts, layouts, layouts,
    st.sampled_from(['batch', 'given', 'norm_eval layer', 'layer']),
    st.lists(st.booleans(), min_size=3, max_size=3),
)  # fmt: skip
def test_training_is_the_formula(case, of_x, of_weight, of_vectors, of_grad, way, needs):
    x, weight, bias, grad = drawn(case)
    c, dtype = x.shape[1], x.dtype
    if way in ('batch', 'layer') and x.numel() <= c:
        way = 'given' if way == 'batch' else 'norm_eval layer'
    mean, var = (None, None) if way in ('batch', 'layer') else (bias.cos() + 3, bias.sin() + 2)
    exact = [t.double().requires_grad_(need) for t, need in zip((x, weight, bias), needs)]
    expected = expected_of(*exact, *(None if t is None else t.double() for t in (mean, var)))

    inputs = [of_x(x).detach(), of_weight(weight).detach(), of_vectors(bias).detach()]
    for tensor, need in zip(inputs, needs):
        tensor.requires_grad_(need)
    if 'layer' in way:
        layer = BNET(c, case['k']).to(dtype)
        layer.bnconv.weight, layer.bnconv.bias = (
            torch.nn.Parameter(t.detach(), requires_grad=t.requires_grad) for t in inputs[1:]
        )
        inputs[1:] = layer.bnconv.weight, layer.bnconv.bias
        if mean is not None:
            layer.bn.running_mean, layer.bn.running_var = of_vectors(mean), of_vectors(var)
            layer.bn.eval()
        y = layer(inputs[0])
    else:
        y = depthwise.normalize_and_convolve(
            *inputs, 1e-5, *(None if t is None else of_vectors(t) for t in (mean, var))
        )[0]
    note(f'{y.grad_fn}')
    assert_close('y', y, expected, dtype)
    if any(needs):
        expected.backward(grad.double())
        y.backward(of_grad(grad).detach())
        for name, leaf, of_exact in zip(('grad_x', 'grad_weight', 'grad_bias'), inputs, exact):
            assert (leaf.grad is None) == (of_exact.grad is None), name
            if leaf.grad is not None:
                assert_close(name, leaf.grad, of_exact.grad, dtype)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), layouts, layouts, layouts, layouts, st.booleans(), st.booleans(), st.booleans())
def test_inference_is_the_formula(case, of_x, of_weight, of_bias, of_residual, residual, relu, inplace):
    x, weight, bias, other = drawn(case)
    dtype = x.dtype
    k = case['k']
    expected = (
        F.conv2d(x.double(), weight.double(), bias.double(), 1, k // 2, 1, x.shape[1]) if x.numel() else x.double()
    )
    expected = expected + other.double() if residual else expected
    expected = expected.relu() if relu else expected
    x = of_x(x)
    before, given = x.clone(), of_residual(other) if residual else None
    y = depthwise.inference(x, of_weight(weight), of_bias(bias), given, relu, inplace)
    assert_close('y', y, expected, dtype)
    assert inplace or torch.equal(x, before)
    if residual:
        assert torch.equal(given, other)


@pytest.mark.skipif(compiled.library() is None, reason='installed without a C compiler')
def test_the_compiled_path_is_what_is_tried():
    """Of dense maps, in both layouts and dtypes; the others are torch's."""
    for layout in (as_contiguous, as_channels_last, as_later_part):
        for dtype in (torch.float32, torch.float64):
            x = layout(torch.randn(2, 3, 4, 5, dtype=dtype)).requires_grad_()
            assert '_Compiled' in str(
                depthwise.normalize_and_convolve(x, x.new_ones(3, 1, 3, 3), x.new_ones(3), 1e-5)[0].grad_fn
            )
    if os.environ.get('MMDET_NORMS_COMPILED', '1') not in ('0', '1'):
        assert compiled.library()._name == os.environ['MMDET_NORMS_COMPILED']
