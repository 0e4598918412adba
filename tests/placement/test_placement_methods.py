"""Where the methods beyond BNET sit: built, counted and trained for a step."""

import copy

import pytest
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope

from helpers.meta import on_meta
from helpers.python_style import CONFIGS
from mmdet_norms import layers
from mmdet_norms.placement import PLACEMENTS, apply_norm

MASK_RCNN = 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
PARTS = ('backbone', 'neck', 'roi_head.bbox_head', 'roi_head.mask_head', 'rpn_head')


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """Model configs of stock mmdet by path, without pretrained weights."""

    def load(path):
        file = tmp_path_factory.mktemp('stock') / 'config.py'
        file.write_text(f"_base_ = 'mmdet::{path}'\n")
        model = Config.fromfile(file).model
        model.backbone.init_cfg = None
        return model

    return load


def build(model_cfg):
    with DefaultScope.overwrite_default_scope('mmdet'), on_meta():
        return MODELS.build(copy.deepcopy(model_cfg))


def count(model, kind):
    """Layers of a kind in each part of the detector."""
    return tuple(sum(isinstance(m, kind) for m in model.get_submodule(part).modules()) for part in PARTS)


@pytest.mark.parametrize(
    'name, kind, expected',
    [
        ('cbn', layers.CBN, (0, 8, 4, 4, 0)),
        ('gn', layers.GN, (0, 8, 4, 4, 0)),
        ('syncbn', layers.SyncBN, (0, 8, 4, 4, 0)),
        ('mabn', layers.MABN, (53, 8, 4, 4, 0)),
        ('mabn', layers.CenConv2d, (53, 8, 4, 4, 0)),
        ('gn-ws', layers.GN, (53, 8, 4, 4, 0)),
        ('gn-ws', ConvWS2d, (53, 8, 4, 4, 0)),
        ('brn', layers.BRN, (53, 8, 4, 4, 0)),
        ('sn', layers.SN, (53, 8, 4, 4, 0)),
        ('rbn', layers.RBN, (53, 8, 4, 4, 0)),
        ('bin', layers.BIN, (53, 8, 4, 4, 0)),
        ('an', layers.AN, (16, 0, 0, 0, 0)),
        ('an-gn-head', layers.AN, (16, 0, 4, 0, 0)),
        ('an-gn-head', layers.GN, (0, 8, 0, 4, 0)),
        ('frozen', layers.FrozenBN, (53, 0, 0, 0, 0)),
        ('bnet5', layers.BNET, (16, 0, 0, 0, 0)),
    ],
)
def test_each_name_puts_its_layers_where_its_paper_does(stock, name, kind, expected):
    assert count(build(apply_norm(stock(MASK_RCNN), name)), kind) == expected


def test_an_has_more_components_in_the_later_stages_and_convolutions(stock):
    model = build(apply_norm(stock(MASK_RCNN), 'an-gn-head'))
    stages = [getattr(model.backbone, name)[0].norm2 for name in model.backbone.res_layers]
    convs = [conv.norm for conv in model.roi_head.bbox_head.shared_convs]
    assert [len(norm.weight_) for norm in stages] == [len(norm.weight_) for norm in convs] == [10, 10, 20, 20]


@pytest.mark.parametrize('name, params', [('an', 23_706_420), ('bn', 23_508_032)])
def test_the_backbone_has_the_published_number_of_parameters(stock, name, params):
    assert sum(p.numel() for p in build(apply_norm(stock(MASK_RCNN), name)).backbone.parameters()) == params


@pytest.mark.parametrize('name', list(PLACEMENTS))
@pytest.mark.parametrize('other', ['mabn', 'gn-ws', 'an-gn-head', 'frozen', 'sn'])
def test_norms_of_another_name_are_gone_from_the_backbone(stock, name, other):
    both = (apply_norm(model, name) for model in (apply_norm(stock(MASK_RCNN), other), stock(MASK_RCNN)))
    twice, once = (build(model.backbone) for model in both)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]


@pytest.mark.parametrize('kind', ['faster', 'mask'])
def test_gn_ws_is_what_mmdets_own_configs_have_but_for_pretrained_weights(kind):
    own = Config.fromfile(next((CONFIGS / 'gn+ws').glob(f'{kind}-rcnn_r50_fpn_gn-ws-all_[12]x_coco.py'))).model
    placed = apply_norm(Config.fromfile(CONFIGS / f'{kind}_rcnn' / f'{kind}-rcnn_r50_fpn_1x_coco.py').model, 'gn-ws')
    assert (placed.backbone.frozen_stages, placed.backbone.norm_eval) == (-1, False)
    for key in ('frozen_stages', 'norm_eval', 'init_cfg'):
        del placed.backbone[key], own.backbone[key]
    assert placed == own


@pytest.mark.parametrize('name', ['gn', 'cbn', 'brn', 'mabn'])
def test_convolutions_of_a_name_go_with_it_from_neck_and_heads_too(stock, name):
    twice, once = (build(apply_norm(m, name)) for m in (apply_norm(stock(MASK_RCNN), 'gn-ws'), stock(MASK_RCNN)))
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]


@pytest.mark.parametrize('path, heads', [('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', 3)])
def test_every_head_of_a_cascade_gets_its_layers(stock, path, heads):
    model = build(apply_norm(stock(path), 'gn'))
    assert count(model, layers.GN)[1:4] == (8, 4 * heads, 4 * heads)


def test_a_detector_without_roi_heads_gets_the_necks_part(stock):
    model = build(apply_norm(stock('retinanet/retinanet_r50_fpn_1x_coco.py'), 'cbn'))
    assert sum(isinstance(m, layers.CBN) for m in model.neck.modules()) == 8  # two extra levels, no C2
    assert not any(isinstance(m, layers.CBN) for m in model.bbox_head.modules())


def test_a_model_with_none_of_the_places_is_refused(stock):
    with pytest.raises(ValueError, match='sits in FPN, box and mask head, but the model has none'):
        apply_norm(stock('faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py'), 'gn')
