"""Activations that mmcv lacks: the formula in float64, derivatives, extreme values, and names."""

import pytest
import torch
from mmcv.cnn import ConvModule, build_activation_layer
from mpmath import mp, mpf

from mmdet_norms.layers._args import ConfigError
from mmdet_norms.models.activations import ACTIVATIONS, act_cfg_of

# The formulas, in 50 digits.
mp.dps = 50
FORMULAS = {
    'relu': lambda x: max(x, mpf(0)),
    'lrelu': lambda x: x if x > 0 else x * mpf(0.01),
    'swish': lambda x: x / (1 + mp.exp(-x)),
    'mish': lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
    'mila': lambda x: x * mp.tanh(mp.log1p(mp.exp(mpf(-0.25) + x))),
    'bent_id': lambda x: x + (mp.sqrt(x * x + 1) - 1) / 2,
}
POINTS = [-1e3, -100.0, -30.0, -5.0, -1.2, -1.0, -1e-3, -1e-6, 0.0, 1e-12, 1e-6, 0.25, 1.0, 5.0, 19.9, 20.3, 100.0, 1e6]


def of(name):
    return build_activation_layer(dict(ACTIVATIONS[name]))


@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_the_formula(name, dtype):
    x = torch.tensor(POINTS, dtype=dtype)
    expected = torch.tensor([float(FORMULAS[name](mpf(float(point)))) for point in x], dtype=torch.float64)
    # softplus is the identity from 20 on, in torch
    rtol, atol = (2e-9, 1e-20) if dtype == torch.float64 else (1e-6, 1e-30)
    torch.testing.assert_close(of(name)(x.clone()).double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('order', [1, 2, 3])
def test_derivatives(name, order):
    x = torch.tensor([p for p in POINTS if 1e-2 < abs(p) < 10], dtype=torch.float64).requires_grad_()
    y = of(name)(x + 0)
    for _ in range(order):
        if not y.requires_grad:  # a constant slope
            return
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True, materialize_grads=True)
    expected = [float(mp.diff(FORMULAS[name], mpf(point), order)) for point in x.tolist()]
    torch.testing.assert_close(y.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', ['mila', 'bent_id'])
def test_gradcheck(name):
    x = torch.linspace(-4, 4, 24, dtype=torch.float64).reshape(2, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(of(name), x) and torch.autograd.gradgradcheck(of(name), x)


@pytest.mark.parametrize('name', ['mila', 'bent_id'])
@pytest.mark.parametrize('dtype, largest', [(torch.float16, 4e4), (torch.bfloat16, 1e18), (torch.float32, 1e18)])
def test_extreme_values_stay_finite_with_their_gradients(name, dtype, largest):
    x = torch.tensor([-largest, -1e4, -1.0, 0.0, 1.0, 1e4, largest], dtype=dtype).requires_grad_()
    y = of(name)(x)
    y.sum().backward()
    assert y.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()
    exact = of(name)(x.detach().double())
    torch.testing.assert_close(y.detach().double(), exact, rtol=float(torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize('name', ['mila', 'bent_id', 'mish'])
def test_by_act_cfg_in_a_conv_module(name):
    module = ConvModule(3, 4, 3, act_cfg=dict(type=ACTIVATIONS[name]['type']), norm_cfg=dict(type='BNET'))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(module(x), of(name)(module.norm(module.conv(x))))


@pytest.mark.parametrize(
    'keys, said',
    [
        (
            dict(act_cls='mihs'),
            r"Net: act_cls='mihs' is unknown \(did you mean 'mish'\?\); choose one of: relu, lr",
        ),
        (dict(act_cls='Mish'), r"act_cls='Mish' is unknown \(did you mean 'mish'\?\)"),
        (dict(act_cls=None), r'act_cls=None is unknown; choose one of'),
        (dict(act_cls='mish', act_cfg=dict(type='Mila')), r'both name an activation; keep one'),
        (dict(act_cls='relu', act_cfg=dict(type='Milla')), r"act_cfg={'type': 'Milla'} names no .* mean 'Mila'"),
        (dict(act_cls='relu', act_cfg='mila'), r"act_cfg='mila' names no registered activation"),
    ],
)
def test_a_wrong_name_is_told_the_right_ones(keys, said):
    with pytest.raises(ConfigError, match=said):
        act_cfg_of('Net', **keys)
