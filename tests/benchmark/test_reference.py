"""The literal formulations compute what our layers compute, and what was recorded from the published ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdet_norms.benchmark.layers import ConvNorm
from mmdet_norms.benchmark.reference import REFERENCES, ReferenceAN, ReferenceBNET, ReferenceCBN, ReferenceMABN
from mmdet_norms.layers import AN, BNET, CBN, MABN

DOUBLE = dict(dtype=torch.float64)


def close(actual, expected, what, tolerance=1e-11):
    expected = torch.as_tensor(expected).detach()
    error = (actual.detach().reshape(expected.shape) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f'{what}: {error}'


def randomized(layer, seed=0):
    torch.manual_seed(seed)
    for name, value in layer.state_dict(keep_vars=True).items():
        if value.is_floating_point() and not name.startswith('buffer_'):
            value.detach().uniform_(0.5, 1.5) if name.endswith('running_var') else value.detach().normal_()
    return layer


def step(layer, x, seed):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    return dict(y=y, gx=x.grad) | {name: p.grad for name, p in layer.named_parameters()}


def assert_same_steps(ours, reference, steps=5, size=(2, 4, 5, 6)):
    reference.load_state_dict(ours.state_dict())
    for i in range(steps):
        x = torch.randn(size, **DOUBLE) * (1 + i) + 1
        mine, literal = step(ours, x, i), step(reference, x, i)
        assert mine.keys() - literal.keys() <= {'y', 'gx'}
        for name, value in literal.items():
            close(mine[name], value, (i, name))
        for name, value in reference.state_dict().items():
            close(ours.state_dict()[name].double(), value.double(), (i, name))
    x = torch.randn(size, **DOUBLE)
    close(ours.eval()(x), reference.eval()(x), 'eval')


def test_every_published_layer_has_a_reference():
    assert set(REFERENCES) == {'BNET', 'CBN', 'MABN', 'AN'}


@pytest.mark.parametrize('kernel_size', [3, 5])
def test_bnet_equals_ours(kernel_size):
    ours = randomized(BNET(4, kernel_size).double())
    assert_same_steps(ours, ReferenceBNET(4, kernel_size).double())


@pytest.mark.parametrize('norm', ['BN', 'GN'])
def test_an_equals_ours(norm):
    ours = randomized(AN(4, norm, k=3, num_groups=2).double())
    assert_same_steps(ours, ReferenceAN(4, norm, k=3, num_groups=2).double(), size=(3, 4, 5, 6))


@pytest.mark.parametrize('start', [0, 6, 1003], ids=['batch', 'window', 'renorm'])
def test_mabn_equals_ours_in_every_phase(start):
    arguments = dict(B=2, real_B=8, warmup_iters=5)
    ours = randomized(MABN(4, **arguments).double())
    ours.iters.fill_(start), ours.buffer_x2.uniform_(0.5, 2), ours.buffer_gz.normal_()
    assert_same_steps(ours, ReferenceMABN(4, **arguments).double(), steps=8)


@pytest.mark.parametrize('arguments', [dict(burnin=2), dict(burnin=0, buffer_num=2, rho=0.5), dict(buffer_num=0)])
def test_cbn_equals_ours_while_the_weights_move(arguments):
    torch.manual_seed(0)
    ours = ConvNorm(nn.Conv2d(3, 4, 3, padding=1, bias=False), randomized(CBN(4, **arguments))).double()
    reference = ConvNorm(copy.deepcopy(ours.conv), ReferenceCBN(4, **arguments).double())
    reference.load_state_dict(ours.state_dict(), strict=False)
    for i in range(8):
        x = torch.randn(2, 3, 6, 5, **DOUBLE)
        mine, literal = step(ours, x, i), step(reference, x, i)
        for name, value in literal.items():
            close(mine[name], value, (i, name))
        for name in ('running_mean', 'running_var'):
            close(getattr(ours.norm, name), getattr(reference.norm, name), (i, name))
        with torch.no_grad():
            move = torch.randn(ours.conv.weight.shape, **DOUBLE) * 0.05
            ours.conv.weight += move
            reference.conv.weight += move
    assert len(reference.norm.weights) == reference.norm.buffer_num
    close(ours.eval()(x), reference.eval()(x), 'eval')


@pytest.mark.parametrize('name', ['k1', 'k3', 'k3_rho05', 'k3_negvar'])
def test_cbn_equals_the_published_numbers(name, golden):
    data = {key: torch.from_numpy(value) for key, value in golden(f'cbn/cbn_{name}.npz').items() if value.ndim}
    cfg = {key[4:]: value.item() for key, value in golden(f'cbn/cbn_{name}.npz').items() if key.startswith('cfg.')}
    assert cfg['two_stage'] and not cfg['out_p']
    layer = ReferenceCBN(4, **{key: cfg[key] for key in ('buffer_num', 'burnin', 'rho', 'eps', 'momentum')}).double()
    layer.load_state_dict({key[5:]: value for key, value in data.items() if key.startswith('init.')})
    for i in range(12):
        assert len(layer.weights) == golden(f'cbn/cbn_{name}.npz')['history_len_before'][i]
        layer.weight.data.copy_(data['weight'][i]), layer.bias.data.copy_(data['bias'][i])
        layer.zero_grad()
        weight, x = data['conv_weight'][i].requires_grad_(), data['x'][i].requires_grad_()
        y = layer(F.conv2d(x, weight, padding=cfg['padding']), weight)
        y.backward(data['gy'][i])
        measured = dict(
            y=y,
            gx=x.grad,
            g_conv_weight=weight.grad,
            g_weight=layer.weight.grad,
            g_bias=layer.bias.grad,
            running_mean=layer.running_mean,
            running_var=layer.running_var,
        )
        for key, value in measured.items():
            close(value, data[key][i], (i, key), 1e-10)


def test_mabn_equals_the_published_numbers(golden):
    data = {key: torch.from_numpy(value) for key, value in golden('mabn/mabn_main_w5.npz').items()}
    layer = ReferenceMABN(4, B=2, real_B=16, warmup_iters=5).double()
    layer.load_state_dict({key[5:]: value for key, value in data.items() if key.startswith('init.')})
    for i, (x, gy) in enumerate(zip(data['x'], data['gy'])):
        layer.weight.data.copy_(data['pre_weight'][i]), layer.bias.data.copy_(data['pre_bias'][i])
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(gy)
        for key, value in dict(y=y, gx=x.grad, g_weight=layer.weight.grad, g_bias=layer.bias.grad).items():
            close(value, data[key][i], (i, key), 1e-10)
        for key in ('running_var', 'buffer_x2', 'buffer_gz'):
            close(getattr(layer, key), data[f'post_{key}'][i], (i, key), 1e-10)


def test_mabn_reads_its_counter_on_the_host_once_a_forward():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Record():
        ReferenceMABN(4)(torch.randn(2, 4, 3, 3))
    assert seen.count('_local_scalar_dense') == 1
