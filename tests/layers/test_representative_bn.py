"""RBN against the paper's formulas, and what it makes of batch norm's checkpoints."""

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_norms.layers import RBN


def random_rbn(channels=3, **kwargs):
    torch.manual_seed(0)
    layer = RBN(channels, **kwargs).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.bn.running_mean.normal_(), layer.bn.running_var.uniform_(0.5, 2)
    return layer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def calibrated(layer, x):
    """x + w_m mean(x), one map of one instance at a time."""
    w_m, centred = layer.center_weight.detach().numpy(), np.empty_like(x)
    for n, c in np.ndindex(*x.shape[:2]):
        centred[n, c] = x[n, c] + w_m[c] * x[n, c].mean()
    return centred


def oracle(layer, x, training):
    values = {key: value.numpy().copy() for key, value in layer.state_dict().items()}
    centred, y = calibrated(layer, x), np.empty_like(x)
    for n, c in np.ndindex(*x.shape[:2]):
        mean, var = centred[:, c].mean(), centred[:, c].var()
        if not training:
            mean, var = values['running_mean'][c], values['running_var'][c]
        x_hat = (centred[n, c] - mean) / np.sqrt(var + layer.bn.eps)
        gate = sigmoid(values['scale_weight'][c] * x_hat.mean() + values['scale_bias'][c])
        y[n, c] = values['weight'][c] * x_hat * gate + values['bias'][c]
    return y


@pytest.mark.parametrize('training', [True, False])
def test_forward_equals_the_formula_written_out(training):
    layer = random_rbn(eps=1e-3).train(training)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + torch.arange(3).view(1, 3, 1, 1)
    expected = oracle(layer, x.numpy(), training)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_running_statistics_average_those_of_the_calibrated_map_as_batch_norm_does():
    layer = random_rbn(momentum=0.3)
    mean, var = layer.bn.running_mean.numpy().copy(), layer.bn.running_var.numpy().copy()
    for _ in range(3):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 2 + 1
        layer(x)
        centred = calibrated(layer, x.numpy())
        mean += 0.3 * (centred.mean((0, 2, 3)) - mean)
        var += 0.3 * (centred.var((0, 2, 3), ddof=1) - var)
    np.testing.assert_allclose(layer.bn.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(layer.bn.running_var.numpy(), var, rtol=1e-12)
    assert layer.bn.num_batches_tracked == 3


@pytest.mark.parametrize('training', [True, False])
def test_gradients_are_those_of_the_formula(training):
    layer = random_rbn().train(training)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


def test_a_new_layer_is_batch_norm_times_sigmoid_of_one():
    layer, plain, x = RBN(4), nn.BatchNorm2d(4), torch.randn(2, 4, 5, 5) * 3 + 1
    torch.testing.assert_close(layer(x), plain(x) * torch.tensor(1.0).sigmoid())


def test_a_batch_norm_checkpoint_is_the_identical_function_and_learns_as_a_new_layer():
    plain = nn.BatchNorm2d(4)
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias), plain.running_mean.normal_()
    layer, x = random_rbn(4).float(), torch.randn(2, 4, 5, 5) * 3 + 1
    layer.load_state_dict(plain.state_dict())
    for training in (False, True):
        torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))
    (layer(x) * torch.randn_like(x)).sum().backward()
    assert all(p.grad.abs().min() > 0 for p in layer.parameters())


def test_a_single_value_per_channel_is_normalized_with_the_running_statistics():
    layer, x = random_rbn(), torch.randn(1, 3, 1, 1, dtype=torch.float64)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    y = layer(x)
    assert torch.equal(y, layer.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_it_shows_its_arguments_and_refuses_others():
    assert str(RBN(4, momentum=None)).startswith('RBN(\n  4, eps=1e-05, momentum=None')
    for wrong in (dict(eps=0), dict(momentum=2), dict(epsilon=1)):
        with pytest.raises((ValueError, TypeError), match="norm_cfg of type 'RBN'"):
            RBN(4, **wrong)
