"""replace_norm_cfg: dicts in, dicts out."""

import copy

import pytest
from mmengine.config import ConfigDict

from mmdet_norms import replace_norm_cfg
from mmdet_norms.entries import class_of
from mmdet_norms.placement.part import Part

BNET = dict(type='BNET', kernel_size=5)


def detector():
    return dict(
        type='ATSS',
        backbone=dict(type='ResNet', norm_cfg=dict(type='SyncBN', requires_grad=False)),
        neck=[dict(type='FPN'), dict(type='DyHead')],
        bbox_head=dict(type='ATSSHead', loss_cls=dict(type='FocalLoss')),  # group norm by default
        decoder=dict(layer_cfg=dict(norm_cfg=dict(type='LN'))),
        train_cfg=dict(assigner=dict(type='ATSSAssigner')),
    )


def test_explicit_and_default_norms_are_replaced_and_nothing_else_changes():
    expected = detector()
    expected['backbone']['norm_cfg'] = expected['bbox_head']['norm_cfg'] = BNET
    assert replace_norm_cfg(detector(), BNET) == expected


def test_the_input_is_not_changed_and_the_places_share_nothing():
    model, norm_cfg = detector(), dict(BNET)
    replaced = replace_norm_cfg(model, norm_cfg)
    replaced['backbone']['norm_cfg']['kernel_size'] = 7
    assert model == detector() and norm_cfg == BNET and replaced['bbox_head']['norm_cfg'] == BNET


def test_a_config_stays_a_config():
    replaced = replace_norm_cfg(ConfigDict(detector()), BNET)
    assert type(replaced) is ConfigDict and type(replaced.bbox_head.norm_cfg) is ConfigDict


def test_types_says_which_norms_go():
    replaced = replace_norm_cfg(detector(), BNET, types=('GN',))
    assert replaced['backbone'] == detector()['backbone'] and replaced['bbox_head']['norm_cfg'] == BNET


def test_norms_at_positions_are_replaced():
    model = dict(type='NormResNet', norm_at=dict(last=dict(type='GN'), norm2=[None, dict(type='AN'), dict(type='BN')]))
    replaced = replace_norm_cfg(model, BNET)
    assert replaced == dict(model, norm_cfg=BNET, norm_at=dict(last=BNET, norm2=[None, dict(type='AN'), BNET]))


def test_the_convolution_of_a_norm_goes_beside_it_where_it_has_a_place():
    model = dict(
        backbone=dict(type='Darknet'),
        neck=dict(type='NASFPN', norm_cfg=dict(type='BN')),  # takes no conv_cfg
        bbox_head=dict(type='FCOSHead', conv_cfg=dict(type='DCNv2')),  # has a kind of its own
    )
    replaced = replace_norm_cfg(model, dict(type='MABN'), conv_cfg=dict(type='CenConv'))
    assert all(part['norm_cfg'] == dict(type='MABN') for part in replaced.values())
    assert replaced['backbone']['conv_cfg'] == dict(type='CenConv')
    assert 'conv_cfg' not in replaced['neck'] and replaced['bbox_head']['conv_cfg'] == dict(type='DCNv2')
    # MABN's leaves with the norm, one that the config has beside another norm does not.
    again = replace_norm_cfg(replaced, dict(type='GN'), types=('MABN',))
    assert 'conv_cfg' not in again['backbone'] and again['bbox_head']['conv_cfg'] == dict(type='DCNv2')
    standardized = dict(type='ResNet', conv_cfg=dict(type='ConvWS'), norm_cfg=dict(type='GN', num_groups=32))
    assert replace_norm_cfg(standardized, BNET) == dict(standardized, norm_cfg=BNET)


@pytest.mark.parametrize(
    'model, there',
    [
        (dict(type='SSD', backbone=dict(type='SSDVGG')), 'has no norms, none of BN, SyncBN, GN'),
        (dict(type='X', head=dict(norm_cfg=dict(type='LN'))), 'has norms of type LN, none of BN, SyncBN, GN'),
        (dict(type='X', neck=dict(type='HRFPN', norm_cfg=dict(type='BN'))), 'has no norms'),  # builds without
    ],
)
def test_nothing_to_replace_is_an_error_that_says_what_is_there(model, there):
    before = copy.deepcopy(model)
    with pytest.raises(ValueError) as error:
        replace_norm_cfg(model, BNET)
    assert f"norm_cfg.type='BNET' has nothing to replace: model.type={model['type']!r} {there}" in str(error.value)
    assert model == before


@pytest.mark.parametrize('norm_cfg', ['BNET', None, dict(kernel_size=3)])
def test_a_norm_without_a_type_is_an_error(norm_cfg):
    with pytest.raises(ValueError, match=r"norm_cfg=.* must be a dict with a type, such as dict\(type='BNET'"):
        replace_norm_cfg(detector(), norm_cfg)


def test_an_argument_is_found_through_the_keyword_arguments_of_subclasses():
    head = Part(dict(type='PAAHead'))  # PAAHead(*args, **kwargs), of ATSSHead
    assert head.default('norm_cfg')['type'] == head.norm['type'] == 'GN'
    assert Part(dict(type='PAAHead', norm_cfg=None)).norm is None
    head = Part(dict(type='mmdet.FSAFHead'))
    assert head.takes('norm_cfg') and head.norm is None
    assert not any(Part(dict(type=kind)).takes('norm_cfg') for kind in ('RPNHead', 'HRFPN'))


def test_classes_of_other_packages_are_not_looked_up():
    assert class_of('mmpretrain.ResNet') is None and class_of('NoSuchClass') is None
    assert class_of('mmdet.ResNet') is class_of('ResNet') is class_of(class_of('ResNet'))
