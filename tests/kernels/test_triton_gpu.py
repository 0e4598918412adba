"""The Triton kernels on a GPU: correctness in every dtype, and times beside torch's own (``-s`` shows them).

    pytest -m gpu -s tests/kernels/test_triton_gpu.py

Times are printed, never asserted. ``MMDET_NORMS_GPU_TILES=1`` also times other tiles for BNET than the built-in ones.
"""

import itertools
import os
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdet_norms.kernels import depthwise, gpu, map_ops
from mmdet_norms.layers import AN, BNET, CBN, MABN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'),
    pytest.mark.filterwarnings('ignore:MABN subtracts no mean'),
]
GPU = 'cuda'
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
SHAPES = [(2, 8, 200, 334), (2, 64, 50, 84), (2, 96, 25, 42), (3, 33, 7, 5), (64, 8, 7, 7), (1, 5, 1, 1)]
TIMED = [(2, 256, 200, 336), (2, 512, 100, 168), (2, 1024, 50, 84), (2, 2048, 25, 42)]  # norm3 of a ResNet-50
everywhere = pytest.mark.parametrize('layout', LAYOUTS)
in_every_dtype = pytest.mark.parametrize('dtype, tolerance', DTYPES)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv('MMDET_NORMS_TRITON', '1')
    monkeypatch.setattr(gpu, '_answers', {})


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def spread(vector):
    return vector.double()[..., None, None]


def test_the_kernels_work_here():
    assert gpu.is_supported(torch.ones(1, 1, 2, 2, device=GPU))


@everywhere
@in_every_dtype
@pytest.mark.parametrize('size', [1, 3, 5, 7])
@pytest.mark.parametrize('given', [False, True], ids=['batch statistics', 'given statistics'])
def test_bnet_is_its_two_modules(given, size, dtype, tolerance, layout):
    for seed, shape in enumerate(SHAPES):
        if not given and shape == (1, 5, 1, 1):
            continue
        torch.manual_seed(seed)
        channels, wide = shape[1], torch.promote_types(dtype, torch.float32)
        x, grad = (torch.randn(2, *shape, device=GPU) * 2 + 3).to(dtype)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        weight, bias = torch.randn(channels, 1, size, size, device=GPU).to(wide), torch.randn(channels, device=GPU)
        moments = (torch.randn(channels, device=GPU), torch.rand(channels, device=GPU) + 0.5) if given else ()
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = depthwise.normalize_and_convolve(*leaves, 1e-5, *moments)[0]
        y.backward(grad)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        mean, var = (t.double() for t in moments) if given else (None, None)
        normalized = F.batch_norm(exact[0], mean, var, None, None, not given, 0.0, 1e-5)
        expected = F.conv2d(normalized, *exact[1:], padding=size // 2, groups=channels)
        expected.backward(grad.double())
        close(y.detach(), expected.detach(), tolerance)
        close(leaves[0].grad, exact[0].grad, tolerance)
        for leaf, other in zip(leaves[1:], exact[1:]):
            close(leaf.grad, other.grad, max(tolerance / 100, 5e-5) if dtype != torch.float64 else tolerance)


@everywhere
@in_every_dtype
def test_inference_adds_the_residual_and_relu(dtype, tolerance, layout):
    for size, shape in itertools.product((3, 5, 7), SHAPES):
        x, other = torch.randn(2, *shape, device=GPU).to(dtype)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        weight, bias = torch.randn(shape[1], 1, size, size, device=GPU), torch.randn(shape[1], device=GPU)
        y = depthwise.inference(x, weight, bias, other, True)
        expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=size // 2, groups=shape[1])
        close(y, (expected + other).relu(), tolerance)


@everywhere
@in_every_dtype
@pytest.mark.parametrize('per_instance', [False, True])
def test_every_pass_equals_its_formula(per_instance, dtype, tolerance, layout):
    over, wide = (2, 3) if per_instance else (0, 2, 3), torch.promote_types(dtype, torch.float32)
    exactly = 1e-10 if dtype == torch.float64 else 2e-5
    for shape in SHAPES:
        x, grad = (torch.randn(2, *shape, device=GPU) + 1).to(dtype)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        exact, exact_grad, size = x.double(), grad.double(), x[:, 0].numel() ** 0.5
        vectors = shape[:2] if per_instance else shape[1:2]
        gain, centre, scale, shift = torch.randn(4, *vectors, device=GPU, dtype=wide)
        mean, var = map_ops.moments(x, len(x) if per_instance else None)
        close(mean, exact.mean(over), exactly)
        close(var, exact.var(over, correction=0), exactly)
        expected = spread(scale) * (exact - spread(centre)) + spread(shift)
        close(map_ops.affine(x, centre, scale, shift), expected, tolerance)
        total, centred = map_ops.gradient_sums(grad, x, centre)
        close(total / size, exact_grad.sum(over) / size, exactly)
        close(centred / size, (exact_grad * (exact - spread(centre))).sum(over) / size, exactly)
        expected = spread(gain) * exact_grad + spread(scale) * (exact - spread(centre)) + spread(shift)
        close(map_ops.gradient(grad, x, gain, centre, scale, shift), expected, tolerance)
        if not per_instance:
            close(map_ops.second_moment(x), exact.square().mean(over), exactly)


def test_nan_stays_nan():
    x = torch.ones(1, 2, 5, 12, device=GPU)
    x[0, 0, 0, 0] = torch.nan
    assert [v.isnan().tolist() for v in map_ops.moments(x)] == [[True, False]] * 2
    y = depthwise.inference(x, torch.ones(2, 1, 3, 3, device=GPU), torch.ones(2, device=GPU), None, True)
    assert y.isnan().sum() == 4


def test_moments_survive_a_huge_mean():
    x = (torch.randn(2, 64, 200, 336, device=GPU, dtype=torch.float64) + 1e4).float()
    for per_instance, over in ((False, (0, 2, 3)), (True, (2, 3))):
        mean, var = map_ops.moments(x, len(x) if per_instance else None)
        torch.testing.assert_close(mean.double(), x.double().mean(over), rtol=2e-7, atol=0)
        torch.testing.assert_close(var.double(), x.double().var(over, correction=0), rtol=1e-4, atol=0)


LAYERS = {
    'BNET-3': lambda c: BNET(c, 3),
    'BNET-5': lambda c: BNET(c, 5),
    'BNET-7': lambda c: BNET(c, 7),
    'MABN': lambda c: MABN(c),
    'AN with BN': lambda c: AN(c, 'BN'),
    'AN with GN': lambda c: AN(c, 'GN'),
    'CBN': lambda c: CBN(c),
}


def without_kernels(monkeypatch):
    monkeypatch.setattr(gpu, '_answers', {torch.device(GPU, torch.cuda.current_device()): False})


def train(name, layout, dtype=torch.float32, amp=False):
    torch.manual_seed(0)
    layer = LAYERS[name](64).to(GPU)
    x = torch.randn(4, 64, 50, 84, device=GPU).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    for _ in range(2):
        layer.zero_grad()
        x.grad = None
        with torch.autocast(GPU, torch.float16, enabled=amp):
            y = layer(x)
        y.float().sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())], list(layer.state_dict().values())


@everywhere
@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('dtype, amp', [(torch.float32, False), (torch.float16, True)], ids=['fp32', 'amp'])
def test_layers_train_as_they_do_without(dtype, amp, name, layout, monkeypatch):
    gradients, state = train(name, layout, dtype, amp)
    without_kernels(monkeypatch)
    expected, expected_state = train(name, layout, dtype, amp)
    for actual, exact in zip(gradients, expected):
        close(actual, exact.double(), 1e-3 if dtype == torch.float32 else 2e-2)
    for actual, exact in zip(state, expected_state):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)


@everywhere
@pytest.mark.parametrize('name', LAYERS)
def test_two_runs_are_equal_bit_for_bit(name, layout):
    assert all(torch.equal(a, b) for a, b in zip(train(name, layout)[0], train(name, layout)[0]))


def test_compiled_bnet_equals_eager():
    layer, x = BNET(64, 5).to(GPU), torch.randn(2, 64, 50, 84, device=GPU, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sin().sum(), x)
    (actual,) = torch.autograd.grad(torch.compile(layer)(x).sin().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='one GPU')
def test_a_map_on_another_gpu_than_the_current_one():
    x = torch.randn(2, 4, 9, 12, device='cuda:1')
    close(map_ops.moments(x)[0], x.double().mean((0, 2, 3)), 1e-5)


def median(*functions, repeats=30):
    """Milliseconds of each, in interleaved repeats."""
    times = [[] for _ in functions]
    for i in range(repeats + 5):
        for function, measured in zip(functions, times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if i >= 5:
                measured.append(start.elapsed_time(end))
    return [statistics.median(measured) for measured in times]


def step(layer, x, grad):
    def run():
        x.grad = None
        layer(x).backward(grad)

    return run


@everywhere
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_times_of_training(dtype, layout, monkeypatch, capsys):
    device = torch.device(GPU, torch.cuda.current_device())
    rows = []
    for shape in TIMED:
        x = torch.randn(shape, device=GPU).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        grad = torch.randn_like(x)
        runs = {'BN': step(nn.BatchNorm2d(shape[1]).to(GPU), x, grad)}
        for name, make in LAYERS.items():
            for way, answer in (('', True), (', without', False)):
                run = step(make(shape[1]).to(GPU), x, grad)

                def switched(run=run, answer=answer):
                    gpu._answers[device] = answer
                    run()

                runs[name + way] = switched
        times = dict(zip(runs, median(*runs.values())))
        gpu._answers[device] = True
        rows += [(shape, name, time, time / times['BN']) for name, time in times.items()]
    with capsys.disabled():
        print(f'\nforward + backward, {dtype}, {layout}, {torch.cuda.get_device_name()}, torch {torch.__version__}')
        for shape, name, time, ratio in rows:
            print(f'  {shape!s:22} {name:22} {time:8.3f} ms {ratio:6.2f} x BN')


@everywhere
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_times_of_inference(dtype, layout, capsys):
    with torch.inference_mode(), capsys.disabled():
        print(f'\ndepthwise + bias + residual + ReLU, {dtype}, {layout}, {torch.cuda.get_device_name()}')
        for shape, size in itertools.product(TIMED, (3, 5, 7)):
            x, other = torch.randn(2, *shape, device=GPU).to(dtype)
            x, other = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, other))
            weight, bias = torch.randn(shape[1], 1, size, size, device=GPU).to(dtype), torch.randn_like(x[0, :, 0, 0])
            fused, separate, alone = median(
                lambda x=x, w=weight, b=bias, o=other: depthwise.inference(x, w, b, o, True),
                lambda x=x, w=weight, b=bias, o=other: (
                    F.conv2d(x, w, b, padding=w.shape[-1] // 2, groups=x.shape[1]).add_(o).relu_()
                ),
                lambda x=x, o=other: F.relu(x + o),
            )
            rate = 3 * x.numel() * x.element_size() / fused / 1e6
            print(
                f'  {shape!s:22} k={size}  {fused:7.3f} ms ({rate:5.0f} GB/s), {separate:7.3f} ms by torch, '
                f'{alone:7.3f} ms without the convolution'
            )


def tiles(built_in, last):
    """The built-in tile, then others: (LANES, UNROLL, warps)."""
    yield built_in
    for lanes, unroll, warps in itertools.product((4, 8, 16, 32), (1, 2, 4), (1, 4, 8) if last else (1,)):
        yield dict(built_in, LANES=lanes, BLOCK_C=max(1, warps * 32 // lanes), UNROLL=unroll, num_warps=warps)


@pytest.mark.skipif(os.environ.get('MMDET_NORMS_GPU_TILES') != '1', reason='MMDET_NORMS_GPU_TILES is not 1')
@everywhere
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('shape', TIMED[:3], ids=str)
@pytest.mark.parametrize('size', [3, 5, 7])
def test_times_of_tiles(size, shape, dtype, layout, monkeypatch, capsys):
    from mmdet_norms.kernels.gpu import depthwise_triton

    x = torch.randn(shape, device=GPU).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, (bias, mean, var) = torch.randn(shape[1], 1, size, size, device=GPU), torch.rand(3, shape[1], device=GPU)
    backward = dict(eps=1e-5, mean=mean, var=var, other=x, slope=mean, shift=mean, backward=True)
    kernels = {
        'forward': lambda: depthwise_triton.bnet_given(x, weight, bias, mean, var, 1e-5),
        'sums': lambda: depthwise_triton._sums(x, x, weight, mean),
        'backward': lambda: depthwise_triton._depthwise(x, weight, None, **backward),
    }
    results = []
    for tile in tiles(depthwise_triton._tile(x, size), layout == 'channels_last'):
        with monkeypatch.context() as patched:
            patched.setattr(depthwise_triton, '_tile', lambda x, size, tile=tile: tile)
            results.append((median(*kernels.values(), repeats=10), tile))
    with capsys.disabled():
        for i, name in enumerate(kernels):
            best, tile = min(((times[i], tile) for times, tile in results), key=lambda result: result[0])
            print(f'{shape} k={size} {dtype} {layout} {name}: {results[0][0][i]:.3f} ms, best {best:.3f} ms {tile}')
