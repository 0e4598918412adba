"""apply_norm: dicts in, dicts out."""

import copy

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from mmdet_norms import PLACEMENTS, apply_norm
from mmdet_norms.layers import BNET
from mmdet_norms.placement import VARIANTS

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
@pytest.mark.parametrize('backbone', VARIANTS)
def test_the_last_name_wins_on_every_backbone(backbone, first, second):
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


def test_every_variant_exists_and_is_one_of_its_stock_backbone():
    for stock, variant in VARIANTS.items():
        assert issubclass(MODELS.get(variant), MODELS.get(stock))


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


@pytest.mark.parametrize(
    'backbone, reason',
    [
        ('SwinTransformer', 'normalizes tokens with layer norm, not feature maps'),
        ('PyramidVisionTransformerV2', 'normalizes tokens with layer norm, not feature maps'),
        ('HourglassNet', 'keeps norm_cfg from its inner hourglass modules'),
        ('mmpretrain.ConvNeXt', 'is no backbone of mmdet'),
        ('mmpretrain.ResNet', 'is no backbone of mmdet'),
    ],
)
@pytest.mark.parametrize('name', ['bnet5', 'an', 'mabn', 'frozen'])
def test_a_backbone_of_another_kind_is_an_error_that_names_the_possible_ones(backbone, reason, name):
    with pytest.raises(ValueError) as error:
        apply_norm(detector(type=backbone), name)
    assert f'norm {name!r}: model.backbone.type={backbone!r} {reason}; use one of: ' in str(error.value)
    assert all(stock in str(error.value) for stock in VARIANTS)
    assert 'The names cbn, gn, syncbn leave the backbone alone' in str(error.value)


@pytest.mark.parametrize('backbone', ['SwinTransformer', 'mmpretrain.ConvNeXt'])
def test_a_name_for_neck_and_heads_leaves_any_backbone_alone(backbone):
    model = apply_norm(detector(type=backbone), 'gn')
    assert model['backbone'] == detector(type=backbone)['backbone']
    assert model['neck']['norm_cfg']['type'] == 'GN'


@MODELS.register_module()
class _OwnBackbone:
    def __init__(self, norm_cfg=dict(type='BN', eps=0.01), conv_cfg=None):  # noqa: B006  (as mmdet's do)
        pass


def own(**keys):
    return dict(type='RetinaNet', backbone=dict(type='_OwnBackbone', **keys), neck=dict(type='FPN'))


def test_an_own_backbone_takes_the_names_that_put_a_norm_everywhere_and_only_the_keys_that_it_has():
    assert apply_norm(own(), 'brn')['backbone'] == dict(type='_OwnBackbone', norm_cfg=dict(type='BRN', eps=0.01))
    assert apply_norm(own(), 'mabn')['backbone']['conv_cfg'] == dict(type='CenConv')
    assert apply_norm(own(), 'frozen')['backbone']['norm_cfg'] == dict(type='FrozenBN', eps=0.01)
    assert apply_norm(own(), 'bn') == own()


def test_an_own_backbone_without_known_blocks_is_told_how_to_have_the_norm_everywhere():
    with pytest.raises(ValueError) as error:
        apply_norm(own(), 'bnet5')
    assert "or put it at every norm by model.backbone.norm_cfg={'type': 'BNET', 'kernel_size': 5}" in str(error.value)


@pytest.mark.parametrize(
    'backbone, expected',
    [
        (dict(type='CSPDarknet'), [10, 10, 20, 20]),
        (dict(type='CSPNeXt', arch='P6'), [10, 10, 20, 20, 20]),
        (dict(type='Darknet'), [10, 10, 10, 20, 20]),
        (dict(type='MobileNetV2'), [10, 10, 10, 20, 20, 20, 20]),
        (dict(type='EfficientNet', out_indices=(2, 3, 4)), [10, 10, 10, 20]),
        (dict(type='TridentResNet', num_stages=3), [10, 10, 20]),
    ],
)
def test_an_has_ten_components_up_to_stride_8_and_twenty_beyond(backbone, expected):
    placed = apply_norm(dict(type='RetinaNet', backbone=backbone, neck=dict(type='FPN')), 'an')['backbone']
    assert [norm['k'] for norm in placed['norm_at']['norm2']] == expected


def test_eps_and_momentum_of_the_backbones_batch_norm_are_kept_where_they_mean_the_same():
    stock = dict(type='YOLOX', backbone=dict(type='CSPDarknet'), neck=dict(type='YOLOXPAFPN'))  # eps by default
    numbers = dict(eps=0.001, momentum=0.03)
    assert apply_norm(stock, 'bnet5')['backbone']['norm_at']['last'] == dict(type='BNET', kernel_size=5, **numbers)
    assert apply_norm(stock, 'an')['backbone']['norm_at']['norm2'][0] == dict(type='AN', norm='BN', k=10, **numbers)
    assert apply_norm(stock, 'frozen')['backbone']['norm_cfg'] == dict(type='FrozenBN', eps=0.001)
    assert apply_norm(stock, 'sn')['backbone']['norm_cfg'] == dict(type='SN', **numbers)
    assert apply_norm(stock, 'cbn')['neck']['norm_cfg']['eps'] == 0.001
    assert apply_norm(stock, 'syncbn')['neck']['norm_cfg'] == dict(type='SyncBN', requires_grad=True, **numbers)
    assert 'eps' not in apply_norm(stock, 'mabn')['backbone']['norm_cfg']
    assert apply_norm(apply_norm(stock, 'mabn'), 'bn')['backbone']['norm_cfg'] == dict(type='BN', **numbers)


def test_an_eps_of_zero_is_not_handed_on_to_norms_that_refuse_it():
    model = detector(norm_cfg=dict(type='BN', requires_grad=False, eps=0))
    assert apply_norm(model, 'bnet5')['backbone']['norm_at']['last'] == dict(type='BNET', kernel_size=5)


def test_nothing_is_frozen_by_the_value_that_the_backbone_has_for_it():
    stock = dict(type='RetinaNet', backbone=dict(type='EfficientNet', frozen_stages=2), neck=dict(type='FPN'))
    assert apply_norm(stock, 'brn')['backbone']['frozen_stages'] == 0
    assert apply_norm(detector(), 'brn')['backbone']['frozen_stages'] == -1
    stock = dict(type='FCOS', backbone=dict(type='HRNet', extra={}), neck=dict(type='FPN'))
    assert 'frozen_stages' not in apply_norm(stock, 'brn')['backbone']


def test_the_backbone_inside_a_recursive_pyramid_is_one_too():
    inner = dict(type='DetectoRS_ResNet', depth=50)
    model = dict(type='CascadeRCNN', backbone=inner, neck=dict(type='RFP', rfp_steps=2, rfp_backbone=dict(inner)))
    placed = apply_norm(model, 'bnet3')
    assert placed['backbone'] == placed['neck']['rfp_backbone']
    assert placed['backbone'] == dict(inner, type='NormDetectoRS_ResNet', norm_at=placed['backbone']['norm_at'])
    assert apply_norm(placed, 'bn') == model
    with_gn = apply_norm(model, 'gn')['neck']
    assert with_gn['norm_cfg']['type'] == 'GN' and with_gn['rfp_backbone'] == inner


def test_aognet_has_its_own_places_for_an_and_none_for_bnet():
    stock = dict(type='MaskRCNN', backbone=dict(type='AOGNet', arch='12m'), neck=dict(type='FPN'))
    attentive = apply_norm(stock, 'an')
    assert attentive['backbone'] == dict(type='AOGNet', arch='12m', norm='AN')
    assert apply_norm(attentive, 'bn')['backbone'] == dict(type='AOGNet', arch='12m', norm='BN')
    assert apply_norm(attentive, 'mabn')['backbone']['norm'] == 'BN'
    with pytest.raises(ValueError, match=r"model\.backbone\.type='AOGNet' has no blocks with batch norm that it"):
        apply_norm(stock, 'bnet5')


def test_in_semi_supervised_and_tracking_models_the_inner_detector_gets_the_norm():
    model = apply_norm(dict(type='SoftTeacher', detector=detector()), 'bnet5')
    assert model == dict(type='SoftTeacher', detector=apply_norm(detector(), 'bnet5'))


def test_a_teacher_and_the_rpn_keep_their_norms():
    keys = dict(type='LADHead', norm_cfg=dict(type='GN', num_groups=32))
    model = detector() | dict(bbox_head=dict(keys), teacher_bbox_head=dict(keys), rpn_head=dict(keys))
    placed = apply_norm(model, 'syncbn')
    assert placed['bbox_head']['norm_cfg']['type'] == 'SyncBN'
    assert placed['teacher_bbox_head'] == placed['rpn_head'] == keys


def test_norms_of_a_heads_inner_module_are_replaced():
    inner = dict(feat_channels=128, norm_cfg=dict(type='GN', num_groups=32))
    head = dict(type='SOLOV2Head', mask_feature_head=inner, dcn_cfg=None)
    placed = apply_norm(detector() | dict(mask_head=head), 'cbn')['mask_head']
    assert placed['norm_cfg']['type'] == placed['mask_feature_head']['norm_cfg']['type'] == 'CBN'


@pytest.mark.parametrize(
    'name, part, warning',
    [
        ('gn', dict(bbox_head=dict(type='RetinaHead')), r'model\.bbox_head \(RetinaHead has no norm to replace\)'),
        ('gn', dict(bbox_head=dict(type='DETRHead')), r'model\.bbox_head \(DETRHead takes no norm_cfg\)'),
        (
            'cbn',
            dict(bbox_head=dict(type='TOODHead')),
            'normalizes the output of a product of matrices, and CBN needs an ordinary convolution',
        ),
        ('cbn', dict(bbox_head=dict(type='DDODHead')), r'output of deformable convolutions \(use_dcn\), and CBN'),
        ('cbn', dict(bbox_head=dict(type='NASFCOSHead')), r'output of deformable convolutions, and CBN'),
        (
            'mabn',
            dict(bbox_head=dict(type='FCOSHead', dcn_on_last_conv=True)),
            r'output of deformable convolutions \(dcn_on_last_conv\), and MABN',
        ),
        ('mabn', dict(mask_head=dict(type='SOLOHead')), r"takes no conv_cfg, which MABN's centred convolutions need"),
        (
            'gn-ws',
            dict(mask_head=dict(type='SOLOHead')),
            'takes no conv_cfg, which weight-standardized convolutions need',
        ),
        (
            'mabn',
            dict(bbox_head=dict(type='FCOSHead', conv_cfg=dict(type='DCNv2'))),
            r"output of conv_cfg=\{'type': 'DCNv2'\}, and MABN needs",
        ),
    ],
)
def test_a_part_that_stays_without_the_norm_is_unchanged_and_named_with_the_reason(name, part, warning):
    with pytest.warns(UserWarning, match=f'norm {name!r}: stays without it: .*{warning}'):
        placed = apply_norm(detector() | part, name)
    key = next(iter(part))
    assert placed[key] == part[key]


def test_a_model_with_no_place_in_neck_and_heads_is_told_the_names_for_the_backbone():
    model = dict(type='CenterNet', backbone=dict(type='ResNet', depth=18), neck=dict(type='CTResNetNeck'))
    with pytest.raises(ValueError, match=r'neck \(CTResNetNeck takes no norm_cfg\)\. Use a name .* backbone: bn,'):
        apply_norm(model, 'gn')


def test_mabn_is_refused_on_a_backbone_with_deformable_convolutions_which_cannot_be_centred():
    dcn = dict(dcn=dict(type='DCNv2', deform_groups=1), stage_with_dcn=(False, True, True, True))
    with pytest.raises(ValueError, match=r'backbone.* the output of deformable convolutions \(dcn\), and MABN'):
        apply_norm(detector(**dcn), 'mabn')
    assert apply_norm(detector(**dcn), 'brn')['backbone']['norm_cfg']['type'] == 'BRN'
