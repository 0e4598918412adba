"""The Triton kernels of the map operations, and the layers on all of them, run by Triton's interpreter on a CPU.

Collected by test_triton_interpreted.py, which sets it.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmdet_norms.kernels import choose, gpu, map_formula
from mmdet_norms.kernels.gpu import depthwise_triton, map_triton
from mmdet_norms.layers import AN, BNET, CBN, MABN

LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)]
SHAPES = [(2, 5, 7, 9), (2, 2, 1, 1), (1, 70, 2, 3)]


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def spread(vector):
    return vector.double()[..., None, None]


@pytest.fixture
def on_cpu(monkeypatch):
    """The layers take a CPU, on which the interpreter runs, for a GPU."""
    monkeypatch.setattr(gpu, '_DEVICES', ('cpu',))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype, tolerance', DTYPES)
@pytest.mark.parametrize('per_instance', [False, True])
def test_every_operation_equals_its_formula(per_instance, dtype, tolerance, layout):
    over, wide = (2, 3) if per_instance else (0, 2, 3), torch.promote_types(dtype, torch.float32)
    exactly = 1e-12 if dtype == torch.float64 else 1e-5
    every_shape = dtype in (torch.float64, torch.float16) and layout != 'transposed'
    for seed, shape in enumerate(SHAPES if every_shape else SHAPES[:1]):
        torch.manual_seed(seed)
        x, grad = torch.randn(2, *shape, dtype=torch.float64).add_(1).to(dtype)
        x = LAYOUTS[layout](x)
        exact, exact_grad = x.double(), grad.double()
        gain, centre, scale, shift = torch.randn(4, *(x.shape[:2] if per_instance else x.shape[1:2]), dtype=wide)
        mean, var = map_triton.moments(x, len(x) if per_instance else None)
        assert mean.dtype == var.dtype == wide
        close(mean, exact.mean(over), exactly)
        close(var, exact.var(over, correction=0), exactly)
        y = map_triton.affine(x, centre, scale, shift)
        assert y.dtype == dtype and y.is_contiguous() != (layout == 'channels_last' and shape[2:] != (1, 1))
        close(y, spread(scale) * (exact - spread(centre)) + spread(shift), tolerance)
        total, centred = map_triton.gradient_sums(grad, x, centre)
        assert total.dtype == centred.dtype == wide
        close(total, exact_grad.sum(over), exactly)
        close(centred, (exact_grad * (exact - spread(centre))).sum(over), exactly)
        expected = spread(gain) * exact_grad + spread(scale) * (exact - spread(centre)) + spread(shift)
        close(map_triton.gradient(grad, x, gain, centre, scale, shift), expected, tolerance)
        if not per_instance:
            close(map_triton.second_moment(x), exact.square().mean(over), exactly)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_an_instance_may_be_read_in_pieces_of_several_tiles(layout, monkeypatch):
    monkeypatch.setattr(map_triton, 'pointwise_tile', lambda x: dict(BLOCK_S=4, BLOCK_C=2))
    monkeypatch.setattr(map_triton, 'pieces', lambda count, others, least: 3)
    x, grad = torch.randn(2, 2, 3, 5, 6, dtype=torch.float64)
    x[:, :, 0] += 5  # the first tile is far from the mean
    x = LAYOUTS[layout](x)
    for per_instance, over in ((False, (0, 2, 3)), (True, (2, 3))):
        mean, var = map_triton.moments(x, len(x) if per_instance else None)
        torch.testing.assert_close(mean, x.mean(over))
        torch.testing.assert_close(var, x.var(over, correction=0))
        total, centred = map_triton.gradient_sums(grad, x, mean)
        torch.testing.assert_close(total, grad.sum(over))
        torch.testing.assert_close(centred, (grad * (x - spread(mean))).sum(over))
    torch.testing.assert_close(map_triton.second_moment(x), x.square().mean((0, 2, 3)))


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('offset', [0, 1e4])
def test_moments_survive_a_huge_mean(offset, layout):
    x = LAYOUTS[layout]((torch.randn(2, 3, 40, 50, dtype=torch.float64) + offset).float())
    for per_instance, over in ((False, (0, 2, 3)), (True, (2, 3))):
        mean, var = map_triton.moments(x, len(x) if per_instance else None)
        torch.testing.assert_close(mean.double(), x.double().mean(over), rtol=2e-7, atol=1e-6)
        torch.testing.assert_close(var.double(), x.double().var(over, correction=0), rtol=2e-5, atol=0)


def test_a_constant_map_has_no_variance_and_nan_stays_nan():
    x = torch.full((2, 2, 5, 7), 1234.567)
    assert (map_triton.moments(x)[1] == 0).all()
    x[0, 0, 0, 0] = torch.nan
    assert [v.isnan().tolist() for v in map_triton.moments(x)] == [[True, False]] * 2


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_groups_of_images_are_what_they_are_on_a_cpu(layout):
    torch.manual_seed(0)
    x, grad = (LAYOUTS[layout](t) for t in torch.randn(2, 4, 3, 5, 6, dtype=torch.float64))
    vectors = torch.randn(4, 2, 3, dtype=torch.float64)

    def every(ops):
        results = [ops.second_moment(x, 2), *ops.moments(x, 2), *ops.gradient_sums(grad, x, vectors[1])]
        return [*results, ops.affine(x, *vectors[1:]), ops.gradient(grad, x, *vectors)]

    torch.testing.assert_close(every(map_triton), every(map_formula))


LAYERS = {
    'BNET': lambda: BNET(4, 3),
    'MABN': lambda: MABN(4, buffer_size=2, warmup_iters=0),
    'AN with BN': lambda: AN(4, 'BN', k=2),
    'AN with GN': lambda: AN(4, 'GN', k=2, num_groups=2),
    'CBN': lambda: CBN(4),
}


def steps(name, layout, training=True, wrap=lambda layer, x: layer(x)):
    """Outputs, gradients and final state of two training steps in float64."""
    torch.manual_seed(0)
    layer, results = LAYERS[name]().double().train(training), []
    for parameter in layer.parameters():
        parameter.data += torch.randn_like(parameter) / 4
    for _ in range(2):
        x = LAYOUTS[layout](torch.randn(2, 4, 2, 5, dtype=torch.float64) + 0.5).requires_grad_()
        layer.zero_grad()
        y = wrap(layer, x)
        y.sin().sum().backward()
        results += [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    return [*results, *layer.state_dict().values()]


@pytest.mark.filterwarnings('ignore:MABN subtracts no mean')
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_trains_by_the_kernels_as_it_does_without(name, layout, monkeypatch):
    expected = steps(name, layout)
    launched = []
    monkeypatch.setattr(gpu, '_DEVICES', ('cpu',))
    for module in (map_triton, depthwise_triton):
        launch = module.launch
        monkeypatch.setattr(module, 'launch', lambda *a, launch=launch, **k: launched.append(a[0]) or launch(*a, **k))
    results = steps(name, layout)
    assert launched
    for actual, exact in zip(results, expected):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)


def test_norm_eval_trains_with_the_running_statistics(monkeypatch):
    def wrap(layer, x):
        layer.bn.eval()
        return layer(x)

    expected = steps('BNET', 'contiguous', wrap=wrap)
    monkeypatch.setattr(gpu, '_DEVICES', ('cpu',))
    for actual, exact in zip(steps('BNET', 'contiguous', wrap=wrap), expected):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)


def test_activation_checkpointing_counts_a_batch_once(on_cpu):
    expected = steps('BNET', 'contiguous')
    results = steps('BNET', 'contiguous', wrap=lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    for actual, exact in zip(results, expected):
        torch.testing.assert_close(actual, exact)


def test_no_layer_takes_an_empty_map_to_a_kernel(on_cpu):
    for make in LAYERS.values():
        assert make()(torch.randn(0, 4, 3, 3, requires_grad=True)).shape == (0, 4, 3, 3)


def test_compiled_bnet_is_one_operator_in_each_direction(on_cpu):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    layer, x = BNET(2, 3).double(), torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert len(graphs) == 1 and 'mmdet_norms.bnet' in graphs[0].code
    torch.testing.assert_close(y, expected)
    torch.compile(layer, backend='aot_eager', fullgraph=True)(x).square().sum().backward()
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(x.grad, expected_grad)


@pytest.mark.parametrize('change', ['dtype', 'kernel', 'subclass', 'tracing', 'vmap', 'empty', 'dimensions', 'device'])
def test_what_the_kernels_do_not_support(change, on_cpu, monkeypatch):
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(2, 1, 3, 3)
    assert gpu.is_supported(x, weight) and choose.map_operations(x) is map_triton
    if change == 'dtype':
        assert not gpu.is_supported(x.int()) and not gpu.is_supported(x, weight.int())
    elif change == 'kernel':
        assert not gpu.is_supported(x, torch.randn(2, 1, 9, 9))
    elif change == 'subclass':
        assert not gpu.is_supported(x.as_subclass(type('Special', (torch.Tensor,), {})))
    elif change == 'tracing':
        seen = []
        torch.jit.trace(lambda t: seen.append(gpu.is_supported(t)) or t + 1, x, check_trace=False)
        assert not any(seen)
    elif change == 'vmap':
        seen = []
        torch.vmap(lambda t: seen.append(gpu.is_supported(t)) or t)(x[None])
        assert seen == [False]
    elif change == 'empty':
        assert not gpu.is_supported(x[:0]) and not gpu.is_supported(x[:, :, :0])
    elif change == 'dimensions':
        assert not gpu.is_supported(x[0])
    else:
        monkeypatch.setattr(gpu, '_DEVICES', ('cuda',))
        assert not gpu.is_supported(x)
