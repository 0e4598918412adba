"""``norm_decay_mult`` and ``is_norm`` mean the norms of this package too."""

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmcv.cnn import is_norm as mmcv_is_norm
from mmengine.optim import build_optim_wrapper
from mmengine.utils.dl_utils import is_norm as mmengine_is_norm
from torch import nn

from mmdet_norms.layers import NORMS

LEARNT = [name for name in NORMS if name != 'FrozenBN']


def decays(model, **paramwise):
    """Weight decay and learning rate by parameter name."""
    cfg = dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=1e-2), paramwise_cfg=paramwise)
    wrapper = build_optim_wrapper(model, cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: g for g in wrapper.optimizer.param_groups for p in g['params']}
    assert groups.keys() == set(names.values())
    return groups


def model_with(norm):
    return nn.Sequential(ConvModule(3, 32, 1, norm_cfg=dict(type=norm)))


@pytest.mark.parametrize('norm', LEARNT)
def test_norm_decay_mult_reaches_every_parameter_of_the_norm_and_nothing_else(norm):
    groups = decays(model_with(norm), norm_decay_mult=0.0)
    assert len(groups) > 1
    for name, group in groups.items():
        assert group['weight_decay'] == (1e-2 if name == '0.conv.weight' else 0.0), name


@pytest.mark.parametrize('norm', LEARNT)
def test_without_norm_decay_mult_all_parameters_decay_as_published(norm):
    groups = decays(model_with(norm), custom_keys={'nothing': dict(lr_mult=2)})
    assert all(group['weight_decay'] == 1e-2 for group in groups.values())


def test_custom_keys_come_before_norm_decay_mult():
    groups = decays(model_with('BNET'), norm_decay_mult=0.0, custom_keys={'bnconv.weight': dict(decay_mult=3)})
    decay = {name.split('.', 2)[2]: g['weight_decay'] for name, g in groups.items() if 'bnconv' in name}
    assert decay == {'bnconv.weight': pytest.approx(3e-2), 'bnconv.bias': 0.0}


def test_the_rule_for_depthwise_convolutions_does_not_mean_a_norm():
    groups = decays(model_with('BNET'), dwconv_decay_mult=0.0)
    assert all(group['weight_decay'] == 1e-2 for group in groups.values())


def test_the_published_rule_for_mabns_bias_still_holds():
    groups = decays(model_with('MABN'), bias_lr_mult=2, bias_decay_mult=0)
    (bias,) = (g for name, g in groups.items() if name.endswith('.bias'))
    assert bias['lr'] == pytest.approx(0.2) and bias['weight_decay'] == 0


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('is_norm', [mmcv_is_norm, mmengine_is_norm], ids=['mmcv', 'mmengine'])
def test_is_norm_finds_every_norm_unless_excluded(norm, is_norm):
    layer = NORMS[norm](32)
    assert is_norm(layer) and not is_norm(layer, exclude=type(layer))
    assert is_norm(nn.InstanceNorm2d(4)) and not is_norm(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize('norm', NORMS)
def test_the_init_rule_of_mmdets_heads_leaves_a_new_norm_as_it_starts(norm):
    from mmengine.model import constant_init

    torch.manual_seed(0)
    layer = NORMS[norm](32)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    constant_init(layer, 1)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


ABBREVIATIONS = dict.fromkeys(('AN', 'BIN', 'BN', 'BRN', 'CBN', 'FrozenBN', 'GhostBN', 'MABN', 'RBN', 'SyncBN'), 'bn')
ABBREVIATIONS |= dict(BNET='bnet', GN='gn', IN='in', LN2d='ln', SN='sn')


@pytest.mark.parametrize('norm, name', ABBREVIATIONS.items())
def test_mmcv_still_names_each_norm_in_its_host(norm, name):
    assert build_norm_layer(dict(type=norm), 32, postfix=1)[0] == f'{name}1'
