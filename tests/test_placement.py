"""apply_norm: dicts in, dicts out."""

import copy

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from mmdet_norms import PLACEMENTS, apply_norm
from mmdet_norms.layers import BNET
from mmdet_norms.placement import HOSTS

IN_BACKBONE = ('bn', 'bnet3', 'bnet5', 'bnet7', 'an')  # these leave neck and heads alone


def detector(**backbone):
    backbone = dict(type='ResNet', depth=50, norm_cfg=dict(type='BN', requires_grad=True), frozen_stages=1) | backbone
    return dict(type='FasterRCNN', backbone=backbone, neck=dict(type='FPN', out_channels=256))


@pytest.mark.parametrize('kernel_size', [3, 5, 7])
def test_bnet_goes_to_the_last_norm_of_every_block_and_nothing_else_changes(kernel_size):
    model = apply_norm(detector(), f'bnet{kernel_size}')
    expected = detector(type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=kernel_size)))
    assert model == expected


@pytest.mark.parametrize('name', PLACEMENTS)
def test_the_input_is_not_changed(name):
    model = detector(norm_cfg=dict(type='GN', num_groups=32))
    before = copy.deepcopy(model)
    result = apply_norm(model, name)
    assert model == before
    result['backbone']['norm_cfg']['type'] = result['neck']['type'] = 'changed'
    assert model == before


def test_results_share_nothing_with_the_table():
    apply_norm(detector(), 'bnet5')['backbone']['norm_at']['last']['kernel_size'] = 9
    assert apply_norm(detector(), 'bnet5')['backbone']['norm_at']['last']['kernel_size'] == 5


@pytest.mark.parametrize('name', PLACEMENTS)
def test_a_dict_stays_a_dict_and_a_config_stays_a_config(name):
    assert type(apply_norm(detector(), name)) is dict
    model = apply_norm(ConfigDict(detector()), name)
    assert type(model) is ConfigDict and type(model.backbone) is ConfigDict
    assert model == apply_norm(detector(), name)


def test_what_was_put_in_can_be_refined_by_config_options():
    cfg = Config(dict(model=detector()))
    cfg.model = apply_norm(cfg.model, 'bnet5')
    cfg.merge_from_dict({'model.backbone.norm_at.last.kernel_size': 9})
    assert cfg.model.backbone.norm_at.last == dict(type='BNET', kernel_size=9)


@pytest.mark.parametrize('name', PLACEMENTS)
def test_applying_a_name_twice_is_applying_it_once(name):
    once = apply_norm(detector(), name)
    assert apply_norm(once, name) == once


@pytest.mark.parametrize('first', IN_BACKBONE)
@pytest.mark.parametrize('second', IN_BACKBONE)
@pytest.mark.parametrize('backbone', HOSTS)
def test_the_last_name_wins_on_every_host(backbone, first, second):
    model = detector(type=backbone)
    assert apply_norm(apply_norm(model, first), second) == apply_norm(model, second)


def test_bn_gives_the_stock_config_back():
    assert apply_norm(apply_norm(detector(), 'bnet5'), 'bn') == detector()
    assert apply_norm(detector(), 'bn') == detector()


def test_a_norm_that_was_written_by_hand_is_replaced():
    by_hand = detector(type='NormResNet', norm_at=dict(stem=dict(type='GN', num_groups=4), norm2=dict(type='BN')))
    assert apply_norm(by_hand, 'bnet3') == apply_norm(detector(), 'bnet3')
    assert apply_norm(by_hand, 'bn') == detector()


@pytest.mark.parametrize('name', ['bn', 'bnet5'])
def test_group_norm_in_the_backbone_becomes_batch_norm_with_statistics_to_learn(name):
    model = detector(norm_cfg=dict(type='GN', num_groups=32, requires_grad=True), norm_eval=True, frozen_stages=1)
    with pytest.warns(UserWarning, match='GN, whose pretrained weights hold no running statistics'):
        result = apply_norm(model, name)
    assert result == apply_norm(detector(norm_eval=False, frozen_stages=-1), name)


@pytest.mark.parametrize('norm_cfg', [dict(type='SyncBN', requires_grad=True), dict(type='BN', requires_grad=False)])
def test_kinds_of_batch_norm_stay_as_they_are(norm_cfg):
    assert apply_norm(detector(norm_cfg=norm_cfg), 'bnet5')['backbone']['norm_cfg'] == norm_cfg


def test_a_backbone_that_leaves_its_norm_to_the_default_is_fine():
    model = detector()
    del model['backbone']['norm_cfg']
    assert 'norm_cfg' not in apply_norm(model, 'bnet5')['backbone']
    assert apply_norm(apply_norm(model, 'bnet5'), 'bn') == model


def test_a_type_with_its_scope_is_understood():
    assert apply_norm(detector(type='mmdet.ResNet'), 'bnet5') == apply_norm(detector(), 'bnet5')


def test_a_new_style_config_with_the_class_as_its_type_is_understood(tmp_path):
    file = tmp_path / 'lazy.py'
    file.write_text(
        'from mmdet.models.backbones import ResNet\n'
        'from mmdet.models.detectors import RetinaNet\n'
        'model = dict(type=RetinaNet, backbone=dict(type=ResNet, depth=50, base_channels=4))\n'
    )
    model = Config.fromfile(file, lazy_import=True).model
    assert model.backbone.type is MODELS.get('ResNet')
    assert apply_norm(model, 'bn') == model
    backbone = apply_norm(model, 'bnet5').backbone
    assert backbone.type == 'NormResNet' and backbone.base_channels == 4
    init_default_scope('mmdet')
    assert sum(isinstance(m, BNET) for m in MODELS.build(backbone).modules()) == 16


def test_every_host_of_the_table_exists_and_is_a_twin_of_the_stock_one():
    for stock, ours in HOSTS.items():
        assert issubclass(MODELS.get(ours), MODELS.get(stock))


@pytest.mark.parametrize(
    'name, suggestion', [('bnet-5', 'bnet5'), ('BNET5', 'bnet5'), ('bnett3', 'bnet3'), ('bnn', 'bn')]
)
def test_a_misspelt_name_is_told_the_closest_and_all_names(name, suggestion):
    with pytest.raises(ValueError) as error:
        apply_norm(detector(), name)
    assert repr(name) in str(error.value) and f'did you mean {suggestion!r}?' in str(error.value)
    assert all(choice in str(error.value) for choice in PLACEMENTS)


def test_a_name_that_resembles_nothing_is_told_all_names():
    with pytest.raises(ValueError, match=r"norm 'xyz' is unknown; choose one of: bn, bnet3, bnet5, bnet7"):
        apply_norm(detector(), 'xyz')


@pytest.mark.parametrize('backbone', [None, 'ResNet', dict(depth=50)])
def test_a_model_without_a_backbone_to_put_norms_in_is_an_error(backbone):
    with pytest.raises(ValueError, match=r"norm 'bnet5' sits in the backbone, but model\.backbone of 'RetinaNet'"):
        apply_norm(dict(type='RetinaNet', backbone=backbone), 'bnet5')
    with pytest.raises(ValueError, match='None'):
        apply_norm(dict(type='RetinaNet'), 'bnet5')


@pytest.mark.parametrize('backbone', ['SwinTransformer', 'HRNet', 'mmpretrain.ConvNeXt'])
def test_a_backbone_of_another_kind_is_an_error_that_names_the_possible_ones(backbone):
    with pytest.raises(ValueError) as error:
        apply_norm(detector(type=backbone), 'bnet5')
    assert f'model.backbone.type={backbone.rpartition(".")[2]!r}' in str(error.value)
    assert all(host in str(error.value) for host in HOSTS)
