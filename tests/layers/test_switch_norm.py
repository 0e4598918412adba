"""SN against the paper's formulas, its limits (IN, LN, BN), and published checkpoints."""

import numpy as np
import pytest
import torch
from mmcv.cnn import build_norm_layer
from torch import nn
from torch.nn import functional as F

from mmdet_norms.layers.switch_norm import SN


def random_sn(channels=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = SN(channels, **kwargs).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.bn.running_mean.normal_(), layer.bn.running_var.uniform_(0.5, 2)
    return layer


def oracle(layer, x, training):
    """One value at a time, every statistic over its own set."""
    values = {key: value.numpy().copy() for key, value in layer.state_dict().items()}
    soft = {k: np.exp(values[k]) / np.exp(values[k]).sum() for k in ('mean_weight', 'var_weight')}
    y = np.empty_like(x)
    for n, c, h, w in np.ndindex(*x.shape):
        batch = x[:, c]
        means = [x[n, c].mean(), x[n].mean(), batch.mean() if training else values['running_mean'][c]]
        variances = [x[n, c].var(), x[n].var(), batch.var() if training else values['running_var'][c]]
        mean, var = soft['mean_weight'] @ means, soft['var_weight'] @ variances
        y[n, c, h, w] = values['weight'][c] * (x[n, c, h, w] - mean) / np.sqrt(var + layer.eps) + values['bias'][c]
    return y


@pytest.mark.parametrize('training', [True, False])
def test_forward_equals_the_formula_written_out(training):
    layer = random_sn(eps=1e-3).train(training)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + torch.arange(3).view(1, 3, 1, 1)
    expected = oracle(layer, x.numpy(), training)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_running_statistics_average_those_of_batch_norm():
    layer = random_sn(momentum=0.3)
    mean, var = layer.bn.running_mean.numpy().copy(), layer.bn.running_var.numpy().copy()
    for _ in range(3):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 2 + 1
        layer(x)
        mean += 0.3 * (x.numpy().mean((0, 2, 3)) - mean)
        var += 0.3 * (x.numpy().var((0, 2, 3)) - var)
    np.testing.assert_allclose(layer.bn.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(layer.bn.running_var.numpy(), var, rtol=1e-12)


@pytest.mark.parametrize('index, reference', [
    (0, lambda x: F.instance_norm(x)),
    (1, lambda x: F.group_norm(x, 1)),
    (2, lambda x: F.batch_norm(x, None, None, training=True)),
])  # fmt: skip
def test_with_all_weight_on_one_statistic_it_is_that_norm(index, reference):
    layer, x = SN(4), torch.randn(2, 4, 5, 5) * 3 + 1
    for logits in (layer.mean_weight, layer.var_weight):
        nn.init.zeros_(logits)
        logits.data[index] = 100
    torch.testing.assert_close(layer(x), reference(x))


def test_it_starts_as_an_even_mix():
    layer = SN(4)
    assert layer.mean_weight.softmax(0).tolist() == pytest.approx([1 / 3] * 3)
    assert layer.var_weight.softmax(0).tolist() == pytest.approx([1 / 3] * 3)


def test_published_shapes_load_as_they_are():
    source = random_sn(4)
    state = {key: value.clone() for key, value in source.state_dict().items() if key != 'num_batches_tracked'}
    for key in ('weight', 'bias'):
        state[key] = state[key].view(1, 4, 1, 1)
    for key in ('running_mean', 'running_var'):
        state[key] = state[key].view(1, 4, 1)
    target = nn.Sequential(SN(4))
    target.load_state_dict({f'0.{key}': value for key, value in state.items()}, strict=True)
    for key, value in source.float().state_dict().items():
        assert torch.equal(target[0].state_dict()[key], value), key


def test_a_batch_norm_checkpoint_is_the_identical_function_until_it_mixes():
    plain = nn.BatchNorm2d(4)
    nn.init.normal_(plain.weight), plain.running_mean.normal_()
    layer, x = SN(4), torch.randn(2, 4, 5, 5) * 3 + 1
    with pytest.warns(UserWarning, match='hardly learns'):
        layer.load_state_dict(plain.state_dict())
    for training in (False, True):
        torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))
    layer.mix_evenly()
    assert not torch.allclose(layer(x), plain(x), atol=0.01)
    assert torch.equal(layer.mean_weight, SN(4).mean_weight) and torch.equal(layer.var_weight, SN(4).var_weight)


def test_a_weight_of_another_width_is_a_size_mismatch():
    with pytest.raises(RuntimeError, match='size mismatch for weight'):
        SN(4).load_state_dict(SN(5).state_dict())


def test_mmcv_builds_it_and_zero_init_reaches_its_weight_only():
    from mmengine.model import constant_init

    name, layer = build_norm_layer(dict(type=SN), 4, postfix=3)
    layer.apply(lambda m: constant_init(m, 0))
    assert name == 'sn3' and layer.weight.abs().sum() == 0 and layer.mean_weight.abs().sum() > 0
