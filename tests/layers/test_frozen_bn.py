"""FrozenBN: the formula, what can and cannot change it, and checkpoints of several ages."""

import numpy as np
import pytest
import torch
from mmcv.cnn import build_norm_layer
from torch import nn

from mmdet_norms.layers.frozen_bn import FrozenBN


def trained_batch_norm(channels=4, seed=0):
    torch.manual_seed(seed)
    bn = nn.BatchNorm2d(channels)
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2), bn.num_batches_tracked.fill_(7)
    return bn


def frozen_from(bn, **kwargs):
    layer = FrozenBN(bn.num_features, **kwargs)
    layer.load_state_dict(bn.state_dict(), strict=True)
    return layer


@pytest.mark.parametrize('training', [True, False])
def test_forward_equals_the_formula_written_out(training):
    layer = frozen_from(trained_batch_norm(), eps=1e-3).double().train(training)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64) * 3 + 1
    w, b, mean, var = (getattr(layer, k).numpy() for k in ('weight', 'bias', 'running_mean', 'running_var'))
    expected = np.empty(x.shape)
    for n, c, h, v in np.ndindex(*x.shape):
        expected[n, c, h, v] = w[c] * (x[n, c, h, v].item() - mean[c]) / np.sqrt(var[c] + 1e-3) + b[c]
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_batch_norm_checkpoint_gives_its_eval_function_and_goes_back():
    bn = trained_batch_norm()
    layer, x = frozen_from(bn), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(layer(x), bn.eval()(x))
    back = nn.BatchNorm2d(4)
    back.load_state_dict(layer.state_dict(), strict=True)
    assert all(torch.equal(value, bn.state_dict()[key]) for key, value in back.state_dict().items())
    assert layer.state_dict().keys() == bn.state_dict().keys()


def test_nothing_about_it_can_be_trained():
    cfg = dict(type=FrozenBN, requires_grad=True)
    name, layer = build_norm_layer(cfg, 4, postfix=1)
    assert name == 'bn1' and not list(layer.parameters())
    layer.load_state_dict(trained_batch_norm().state_dict())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.train()(torch.randn(2, 4, 6, 6, requires_grad=True)).sum().backward()
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(layer), FrozenBN)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_checkpoint_without_statistics_is_exactly_its_affine_map():
    state = {'0.weight': torch.randn(4), '0.bias': torch.randn(4)}
    layer = nn.Sequential(FrozenBN(4))
    layer[0].running_mean.fill_(5)
    layer.load_state_dict(state, strict=True)
    x = torch.randn(2, 4, 3, 3)
    expected = x * state['0.weight'].view(1, -1, 1, 1) + state['0.bias'].view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert set(state) == {'0.weight', '0.bias'}


def test_a_checkpoint_with_half_of_the_statistics_is_incomplete():
    state = trained_batch_norm().state_dict()
    del state['running_var'], state['num_batches_tracked']
    assert FrozenBN(4).load_state_dict(state, strict=False).missing_keys == ['running_var']


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_it_becomes_a_batch_norm_that_folds_into_a_convolution(dtype):
    layer = frozen_from(trained_batch_norm(), eps=1e-3).to(dtype)
    bn, conv, x = layer.to_batch_norm(), nn.Conv2d(2, 4, 3).to(dtype).eval(), torch.randn(2, 2, 6, 6, dtype=dtype)
    assert not bn.training and bn.weight.dtype == dtype and not any(p.requires_grad for p in bn.parameters())
    torch.testing.assert_close(bn(conv(x)), layer(conv(x)))
    torch.testing.assert_close(torch.nn.utils.fusion.fuse_conv_bn_eval(conv, bn)(x), layer(conv(x)))


def test_the_backward_pass_keeps_no_map_in_memory():
    saved = []
    layer, x = frozen_from(trained_batch_norm()), torch.randn(2, 4, 6, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert max(saved) == 4
