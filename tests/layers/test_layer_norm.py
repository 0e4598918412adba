"""LN2d, and that the names LN and IN still mean what mmcv registers."""

import numpy as np
import pytest
import torch
from mmcv.cnn import build_norm_layer, is_norm
from torch import nn

from mmdet_norms.layers.layer_norm import LN2d


@pytest.mark.parametrize('over', ['C', 'CHW'])
def test_forward_equals_the_formula_written_out(over):
    torch.manual_seed(0)
    layer = LN2d(5, over=over, eps=1e-3).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64) * 3 + 1
    expected, w, b = np.empty(x.shape), layer.weight.detach().numpy(), layer.bias.detach().numpy()
    for n, c, h, v in np.ndindex(*x.shape):
        values = x.numpy()[n, :, h, v] if over == 'C' else x.numpy()[n]
        expected[n, c, h, v] = w[c] * (x[n, c, h, v].item() - values.mean()) / np.sqrt(values.var() + 1e-3) + b[c]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_over_chw_is_group_norm_with_one_group():
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(LN2d(6, over='CHW')(x), nn.GroupNorm(1, 6)(x))


def test_mmcv_builds_it_and_knows_it_as_a_norm():
    name, layer = build_norm_layer(dict(type=LN2d, over='CHW'), 6)
    assert name == 'ln' and is_norm(layer) and layer.over == 'CHW' and set(layer.state_dict()) == {'weight', 'bias'}


@pytest.mark.parametrize('over', ['HW', 'c', None, 1])
def test_an_unknown_extent_is_refused_with_the_choices(over):
    with pytest.raises(ValueError, match=rf"'LN2d': over={over!r} is unknown; choose one of: C, CHW"):
        LN2d(4, over=over)


def test_ln_of_transformers_stays_mmcvs():
    assert type(build_norm_layer(dict(type='LN'), 6)[1]) is nn.LayerNorm


class TestInstanceNorm:
    """Stock ``IN``, which a detector wants with ``affine=True``: what holds of it."""

    def build(self):
        name, layer = build_norm_layer(dict(type='IN', affine=True), 4)
        assert name == 'in' and type(layer) is nn.InstanceNorm2d
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        return layer

    @pytest.mark.parametrize('training', [True, False])
    def test_it_is_group_norm_with_a_group_per_channel(self, training):
        layer, reference = self.build().train(training), nn.GroupNorm(4, 4)
        reference.load_state_dict(layer.state_dict())
        x = torch.randn(2, 4, 5, 6)
        torch.testing.assert_close(layer(x), reference(x))

    def test_one_image_constant_and_half_maps_are_finite(self):
        layer = self.build()
        for x in (torch.randn(1, 4, 5, 5), torch.full((2, 4, 5, 5), 7.0), torch.randn(2, 4, 5, 5) + 1e4):
            assert layer(x).isfinite().all()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert layer(torch.randn(2, 4, 5, 5).bfloat16()).isfinite().all()

    def test_a_single_pixel_map_is_torchs_error_in_training(self):
        with pytest.raises(ValueError, match='Expected more than 1 spatial element when training'):
            self.build()(torch.randn(2, 4, 1, 1))
