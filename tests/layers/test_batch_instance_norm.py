"""BIN against the paper's formulas, its ends (BN, IN), and the interval that its gates stay in."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdet_norms.layers import BIN


def random_bin(channels=3, **kwargs):
    torch.manual_seed(0)
    layer = BIN(channels, **kwargs).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    nn.init.uniform_(layer.gate, 0.1, 0.9)
    layer.bn.running_mean.normal_(), layer.bn.running_var.uniform_(0.5, 2)
    return layer


def oracle(layer, x, training):
    """One map of one instance at a time."""
    values = {key: value.numpy().copy() for key, value in layer.state_dict().items()}
    y = np.empty_like(x)
    for n, c in np.ndindex(*x.shape[:2]):
        mean, var = x[:, c].mean(), x[:, c].var()
        if not training:
            mean, var = values['running_mean'][c], values['running_var'][c]
        of_batch = (x[n, c] - mean) / np.sqrt(var + layer.bn.eps)
        of_instance = (x[n, c] - x[n, c].mean()) / np.sqrt(x[n, c].var() + layer.bn.eps)
        rho = values['gate'][c]
        y[n, c] = values['weight'][c] * (rho * of_batch + (1 - rho) * of_instance) + values['bias'][c]
    return y


@pytest.mark.parametrize('training', [True, False])
def test_forward_equals_the_formula_written_out(training):
    layer = random_bin(eps=1e-3).train(training)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + torch.arange(3).view(1, 3, 1, 1)
    expected = oracle(layer, x.numpy(), training)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_running_statistics_are_batch_norms():
    layer, plain = random_bin(momentum=0.3), nn.BatchNorm2d(3, momentum=0.3).double()
    plain.running_mean.copy_(layer.bn.running_mean), plain.running_var.copy_(layer.bn.running_var)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 2 + 1
        layer(x), plain(x)
    for name in ('running_mean', 'running_var', 'num_batches_tracked'):
        torch.testing.assert_close(getattr(layer.bn, name), getattr(plain, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize('training', [True, False])
def test_gradients_are_those_of_the_formula(training):
    layer = random_bin().train(training)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize('gate, reference', [
    (1, lambda x: F.batch_norm(x, None, None, training=True)),
    (1.5, lambda x: F.batch_norm(x, None, None, training=True)),
    (0, F.instance_norm),
    (-0.5, F.instance_norm),
])  # fmt: skip
def test_at_the_bounds_of_the_gate_and_beyond_it_is_one_of_both(gate, reference):
    layer, x = BIN(4), torch.randn(2, 4, 5, 5) * 3 + 1
    nn.init.constant_(layer.gate, gate)
    torch.testing.assert_close(layer(x), reference(x))


def test_a_batch_norm_checkpoint_is_the_identical_function():
    plain = nn.BatchNorm2d(4)
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias), plain.running_mean.normal_()
    layer, x = random_bin(4).float(), torch.randn(2, 4, 5, 5) * 3 + 1
    layer.load_state_dict(plain.state_dict())
    for training in (False, True):
        torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))


class TestGate:
    def step(self, layer, target, lr=1.0):
        """Of SGD, towards ``target`` of the output."""
        x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)) + torch.arange(3).view(3, 1, 1, 1)
        layer.zero_grad()
        (layer(x) - target(x)).square().mean().backward()
        with torch.no_grad():
            layer.gate -= lr * layer.gate.grad

    def test_it_is_clipped_after_each_step_as_published(self):
        layer = BIN(2)
        nn.init.constant_(layer.gate, 0.9)
        self.step(layer, lambda x: 2 * F.batch_norm(x, None, None, training=True) - F.instance_norm(x), lr=10)
        assert (layer.gate > 1).all()
        self.step(layer, F.instance_norm, lr=0)
        assert (layer.gate == 1).all()

    def test_one_that_left_the_interval_comes_back(self):
        layer = BIN(2)
        nn.init.constant_(layer.gate, 1.2)
        for _ in range(50):
            self.step(layer, F.instance_norm)
        assert (layer.gate < 0.2).all()

    def test_it_stays_as_it_is_where_nothing_is_trained(self):
        layer, x = BIN(2), torch.randn(3, 2, 4, 4)
        nn.init.constant_(layer.gate, 1.2)
        layer.eval()(x), layer.train()(x[:0]), layer.requires_grad_(False)(x)
        layer.requires_grad_(True)(x * float('nan'))
        assert (layer.gate == torch.tensor(1.2)).all()

    def test_two_calls_before_backward(self):
        layer, x = BIN(2), torch.randn(3, 2, 4, 4)
        nn.init.constant_(layer.gate, 1.2)
        (layer(x) + layer(2 * x)).sum().backward()
        assert layer.gate.grad.isfinite().all()


def test_a_single_value_per_channel_is_normalized_with_the_running_statistics():
    layer, x = random_bin(), torch.randn(1, 3, 1, 1, dtype=torch.float64)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    y = layer(x)
    assert torch.equal(y, layer.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_it_shows_its_arguments_and_refuses_others():
    assert str(BIN(4, momentum=None)).startswith('BIN(\n  4, eps=1e-05, momentum=None')
    for wrong in (dict(eps=0), dict(momentum=2), dict(epsilon=1)):
        with pytest.raises((ValueError, TypeError), match="norm_cfg of type 'BIN'"):
            BIN(4, **wrong)
