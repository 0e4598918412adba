"""Who computes an operation, and that it does not matter to the caller who does."""

import inspect
from importlib.util import find_spec

import pytest
import torch

from mmdet_norms.kernels import (
    choose,
    compiled,
    depthwise,
    depthwise_compiled,
    depthwise_torch,
    map_aten,
    map_formula,
    map_ops,
)

MAP_OPERATIONS = ('second_moment', 'moments', 'affine', 'gradient_sums', 'gradient')
needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='no Triton here; it is for Linux only')
needs_library = pytest.mark.skipif(compiled.library() is None, reason='installed without a C compiler')
X, WEIGHT, BIAS = torch.randn(2, 3, 4, 5), torch.randn(3, 1, 3, 3), torch.randn(3)


def arguments(function):
    return [(parameter.name, parameter.annotation) for parameter in inspect.signature(function).parameters.values()]


def by_triton(name):
    from mmdet_norms.kernels.gpu import depthwise_triton, map_triton

    return {'map': map_triton, 'depthwise': depthwise_triton}[name]


@pytest.mark.parametrize('name', MAP_OPERATIONS)
@pytest.mark.parametrize(
    'module', [map_formula, map_aten, pytest.param('triton', marks=needs_triton)], ids=['formula', 'aten', 'triton']
)
def test_map_operations_take_the_same_arguments_wherever_they_are_computed(module, name):
    module = by_triton('map') if module == 'triton' else module
    assert arguments(getattr(module, name)) == arguments(getattr(map_ops, name))


@pytest.mark.parametrize('name', ['normalize_and_convolve', 'inference'])
@pytest.mark.parametrize(
    'module',
    [depthwise_torch, depthwise_compiled, pytest.param('triton', marks=needs_triton)],
    ids=['torch', 'compiled', 'triton'],
)
def test_depthwise_operations_take_the_same_arguments_wherever_they_are_computed(module, name):
    module = by_triton('depthwise') if module == 'triton' else module
    assert arguments(getattr(module, name)) == arguments(getattr(depthwise, name))


def test_map_operations_are_those_of_aten_on_a_cpu_and_formulas_elsewhere():
    assert choose.map_operations(X) is map_aten
    assert choose.map_operations(X.to('meta')) is map_formula


@needs_library
def test_a_depthwise_convolution_is_compiled_or_in_torch_or_nobody_computes_it():
    assert choose.depthwise(X, WEIGHT, BIAS) is depthwise_compiled
    assert choose.depthwise(X, WEIGHT, BIAS, BIAS, torch._neg_view(BIAS)) is depthwise_torch
    assert choose.depthwise(X.bfloat16(), WEIGHT.bfloat16(), BIAS.bfloat16()) is None
    assert choose.depthwise(X.to('meta'), WEIGHT.to('meta'), BIAS.to('meta')) is None
    assert choose.depthwise(X, WEIGHT.double(), BIAS) is None
    with torch.autocast('cpu', torch.bfloat16):
        assert choose.depthwise(X, WEIGHT, BIAS) is None


@needs_library
def test_inference_is_compiled_where_that_is_faster_and_no_gradient_is_wanted():
    assert choose.depthwise_inference(X, WEIGHT, BIAS, None) is depthwise_compiled
    assert choose.depthwise_inference(X, WEIGHT, BIAS, X) is depthwise_compiled
    last = X.contiguous(memory_format=torch.channels_last)
    for x, residual in ((last, None), (X, last), (X, X.double()), (X[:0], None)):
        assert choose.depthwise_inference(x, WEIGHT, BIAS, residual) is depthwise_torch
    parameter = torch.nn.Parameter(WEIGHT)
    assert choose.depthwise_inference(X, parameter, BIAS, None) is depthwise_torch
    with torch.no_grad():
        assert choose.depthwise_inference(X, parameter, BIAS, None) is depthwise_compiled


def test_one_value_per_channel_has_no_variance_so_nobody_normalizes_with_it():
    assert depthwise.normalize_and_convolve(X[:1, :, :1, :1], WEIGHT, BIAS, 1e-5) is None
    assert depthwise.normalize_and_convolve(X[:1, :, :1, :1], WEIGHT, BIAS, 1e-5, BIAS, BIAS.abs()) is not None
