"""A network that starts from scratch: no parameter of a norm is out of reach of the gradient."""

import pytest
import torch
from mmdet.registry import MODELS

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


@pytest.mark.parametrize('norm, groups', [('BN', 1), ('GN', 2)])
def test_zero_init_zeroes_the_mixtures_of_an_and_no_attention(norm, groups):
    torch.manual_seed(0)
    block = dict(type='AN', norm=norm, num_groups=groups)
    model = MODELS.build(dict(type='ResNet', depth=18, base_channels=4, norm_cfg=block, norm_eval=False))
    drawn = {name: value.clone() for name, value in model.layer1[0].bn1.state_dict().items() if 'conv' not in name}
    model.init_weights()
    last = model.layer1[0].bn2
    assert not last.weight_.any() and not last.bias_.any()
    assert last.attention_weights.attention[0].weight.all()
    assert norm == 'GN' or (last.attention_weights.attention[1].weight == 1).all()
    for name in ('weight_', 'bias_'):  # one that is not zeroed stays as it was
        assert torch.equal(model.layer1[0].bn1.state_dict()[name], drawn[name])
