"""GN: the formula, mmcv's builder, and where torch's own falls short."""

import numpy as np
import pytest
import torch
from mmcv.cnn import build_norm_layer, is_norm
from torch import nn
from torch.nn import functional as F

from mmdet_norms.layers.group_norm import GN


def oracle(x, groups, weight, bias, eps):
    y = np.empty_like(x)
    size = x.shape[1] // groups
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            start = c // size * size
            group = x[n, start : start + size]
            y[n, c] = weight[c] * (x[n, c] - group.mean()) / np.sqrt(group.var() + eps) + bias[c]
    return y


@pytest.mark.parametrize('groups', [1, 2, 3, 6])
def test_forward_equals_the_formula_written_out(groups):
    torch.manual_seed(0)
    layer = GN(6, groups, eps=1e-3).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64) * 3 + 1
    expected = oracle(x.numpy(), groups, layer.weight.detach().numpy(), layer.bias.detach().numpy(), 1e-3)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_mmcv_builds_it_with_and_without_num_groups():
    for cfg, groups in ((dict(type=GN), 32), (dict(type=GN, num_groups=8, requires_grad=False), 8)):
        name, layer = build_norm_layer(cfg, 64)
        assert name == 'gn' and layer.num_groups == groups and is_norm(layer)
        assert layer.weight.requires_grad == cfg.get('requires_grad', True)


def test_it_shares_weights_with_torchs_group_norm():
    layer, stock = GN(64), nn.GroupNorm(32, 64)
    nn.init.normal_(stock.weight), nn.init.normal_(stock.bias)
    layer.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(layer(x), stock(x))


def test_channels_last_on_a_cpu_keeps_the_digits_that_torch_loses():
    x = (torch.randn(2, 8, 16, 16) + 1e4).to(memory_format=torch.channels_last)
    expected = F.group_norm(x.double(), 4)
    assert (GN(8, 4)(x) - expected).abs().max() < 0.01
    torchs = (F.group_norm(x, 4) - expected).abs().max()
    if torchs < 0.01:
        pytest.skip(f'this torch ({torch.__version__}) has no such loss any more: contiguous() in GN can go')


@pytest.mark.parametrize('groups', [32, 7, 0, -4, 2.0, True, None, '8'])
def test_groups_that_do_not_divide_the_channels_are_refused_with_the_divisors(groups):
    with pytest.raises(ValueError, match=r"'GN': num_groups=.* the 48 channels .*: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48$"):
        GN(48, groups)


def test_without_affine_it_has_no_parameters():
    layer, x = GN(8, 2, affine=False), torch.randn(2, 8, 3, 3)
    assert not list(layer.parameters())
    torch.testing.assert_close(layer(x), F.group_norm(x, 2))
