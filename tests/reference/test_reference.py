"""The references compute what was recorded from the published layers, and what our layers compute."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdet_norms.benchmark.layers import ConvNorm
from mmdet_norms.layers import AN, BNET, CBN, MABN, CenConv2d
from mmdet_norms.reference import (
    REFERENCES,
    ReferenceAN,
    ReferenceBNET,
    ReferenceCBN,
    ReferenceCenConv2d,
    ReferenceGroupedMABN,
    ReferenceMABN,
)

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


def test_every_published_layer_has_a_reference():
    assert set(REFERENCES) == {'BNET', 'CBN', 'MABN', 'AN'}


class TestPublishedNumbers:
    def tensors(self, data, prefix=''):
        return {key[len(prefix) :]: torch.from_numpy(np.array(data[key])) for key in data if key.startswith(prefix)}

    @pytest.mark.parametrize('kernel_size', [3, 7])
    def test_bnet(self, kernel_size, golden):
        data = golden(f'bnet/bnet_k{kernel_size}.npz')
        layer = ReferenceBNET(3, kernel_size).double()
        layer.load_state_dict(self.tensors(data, 'init.'))
        for i in range(12):
            for train, y_name, eval_ in ((True, 'y_train', ''), (False, 'y_eval', '_eval')):
                layer.train(train).zero_grad()
                x = torch.from_numpy(data['x'][i]).requires_grad_()
                y = layer(x)
                y.backward(torch.from_numpy(data['gy'][i]))
                close(y, data[y_name][i], (i, y_name)), close(x.grad, data[f'gx{eval_}'][i], (i, 'gx'))
                close(layer.bnconv.weight.grad, data[f'g{eval_}_bnconv_weight'][i], (i, 'g_bnconv_weight'))
                close(layer.bnconv.bias.grad, data[f'g{eval_}_bnconv_bias'][i], (i, 'g_bnconv_bias'))
                (
                    close(layer.running_mean, data['running_mean'][i], i),
                    close(layer.running_var, data['running_var'][i], i),
                )

    @pytest.mark.parametrize('name', ['k1', 'k3', 'k3_bias', 'k3_negvar', 'k3_ramp', 'k3_rho05'])
    def test_cbn(self, name, golden):
        data = self.tensors(golden(f'cbn/cbn_{name}.npz'))
        cfg = {key[4:]: value.item() for key, value in data.items() if key.startswith('cfg.')}
        arguments = {key: cfg[key] for key in ('buffer_num', 'burnin', 'two_stage', 'rho', 'eps', 'momentum')}
        layer = ReferenceCBN(4, eps_in_sqrt=cfg['out_p'], **arguments).double()
        layer.load_state_dict(self.tensors(golden(f'cbn/cbn_{name}.npz'), 'init.'))
        for i in range(12):
            assert len(layer.history) == data['history_len_before'][i]
            layer.weight.data.copy_(data['weight'][i]), layer.bias.data.copy_(data['bias'][i])
            layer.zero_grad()
            weight, x = data['conv_weight'][i].requires_grad_(), data['x'][i].requires_grad_()
            bias = data['conv_bias'][i] if 'conv_bias' in data else None
            geometry = [cfg[key] for key in ('stride', 'padding', 'dilation', 'groups')]
            y = layer(F.conv2d(x, weight, bias, *geometry), weight)
            y.backward(data['gy'][i])
            gradients = dict(gx=x.grad, g_conv_weight=weight.grad, g_weight=layer.weight.grad, g_bias=layer.bias.grad)
            running = dict(running_mean=layer.running_mean, running_var=layer.running_var)
            for key, value in dict(y=y, **gradients, **running).items():
                close(value, data[key][i], (i, key))

    def test_mabn(self, golden):
        data = self.tensors(golden('mabn/mabn_main_w5.npz'))
        layer = ReferenceMABN(4, B=2, real_B=16, warmup_iters=5).double()
        layer.load_state_dict(self.tensors(golden('mabn/mabn_main_w5.npz'), 'init.'))

        def run(x, gy, weight, bias):
            layer.weight.data.copy_(weight), layer.bias.data.copy_(bias)
            layer.zero_grad()
            x.requires_grad_()
            y = layer(x)
            y.backward(gy)
            return dict(y=y, gx=x.grad, g_weight=layer.weight.grad, g_bias=layer.bias.grad)

        for i in range(24):
            for key, value in run(*(data[key][i] for key in ('x', 'gy', 'pre_weight', 'pre_bias'))).items():
                close(value, data[key][i], (i, key))
            for key in ('running_var', 'buffer_x2', 'buffer_gz'):
                close(getattr(layer, key), data[f'post_{key}'][i], (i, key))
        layer.eval()
        for key, value in run(*(data[f'eval_{key}'] for key in ('x', 'gy', 'weight', 'bias'))).items():
            close(value, data[f'eval_{key}'], ('eval', key))

    @pytest.mark.parametrize(
        'name, arguments',
        [
            ('k1', dict(bias=False)),
            ('k3s2', dict(stride=2, padding=1, bias=False)),
            ('grp', dict(groups=2, dilation=2, padding=2, bias=False)),
            ('bias', dict(padding=1)),
        ],
    )
    def test_centred_convolution(self, name, arguments, golden):
        data = self.tensors(golden('mabn/cenconv.npz'), f'{name}.')
        conv = ReferenceCenConv2d(data['x'].shape[1], len(data['weight']), data['weight'].shape[-1], **arguments)
        conv = conv.double()
        conv.load_state_dict({key: data[key] for key in ('weight', 'bias') if key in data})
        y = conv(data['x'].requires_grad_())
        y.backward(data['gy'])
        close(y, data['y'], 'y'), close(data['x'].grad, data['gx'], 'gx')
        for key, parameter in conv.named_parameters():
            close(parameter.grad, data[f'g_{key}'], key)

    @pytest.mark.parametrize('name', ['anbn_m2_C8_k2', 'anbn_m2_C16_k5', 'angn_G4_C8_k3', 'angn_G8_C16_k10'])
    @pytest.mark.parametrize('mode', ['train', 'eval'])
    def test_an(self, name, mode, golden):
        data = self.tensors(golden(f'an/{name}.npz'))
        norm, num_groups = 'BN' if 'bn_' in name else 'GN', int(data.get('num_groups', 32))
        layer = ReferenceAN(data['x'].shape[1], norm, int(data['k']), num_groups).double()
        layer.load_state_dict(self.tensors(golden(f'an/{name}.npz'), 'sd.'))
        layer.train(mode == 'train')
        y = layer(data['x'].requires_grad_())
        y.backward(data['gy'])
        close(y, data[f'{mode}.y'], 'y'), close(data['x'].grad, data[f'{mode}.gx'], 'gx', 1e-10)
        for key, parameter in layer.named_parameters():
            close(parameter.grad, data[f'{mode}.g.{key}'], key, 1e-10)  # logits of two instances are all but equal
        for key in data if mode == 'train' else ():
            if key.startswith('after.'):
                close(layer.state_dict()[key[6:]].double(), data[key], key)


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


class TestOurs:
    @pytest.mark.parametrize('kernel_size', [3, 5])
    def test_bnet(self, kernel_size):
        ours = randomized(BNET(4, kernel_size).double())
        assert_same_steps(ours, ReferenceBNET(4, kernel_size).double())

    def test_a_new_bnet_is_a_new_batch_norm_as_ours_is(self):
        assert all(torch.equal(a, b) for a, b in zip(ReferenceBNET(4, 5).parameters(), BNET(4, 5).parameters()))

    @pytest.mark.parametrize('norm', ['BN', 'GN'])
    def test_an(self, norm):
        ours = randomized(AN(4, norm, k=3, num_groups=2).double())
        assert_same_steps(ours, ReferenceAN(4, norm, k=3, num_groups=2).double(), size=(3, 4, 5, 6))

    @pytest.mark.parametrize('start', [0, 6, 1003], ids=['batch', 'window', 'renorm'])
    def test_mabn_in_every_phase(self, start):
        arguments = dict(B=2, real_B=8, warmup_iters=5)
        ours = randomized(MABN(4, **arguments).double())
        ours.iters.fill_(start), ours.buffer_x2.uniform_(0.5, 2), ours.buffer_gz.normal_()
        assert_same_steps(ours, ReferenceMABN(4, **arguments).double(), steps=8)

    @pytest.mark.parametrize('start', [0, 100], ids=['batch', 'renorm'])
    def test_mabn_over_groups(self, start):
        ours = randomized(MABN(4, norm_batch=2, real_B=6).double())
        ours.iters.fill_(start), ours.pre_x2.uniform_(0.5, 2), ours.pre_gz.normal_()
        assert_same_steps(ours, ReferenceGroupedMABN(4, real_B=6).double(), steps=8, size=(4, 4, 5, 6))

    def test_centred_convolution(self):
        ours, reference = CenConv2d(4, 6, 3, padding=1).double(), ReferenceCenConv2d(4, 6, 3, padding=1).double()
        assert_same_steps(ours, reference)

    @pytest.mark.parametrize('arguments', [dict(burnin=2), dict(burnin=0, buffer_num=2, rho=0.5), dict(buffer_num=0)])
    def test_cbn_while_the_weights_move(self, arguments):
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
        assert len(reference.norm.history) == reference.norm.buffer_num
        close(ours.eval()(x), reference.eval()(x), 'eval')


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
