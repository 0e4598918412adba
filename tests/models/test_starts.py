"""A network that starts from scratch: no parameter of a norm is out of reach of the gradient."""

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

import mmdet_norms
from mmdet_norms.layers import NORMS, FrozenBN

OF_TORCH = ('BN', 'GN')


@pytest.mark.parametrize('depth', [18, pytest.param(50, marks=pytest.mark.full)])
@pytest.mark.parametrize('norm', sorted({*NORMS, *OF_TORCH}))
def test_every_parameter_learns_from_scratch(norm, depth):
    """mmdet zeroes the last norm of each block, and all that is in it."""
    torch.manual_seed(0)
    norm_cfg = dict(type=norm, **({'num_groups': 2} if norm == 'GN' else {}))
    model = MODELS.build(dict(type='ResNet', depth=depth, base_channels=4, norm_cfg=norm_cfg, norm_eval=False))
    model.init_weights()
    optimizer, learns = torch.optim.SGD(model.double().parameters(), 0.1), set()
    for _ in range(3):  # what is behind a 0 has its first gradient one step later
        optimizer.zero_grad()
        sum(y.square().mean() for y in model(torch.randn(4, 3, 32, 32).double())).backward()
        optimizer.step()
        learns |= {name for name, value in model.named_parameters() if value.grad.any()}
    assert {name for name, _ in model.named_parameters()} == learns
    frozen = [module for module in model.modules() if isinstance(module, FrozenBN)]
    assert bool(frozen) == (norm == 'FrozenBN') and all(module.weight.all() for module in frozen)


@pytest.mark.parametrize('kind', ['BN', 'GN'])
def test_an_attention_is_drawn_again_only_if_it_was_zeroed(kind):
    norm = mmdet_norms.layers.AN(8, norm=kind, num_groups=2)
    drawn = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.init_weights()
    assert all(torch.equal(value, drawn[name]) for name, value in norm.state_dict().items())
    for module in norm.attention_weights.attention:
        nn.init.zeros_(module.weight), nn.init.zeros_(module.bias) if module.bias is not None else None
    norm.init_weights()
    again = norm.state_dict()
    assert torch.equal(again['weight_'], drawn['weight_']) and again['attention_weights.attention.0.weight'].all()
    if kind == 'BN':
        assert (again['attention_weights.attention.1.weight'] == 1).all()
