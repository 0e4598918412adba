"""Checkpoints in the published layouts, written by hand-built networks, converted and computed with."""

import argparse
import copy
import json
import os
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

import mmdet_norms
from helpers import published_networks as published
from helpers.meta import on_meta
from helpers.published_networks import BENCHMARK, CLASSES, MMDET_1, MMDET_2, NECK, Detector
from mmdet_norms import apply_norm
from mmdet_norms.checkpoints import LAYOUTS, ConversionError, UntrustedCheckpointError, convert
from mmdet_norms.reference import ReferenceAN, ReferenceBNET, ReferenceCBN, ReferenceCenConv2d, ReferenceMABN

ROOT = Path(__file__).resolve().parents[2]
GN = partial(nn.GroupNorm, 4)


# --- the published networks, and the model dicts that they become --------------------------------------------------


def bnet(**size):
    norm = {3: partial(ReferenceBNET, kernel_size=5)}
    return Detector(MMDET_2, lambda at, stage: norm.get(at, nn.BatchNorm2d), box_norms=None, norm3='bnet3', **size)


def cbn(head_norm, abbr='bn', **size):
    return Detector(MMDET_1, head_norm=head_norm, box_norms=(head_norm,) * 4, abbr=lambda norm: abbr, **size)


def mabn(**size):
    norm = ReferenceMABN
    return Detector(BENCHMARK, lambda at, stage: norm, norm, (norm,) * 4, caffe=True, conv=ReferenceCenConv2d, **size)


def benchmark_bn():
    return Detector(BENCHMARK, head_norm=nn.BatchNorm2d, box_norms=(nn.BatchNorm2d,) * 4, caffe=True, stem_bias=True)


def an(with_head, **size):
    def backbone_norm(at, stage):
        return partial(ReferenceAN, k=(10, 10, 20, 20)[stage]) if at == 2 else nn.BatchNorm2d

    if not with_head:
        return Detector(MMDET_1, backbone_norm, **size)
    box_norms = [partial(ReferenceAN, norm='GN', k=k, num_groups=4) for k in (10, 10, 20, 20)]
    return Detector(MMDET_1, backbone_norm, GN, box_norms, abbr=lambda norm: 'gn' if norm is GN else 'agn', **size)


@cache
def stock(path):
    return Config.fromstring(f'_base_ = {f"mmdet::{path}"!r}', '.py')


def target(norm, box_head=None, detector='mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', **backbone):
    """A stock Mask R-CNN with a named choice of norms, as small as the published networks here."""
    model = apply_norm(copy.deepcopy(stock(detector).model), norm)
    model.backbone.update(base_channels=published.WIDTH, init_cfg=None, **backbone)
    model.neck.update(in_channels=[32, 64, 128, 256], out_channels=NECK)
    model.rpn_head.update(in_channels=NECK, feat_channels=NECK)
    heads = model.roi_head.bbox_head if isinstance(model.roi_head.bbox_head, list) else [model.roi_head.bbox_head]
    for head in heads:
        head.update(in_channels=NECK, fc_out_channels=published.FC, num_classes=CLASSES)
        if box_head:
            head.type = box_head
        if 'Conv' in head.type:
            head.conv_out_channels = NECK
    model.roi_head.mask_head.update(in_channels=NECK, conv_out_channels=NECK, num_classes=CLASSES)
    for part in (model.neck, *heads, model.roi_head.mask_head):
        norms = part.get('norm_cfg') or []
        for cfg in norms if isinstance(norms, list) else [norms]:
            if cfg.type in ('GN', 'AN'):
                cfg.num_groups = 4
    return model


FOUR_CONVS = 'Shared4Conv1FCBBoxHead'
CASES = {
    'bnet': (bnet, lambda: target('bnet5')),
    'cbn': (lambda: cbn(ReferenceCBN), lambda: target('cbn')),
    'cbn-gn': (lambda: cbn(GN, 'gn'), lambda: target('gn')),
    'cbn-syncbn': (lambda: cbn(nn.BatchNorm2d), lambda: target('syncbn')),
    'cbn-none': (lambda: cbn(None), lambda: target('bn', FOUR_CONVS)),
    'mabn': (mabn, lambda: target('mabn', style='caffe')),
    'mabn-syncbn': (benchmark_bn, lambda: target('syncbn', style='caffe')),
    'an': (lambda: an(False), lambda: target('an', FOUR_CONVS)),
    'an-attn_gn': (lambda: an(True), lambda: target('an-gn-head')),
}


def packed(layout, state):
    """As the authors' trainers save: the model under its entry, and what else they put into the file."""
    other = dict(optimizer=dict(state={0: dict(momentum_buffer=torch.zeros(3))}, param_groups=[dict(lr=0.02)]))
    if layout == 'mabn':
        wrapped = {f'module.{key}': value for key, value in state.items()}
        return dict(model=wrapped, scheduler=dict(last_epoch=9), iteration=9, **other)
    meta = dict(mmdet_version='0.6.rc0', config='model = dict()', CLASSES=('cat', 'dog', 'cow'), epoch=12)
    return dict(meta=meta, state_dict=state, **other)


def built(model_cfg):
    init_default_scope('mmdet')
    return MODELS.build(copy.deepcopy(model_cfg))


def roi_parts(model):
    return model.roi_head.bbox_head, model.roi_head.mask_head


@pytest.mark.parametrize('case', CASES)
def test_a_converted_detector_computes_what_the_published_one_does(case, tmp_path):
    make, model_cfg = CASES[case]
    layout, theirs, model_cfg = case.split('-')[0], make(), model_cfg()
    torch.save(packed(layout, theirs.state_dict()), tmp_path / 'published.pth')

    converted = convert(tmp_path / 'published.pth', layout, model_cfg)
    converted.save(tmp_path / 'converted.pth')

    ours = built(model_cfg)
    load_checkpoint(ours, str(tmp_path / 'converted.pth'), strict=True, logger='silent')  # as tools/test.py does
    assert converted.report.verified and converted.report.kind == 'detector'
    ours.double().eval(), theirs.double()
    generator = torch.Generator().manual_seed(1)
    image, box_rois, mask_rois = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 64, 64), (5, NECK, 7, 7), (3, NECK, 14, 14))
    )
    with torch.no_grad():
        maps = theirs.neck(theirs.backbone(image))
        pairs = list(zip(theirs.backbone(image), ours.backbone(image))) + list(zip(maps, ours.extract_feat(image)))
        pairs += [pair for both in zip(theirs.rpn(maps), ours.rpn_head(maps)) for pair in zip(*both)]
        box_head, mask_head = roi_parts(ours)
        (classes, boxes), masks = theirs.box_head(box_rois), theirs.mask_head(mask_rois)
        if layout != 'bnet':  # the background was class 0
            classes, boxes, masks = classes[:, [1, 2, 3, 0]], boxes[:, 4:], masks[:, 1:]
        pairs += [(classes, box_head(box_rois)[0]), (boxes, box_head(box_rois)[1]), (masks, mask_head(mask_rois))]
    assert len(pairs) == 4 + 5 + 5 + 5 + 3
    for published_output, output in pairs:
        assert published_output.abs().max() > 0.01  # alive
        # Folding a bias into an fp32 running mean rounds once.
        torch.testing.assert_close(output, published_output, rtol=1e-6, atol=1e-7 if 'syncbn' in case else 1e-9)


def no_memory(state):
    """Tensors of those names, shapes and kinds with a single value behind them."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}


def aognet_state(config):
    """A detector of mmdet 1.x by an inverse of the names that is written out here."""
    state = {}
    for key, value in built_on_meta(config).state_dict().items():
        rows = list(value.shape[1:])
        if 'shared_convs' in key:
            key = key.replace('.bn.', '.agn.')
        elif 'fc_reg' in key:
            value = torch.empty(len(value) + 4, *rows, device='meta')
        elif 'conv_logits' in key:
            value = torch.empty(len(value) + 1, *rows, device='meta')
        state[key.removeprefix('roi_head.')] = value
    return state


def built_on_meta(config):
    with on_meta():
        return built(Config.fromfile(config).model)


ROUND_TRIPS = {
    'bnet': (bnet, 'bnet/mask-rcnn_r50_fpn_bnet5_1x_coco.py'),
    'cbn': (partial(cbn, ReferenceCBN), 'cbn/mask-rcnn_r50_fpn_cbn_1x_coco.py'),
    'mabn': (mabn, 'mabn/mask-rcnn_r50_fpn_mabn_180k_coco.py'),
    'an': (partial(an, True), 'an/mask-rcnn_r50_fpn_an-gn-head_2x_coco.py'),
    'aognet': (None, 'an/mask-rcnn_aognet-12m_fpn_an-gn-head_2x_coco.py'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_full_size_file_of_each_layout_fits_the_config_of_its_row(layout):
    make, config = ROUND_TRIPS[layout]
    config = ROOT / 'configs' / config
    if make is None:
        state = aognet_state(config)
    else:
        with on_meta():
            state = make(**published.FULL_SIZE).state_dict()
    converted = convert(packed(layout, no_memory(state)), layout, config)
    assert converted.report.verified and converted.report.warnings == []
    expected = built_on_meta(config).state_dict()
    assert {key: value.shape for key, value in converted.state_dict.items()} == {
        key: value.shape for key, value in expected.items()
    }
    counters = {key.rpartition('.')[2] for key in converted.report.initialised}
    assert counters == ({'iter_count'} if layout == 'cbn' else set())


# --- classes -------------------------------------------------------------------------------------------------------


def v1_heads(rows, boxes=None, masks=None, stage=''):
    """Heads of the v1 layout, each row filled with its own number: class k of fc_cls with k, its boxes 4k..4k+3."""
    boxes, masks = 4 * rows if boxes is None else boxes, rows if masks is None else masks
    numbers = {'bbox_head.{}fc_cls': rows, 'bbox_head.{}fc_reg': boxes, 'mask_head.{}conv_logits': masks}
    state = {}
    for name, count in numbers.items():
        values = torch.arange(count, dtype=torch.float32)
        extra = (2, 1, 1) if 'mask' in name else (2,)
        state[name.format(stage) + '.weight'] = values.view(-1, *[1] * len(extra)).expand(count, *extra).clone()
        state[name.format(stage) + '.bias'] = values + 0.5
    return state


@pytest.mark.parametrize('source', ['cbn', 'an', 'aognet'])
@pytest.mark.parametrize('classes', [1, 3, 80])
def test_the_background_moves_from_first_to_last_in_weights_and_biases(source, classes):
    state = v1_heads(classes + 1) | {'rpn_head.rpn_cls.bias': torch.arange(3.0)}
    before = copy.deepcopy(state)
    new = convert(state, source).state_dict
    order = [*range(1, classes + 1), 0]
    for name, rows in (
        ('bbox_head.fc_cls', order),
        ('bbox_head.fc_reg', range(4, 4 * classes + 4)),
        ('mask_head.conv_logits', range(1, classes + 1)),
    ):
        assert new[f'roi_head.{name}.weight'].flatten(1)[:, 0].tolist() == list(rows)
        assert new[f'roi_head.{name}.bias'].tolist() == [row + 0.5 for row in rows]
    assert new['rpn_head.rpn_cls.bias'].tolist() == [0, 1, 2]
    assert all(torch.equal(state[key], before[key]) for key in before)  # what was given stays as it is
    # no dropped row hides in the storage that is saved
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in new.values())


def test_mabns_names_get_the_same_order():
    names = dict(zip(v1_heads(1), (
        'roi_heads.box.predictor.cls_score.weight', 'roi_heads.box.predictor.cls_score.bias',
        'roi_heads.box.predictor.bbox_pred.weight', 'roi_heads.box.predictor.bbox_pred.bias',
        'roi_heads.mask.predictor.mask_fcn_logits.weight', 'roi_heads.mask.predictor.mask_fcn_logits.bias',
    )))  # fmt: skip
    new = convert({names[key]: value for key, value in v1_heads(4).items()}, 'mabn').state_dict
    assert new['roi_head.bbox_head.fc_cls.bias'].tolist() == [1.5, 2.5, 3.5, 0.5]
    assert new['roi_head.bbox_head.fc_reg.bias'].tolist() == [row + 0.5 for row in range(4, 16)]
    assert new['roi_head.mask_head.conv_logits.weight'].flatten(1)[:, 0].tolist() == [1, 2, 3]


def test_bnets_classes_are_in_order_already():
    state = {f'roi_head.{key}': value for key, value in v1_heads(4, boxes=12, masks=3).items()}
    new = convert(state, 'bnet')
    assert all(torch.equal(new.state_dict[key], state[key]) for key in state)
    assert new.report.unchanged == len(state) and not new.report.reordered


def test_the_stages_of_a_cascade_are_reordered_and_class_agnostic_boxes_kept():
    state = {}
    for stage in ('0.', '1.', '2.'):
        state |= v1_heads(4, boxes=4, stage=stage)
    converted = convert(state, 'an')
    for stage in range(3):
        head = f'roi_head.bbox_head.{stage}.'
        assert converted.state_dict[head + 'fc_cls.bias'].tolist() == [1.5, 2.5, 3.5, 0.5]
        assert converted.state_dict[head + 'fc_reg.bias'].tolist() == [0.5, 1.5, 2.5, 3.5]
        assert converted.state_dict[f'roi_head.mask_head.{stage}.conv_logits.bias'].tolist() == [1.5, 2.5, 3.5]
    assert sum('class-agnostic' in note for note in converted.report.notes) == 6


@pytest.mark.parametrize('boxes, masks', [(12, 4), (16, 3), (1, 4)])
def test_rows_that_fit_no_number_of_classes_are_an_error(boxes, masks):
    with pytest.raises(ConversionError, match='rows'):
        convert(v1_heads(4, boxes=boxes, masks=masks), 'cbn')


def test_a_converted_cascade_fits_its_config():
    """Keys of mmdet 1.x by an inverse written out here: heads beside the RPN, background first."""
    path = 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'
    model_cfg = target('an', detector=path)
    ours = built(model_cfg).state_dict()
    state = {}
    for key, value in ours.items():
        old = key.replace('roi_head.', '')
        if 'fc_cls' in key:
            value = torch.cat([value[-1:], value[:-1]])
        elif 'conv_logits' in key:
            value = torch.cat([torch.full_like(value[:1], 7), value])
        state[old] = value
    converted = convert(dict(state_dict=state), 'an', model_cfg)
    assert converted.report.verified and list(converted.report.initialised) == []
    assert all(torch.equal(value, ours[key]) for key, value in converted.state_dict.items())


def test_a_retinanet_with_bnet_converts_to_itself():
    model_cfg = apply_norm(copy.deepcopy(stock('retinanet/retinanet_r50_fpn_1x_coco.py').model), 'bnet3')
    model_cfg.backbone.base_channels = 8
    model_cfg.neck.update(in_channels=[32, 64, 128, 256], out_channels=16)
    model_cfg.bbox_head.update(in_channels=16, feat_channels=16, num_classes=3)
    state = built(model_cfg).state_dict()
    converted = convert(dict(state_dict=state, meta={}), 'bnet', model_cfg)
    assert converted.report.unchanged == len(state) == len(converted.state_dict)


# --- backbones -----------------------------------------------------------------------------------------------------


def backbone_of(detector, prefix):
    return {k[len(prefix):]: v for k, v in detector.state_dict().items() if k.startswith(prefix)}  # fmt: skip


def load_pretrained(model_cfg, checkpoint):
    """The backbone of a config, as training would start it."""
    return built(dict(model_cfg.backbone, init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint))))


def features(backbone):
    if isinstance(backbone, nn.Module):
        backbone.double().eval()  # mmdet's returns None
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        return backbone(x)


def assert_same_features(model_cfg, checkpoint, theirs, atol=1e-9):
    backbone = load_pretrained(model_cfg, checkpoint)
    backbone.init_weights()
    for output, published_output in zip(features(backbone), features(theirs.double().backbone)):
        torch.testing.assert_close(output, published_output, rtol=1e-6, atol=atol)


CLASSIFIER = {'fc.weight': torch.ones(10, 256), 'fc.bias': torch.ones(10)}


def test_bnets_imagenet_model_initialises_a_backbone(tmp_path):
    theirs, model_cfg = bnet(), target('bnet5')
    state = backbone_of(theirs, 'backbone.') | CLASSIFIER
    content = dict(epoch=100, model='resnet50BNET', state_dict=state, best_prec1=torch.tensor(77.0))
    torch.save(content, tmp_path / 'a.pth')
    converted = convert(tmp_path / 'a.pth', 'bnet', model_cfg)
    assert converted.report.kind == 'backbone' and converted.report.verified
    assert {'fc.weight', 'fc.bias', "entry 'epoch'", "entry 'best_prec1'"} <= set(converted.report.dropped)
    converted.save(tmp_path / 'b.pth')
    assert_same_features(model_cfg, tmp_path / 'b.pth', theirs)


def test_bnets_older_names_become_todays(tmp_path):
    state = backbone_of(bnet(), 'backbone.')
    old = {key.replace('bnet3.bnconv', 'bnconv3').replace('bnet3', 'bn3'): value for key, value in state.items()}
    assert 'layer1.0.bnconv3.weight' in old and 'layer1.0.bn3.running_mean' in old
    converted = convert(old, 'bnet', target('bnet5'))
    assert converted.state_dict.keys() == state.keys()
    assert all(torch.equal(converted.state_dict[key], state[key]) for key in state)
    # its batch norm had no weight and bias; one that has them is another layer
    with pytest.raises(ConversionError) as caught:
        convert(old | {'layer1.0.bn3.weight': torch.ones(32), 'layer1.0.bn3.bias': torch.ones(32)}, 'bnet')
    assert caught.value.left_over == ['layer1.0.bn3.weight', 'layer1.0.bn3.bias']


def test_a_plain_third_batch_norm_is_no_bnet():
    norm = {f'layer1.0.bn3.{key}': value for key, value in nn.BatchNorm2d(8).state_dict().items()}
    with pytest.raises(ConversionError, match='--from cbn or mabn or an') as caught:
        convert(norm, 'bnet')
    assert caught.value.left_over == list(norm)


def test_ans_imagenet_model_loses_its_wrappers_and_half_precision(tmp_path):
    theirs, model_cfg = an(False), target('an')
    state = backbone_of(theirs, 'backbone.') | CLASSIFIER
    half = {f'module.network.{k}': v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(dict(state_dict=half, epoch=120), tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    converted = convert(tmp_path / 'a.pth', 'an', model_cfg)
    report = converted.report
    assert report.unwrapped == ["entry 'state_dict'", "prefix 'module.'", "prefix 'network.'"]
    assert {value.dtype for value in converted.state_dict.values()} == {torch.float32, torch.int64}
    assert set(report.cast.values()) == {'float16 to float32'}
    converted.save(tmp_path / 'b.pth')
    for layer in theirs.layers.values():  # what a file in half precision knows of the weights
        layer.half().float()
    assert_same_features(model_cfg, tmp_path / 'b.pth', theirs)


def mabn_backbone(**changes):
    """MABN's ResNet with the names of the ImageNet code: no ``stem.``, and ``changes`` of each norm's tensors."""
    state = {}
    for key, value in backbone_of(mabn(), 'backbone.body.').items():
        key = key.replace('stem.', '')
        name = key.rpartition('.')[2]
        change = changes.get(name, lambda v: v)
        if change is not None:
            state[key] = change(value)
    return state


def test_mabns_pretrained_backbone_loads_with_and_without_its_windows(tmp_path):
    model_cfg = target('mabn', style='caffe')
    whole = mabn_backbone()
    assert not convert(whole, 'mabn', model_cfg).report.initialised
    bare = convert(mabn_backbone(iters=None, buffer_x2=None, buffer_gz=None), 'mabn', model_cfg)
    assert {key.rpartition('.')[2] for key in bare.report.initialised} == {'iters', 'buffer_x2', 'buffer_gz'}
    assert bare.state_dict['layer1.0.bn1.iters'].item() == 0 and bare.state_dict['bn1.buffer_x2'].shape == (16, 8)
    bare.save(tmp_path / 'b.pth')
    assert_same_features(model_cfg, tmp_path / 'b.pth', mabn())


def test_mabns_pretrained_backbone_may_have_no_running_statistics_at_all():
    model_cfg = target('mabn', style='caffe')
    nothing = dict(iters=None, buffer_x2=None, buffer_gz=None)
    state = mabn_backbone(running_var=None, **nothing)
    converted = convert({f'module.{k}': v for k, v in state.items()}, 'mabn', model_cfg)
    assert converted.state_dict['layer2.0.bn3.running_var'].eq(1).all()
    state['bn1.running_var'] = torch.ones(1, 8, 1, 1)  # some do and some do not: something was lost
    with pytest.raises(ConversionError) as caught:
        convert(state, 'mabn', model_cfg)
    assert 'layer1.0.bn1.running_var' in caught.value.missing


def test_mabns_imagenet_code_saves_other_shapes_and_another_window(tmp_path):
    state = mabn_backbone(running_var=torch.flatten, iters=torch.Tensor.float, buffer_x2=None, buffer_gz=None)
    for key in [key for key in state if key.endswith('.iters')]:
        owner = key.removesuffix('iters')
        state |= {owner + name: torch.rand(16, 32) for name in ('sta_matrix', 'pre_x2', 'pre_gz')}
    model_cfg = target('mabn', style='caffe')
    converted = convert(state | CLASSIFIER, 'mabn', model_cfg)
    assert {'bn1.sta_matrix', 'bn1.iters', 'layer1.0.downsample.1.pre_gz', 'fc.bias'} <= set(converted.report.dropped)
    assert set(converted.report.reshaped.values()) == {'(C,) to (1, C, 1, 1)'}
    assert converted.state_dict['bn1.iters'].tolist() == [0]
    converted.save(tmp_path / 'b.pth')
    assert_same_features(model_cfg, tmp_path / 'b.pth', mabn())


def test_a_batch_norm_in_mabns_layout_keeps_its_shape():
    norm = {f'bn1.{key}': value for key, value in nn.BatchNorm2d(8).state_dict().items()}
    assert convert(norm, 'mabn').state_dict['bn1.running_var'].shape == (8,)


def golden_keys(name):
    for folder in (ROOT / 'tests' / 'data' / 'golden', ROOT.parent / 'shared' / 'golden'):
        if (folder / 'an' / name).exists():
            return json.loads((folder / 'an' / name).read_text())
    pytest.skip(f'the published key list {name} is not in this checkout')


def of_shapes(keys):
    """Tensors of the published shapes that take no memory."""
    return {
        key: torch.zeros((), dtype=torch.int64 if key.endswith('num_batches_tracked') else torch.float16).expand(shape)
        for key, shape, _ in keys
    }


def test_the_published_keys_of_resnet_50_with_an_fit_ours():
    keys = golden_keys('resnet50_an_keys.json')
    state = {f'module.network.{key}': value for key, value in (of_shapes(keys) | CLASSIFIER).items()}
    model_cfg = apply_norm(copy.deepcopy(stock('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py').model), 'an')
    converted = convert(state, 'an', model_cfg)
    assert converted.report.verified and not converted.report.initialised
    assert {key: list(value.shape) for key, value in converted.state_dict.items()} == {k: s for k, s, _ in keys}


def test_the_published_keys_of_aognet_fit_ours():
    keys = golden_keys('aognet12m_an_keys.json')
    state = {f'module.network.{key}': value for key, value in (of_shapes(keys) | CLASSIFIER).items()}
    assert convert(state, 'aognet').state_dict.keys() == {key for key, _, _ in keys}
    if MODELS.get('AOGNet') is None:
        pytest.skip('there is no AOGNet yet')
    converted = convert(state, 'aognet', dict(backbone=dict(type='AOGNet', arch='12m', norm='AN')))
    assert converted.report.verified and not converted.report.initialised


def test_an_aognet_detector_fits_and_computes_the_same():
    if MODELS.get('AOGNet') is None:
        pytest.skip('there is no AOGNet yet')
    model_cfg = target('bn', FOUR_CONVS)
    model_cfg.backbone = dict(type='AOGNet', arch='12m', norm='BN')
    model_cfg.neck.in_channels = [128, 256, 512, 824]
    init_default_scope('mmdet')
    ours = built(model_cfg)
    state = {key.removeprefix('roi_head.'): value for key, value in ours.state_dict().items()}
    state |= {key: value for key, value in v1_heads(4).items() if '.weight' not in key}
    for head, rows in (('bbox_head.fc_reg', 16), ('mask_head.conv_logits', 4)):
        weight = state[f'{head}.weight']
        state[f'{head}.weight'] = torch.cat([torch.zeros(rows - len(weight), *weight.shape[1:]), weight])
    converted = convert(dict(state_dict=state), 'aognet', model_cfg)
    again = built(model_cfg)
    again.load_state_dict(converted.state_dict, strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(ours.eval().extract_feat(x), again.eval().extract_feat(x)):
            assert torch.equal(one, other)
    assert converted.state_dict['roi_head.bbox_head.fc_cls.bias'].tolist() == [1.5, 2.5, 3.5, 0.5]


# --- single steps --------------------------------------------------------------------------------------------------


def test_prefixes_go_only_if_all_keys_have_them():
    state = {f'module.{key}': value for key, value in v1_heads(4).items()}
    assert convert(state, 'cbn').report.unwrapped == ["prefix 'module.'"]
    with pytest.raises(ConversionError) as caught:
        convert(state | {'bbox_head.shared_fcs.0.bias': torch.ones(2)}, 'cbn')
    assert caught.value.left_over == list(state)


def test_counters_are_integers_whatever_they_were():
    counters = {'bn1.num_batches_tracked': torch.tensor(7.0), 'layer1.0.bn1.iters': torch.tensor([9.0])}
    converted = convert(counters, 'mabn')
    assert {key: (t.dtype, t.item()) for key, t in converted.state_dict.items()} == {
        'bn1.num_batches_tracked': (torch.int64, 7), 'layer1.0.bn1.iters': (torch.int64, 9)
    }  # fmt: skip
    assert set(converted.report.cast.values()) == {'float32 to int64'}


def test_the_bias_of_the_stem_goes_into_the_running_mean():
    state = dict(zip(
        ('stem.conv1.weight', 'stem.conv1.bias', 'stem.bn1.weight', 'stem.bn1.bias', 'stem.bn1.running_mean',
         'stem.bn1.running_var'),
        (torch.ones(2, 3, 7, 7), torch.tensor([1.0, 2.0]), torch.ones(2), torch.ones(2), torch.tensor([5.0, 6.0]),
         torch.ones(2)),
    ))  # fmt: skip
    converted = convert({f'backbone.body.{key}': value for key, value in state.items()}, 'mabn')
    assert converted.state_dict['bn1.running_mean'].tolist() == [4, 4]
    assert 'conv1.bias' not in converted.state_dict
    assert 'conv1.bias' in converted.report.folded['bn1.running_mean']


def test_the_classes_of_the_source_are_passed_on(tmp_path):
    torch.save(dict(state_dict=v1_heads(4), meta=dict(CLASSES=['cat', 'dog', 'cow'], epoch=12)), tmp_path / 'a.pth')
    convert(tmp_path / 'a.pth', 'cbn').save(tmp_path / 'b.pth')
    meta = torch.load(tmp_path / 'b.pth')['meta']
    assert meta['dataset_meta'] == dict(classes=('cat', 'dog', 'cow')) and 'epoch' not in meta


def test_without_a_config_nothing_is_verified():
    report = convert(v1_heads(4), 'cbn').report
    assert report.verified is False and report.initialised == {}


# --- warnings --------------------------------------------------------------------------------------------------------


def test_what_a_state_dict_cannot_show_is_compared_with_the_training():
    state = mabn().state_dict()
    good = target('mabn', style='caffe')
    good.data_preprocessor.update(bgr_to_rgb=False, mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0])
    report = convert(state, 'mabn', good).report
    (geometry,) = report.notes
    assert report.warnings == [] and report.geometry == 'maskrcnn-benchmark'
    assert 'trained in the box convention of maskrcnn-benchmark: evaluate it with --geometry' in geometry
    bad = target('mabn', style='pytorch')
    bad.neck.pop('conv_cfg')
    style, channels, mean, std, uncentred = convert(state, 'mabn', bad).report.warnings
    assert "backbone.style is 'pytorch'" in style and "'caffe'" in style
    assert 'bgr_to_rgb is True' in channels and '102.9801' in mean and '.std' in std
    assert 'neck.lateral_convs.0.bn' in uncentred


def test_values_that_are_not_finite_are_named():
    state = v1_heads(4)
    state['bbox_head.fc_cls.bias'][2] = float('nan')
    (warning,) = convert(state, 'cbn').report.warnings
    assert 'roi_head.bbox_head.fc_cls.bias' in warning


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def cbn_state():
    return cbn(ReferenceCBN).state_dict()


def test_a_missing_key_is_named(cbn_state):
    state = {key: value for key, value in cbn_state.items() if key != 'neck.fpn_convs.2.bn.running_var'}
    with pytest.raises(ConversionError, match=r'1 missing.*\n.*neck.fpn_convs.2.bn.running_var') as caught:
        convert(state, 'cbn', target('cbn'))
    assert (caught.value.missing, caught.value.left_over) == (['neck.fpn_convs.2.bn.running_var'], [])


def test_a_key_that_the_layout_has_no_place_for_is_left_over(cbn_state):
    with pytest.raises(ConversionError, match='1 of') as caught:
        convert(cbn_state | {'mask_iou_head.fc.weight': torch.ones(1)}, 'cbn')
    assert caught.value.left_over == ['mask_iou_head.fc.weight']


def test_a_key_that_the_target_has_no_place_for_is_left_over(cbn_state):
    extra = {'bbox_head.shared_fcs.1.weight': torch.ones(24, 24)}
    with pytest.raises(ConversionError, match=r'shared_fcs.1.weight \(was bbox_head.shared_fcs.1.weight\)') as caught:
        convert(cbn_state | extra, 'cbn', target('cbn'))
    assert caught.value.left_over == ['roi_head.bbox_head.shared_fcs.1.weight']


def test_a_wrong_shape_is_named_with_both(cbn_state):
    model_cfg = target('cbn')
    model_cfg.roi_head.bbox_head.num_classes = model_cfg.roi_head.mask_head.num_classes = 80
    with pytest.raises(ConversionError, match=r'\(4,\) in the checkpoint, \(81,\) in the config') as caught:
        convert(cbn_state, 'cbn', model_cfg)
    assert caught.value.mismatched['roi_head.mask_head.conv_logits.bias'] == ('(3,)', '(80,)')
    assert len(caught.value.mismatched) == 6


def test_many_wrong_shapes_that_look_alike_share_a_line():
    model_cfg = target('mabn', style='caffe')
    model_cfg.backbone.norm_cfg.update(B=4)
    with pytest.raises(ConversionError, match=r'the first is .*bn1.buffer_x2.*: \(16, 8\) .*, \(8, 8\)') as caught:
        convert(mabn().state_dict(), 'mabn', model_cfg)
    assert len(caught.value.mismatched) == 2 * 53 and len(str(caught.value).splitlines()) < 10


@pytest.mark.parametrize('norm', ['syncbn', 'gn', 'bn'])
def test_a_config_with_another_norm_is_refused(cbn_state, norm):
    with pytest.raises(ConversionError, match='does not fit model of the config'):
        convert(cbn_state, 'cbn', target(norm, FOUR_CONVS))


@pytest.mark.parametrize(
    'make, wrong, right',
    [(bnet, 'cbn', 'bnet'), (mabn, 'an', 'mabn'), (lambda: cbn(ReferenceCBN), 'bnet', 'cbn'), (mabn, 'bnet', 'mabn')],
)
def test_a_wrong_layout_is_refused_and_the_right_one_named(make, wrong, right):
    with pytest.raises(ConversionError, match=f'--from {right}'):
        convert(packed(right, make().state_dict()), wrong)


def test_many_keys_that_look_alike_share_a_line():
    with pytest.raises(ConversionError) as caught:
        convert(mabn().state_dict(), 'cbn')
    assert len(caught.value.left_over) > 400
    assert len(str(caught.value).splitlines()) < 60


def test_an_unknown_layout_names_the_known_ones():
    with pytest.raises(ValueError, match=', '.join(LAYOUTS)):
        convert({}, 'detectron')


def test_a_converted_checkpoint_is_not_converted_again(tmp_path):
    convert(v1_heads(4), 'cbn').save(tmp_path / 'b.pth')
    with pytest.raises(ConversionError, match="converted before, from 'cbn'"):
        convert(tmp_path / 'b.pth', 'cbn')


@pytest.mark.parametrize('content', [{}, dict(state_dict={}), [torch.ones(1)], dict(epoch=3), torch.ones(3)])
def test_what_holds_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(ConversionError, match='no state dict found'):
        convert(tmp_path / 'a.pth', 'cbn')


def test_a_state_dict_with_something_else_in_it_is_refused():
    with pytest.raises(ConversionError, match=r"'epoch' \(int\)"):
        convert(v1_heads(4) | dict(epoch=3), 'cbn')


def test_a_model_that_cannot_be_built_is_said():
    with pytest.raises(ValueError, match=r'cannot be built.*NoSuchDetector'):
        convert(v1_heads(4), 'cbn', dict(type='NoSuchDetector'))


# --- files of strangers --------------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


FORMATS = pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])


@FORMATS
def test_a_file_that_runs_code_is_refused_and_does_not_run_it(tmp_path, zipped):
    content = dict(state_dict=v1_heads(4), optimizer=RunsCode(tmp_path / 'ran'))
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(UntrustedCheckpointError, match='mkdir') as caught:
        convert(tmp_path / 'a.pth', 'cbn')
    assert '--trust-pickle' in str(caught.value)
    assert not (tmp_path / 'ran').exists()


@FORMATS
def test_a_file_that_needs_more_is_read_when_one_says_so(tmp_path, zipped):
    content = dict(state_dict=v1_heads(4), args=argparse.Namespace(lr=0.02))
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(UntrustedCheckpointError, match=r'argparse\.Namespace'):
        convert(tmp_path / 'a.pth', 'cbn')
    assert 'roi_head.bbox_head.fc_cls.bias' in convert(tmp_path / 'a.pth', 'cbn', trust_pickle=True).state_dict


@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', b'PK\x03\x04cut', b'\x80\x02}q\x00.'])
@pytest.mark.parametrize('trust', [False, True])
def test_a_file_that_is_no_checkpoint_is_told_from_a_refused_one(tmp_path, content, trust):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(ValueError, match=r'no checkpoint of torch|is empty|a web page|cut off') as caught:
        convert(tmp_path / 'a.pth', 'cbn', trust_pickle=trust)
    assert not isinstance(caught.value, UntrustedCheckpointError)


@FORMATS
def test_half_a_download_is_an_error(tmp_path, zipped):
    torch.save(v1_heads(4), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r'damaged|cut off'):
        convert(tmp_path / 'a.pth', 'cbn')


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / 'b.pth').write_bytes(b'old')
    save = torch.save

    def half_of_it(content, file, **kwargs):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', half_of_it)
    with pytest.raises(OSError, match='No space'):
        convert(v1_heads(4), 'cbn').save(tmp_path / 'b.pth', overwrite=True)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('b.pth', b'old')]
    monkeypatch.setattr(torch, 'save', save)
    convert(v1_heads(4), 'cbn').save(tmp_path / 'b.pth', overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ['b.pth'] and torch.load(tmp_path / 'b.pth')['state_dict']


def test_an_existing_file_is_replaced_only_on_request(tmp_path):
    (tmp_path / 'b.pth').write_bytes(b'old')
    with pytest.raises(ValueError, match='--force'):
        convert(v1_heads(4), 'cbn').save(tmp_path / 'b.pth')
    assert (tmp_path / 'b.pth').read_bytes() == b'old'


def test_the_new_file_takes_the_place_of_the_old_one_which_is_not_written_into(tmp_path):
    (tmp_path / 'b.pth').write_bytes(b'old')
    os.link(tmp_path / 'b.pth', tmp_path / 'same.pth')
    convert(v1_heads(4), 'cbn').save(tmp_path / 'b.pth', overwrite=True)
    assert (tmp_path / 'same.pth').read_bytes() == b'old' and torch.load(tmp_path / 'b.pth')['state_dict']


def test_the_source_is_never_replaced_whatever_it_is_called(tmp_path):
    torch.save(v1_heads(4), tmp_path / 'a.pth')
    before = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'a.pth')
    for name in ('a.pth', 'link.pth'):
        with pytest.raises(ValueError, match='is the source itself'):
            convert(tmp_path / 'a.pth', 'cbn').save(tmp_path / name, overwrite=True)
    assert (tmp_path / 'a.pth').read_bytes() == before


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f'no folder {tmp_path / "none"}')):
        convert(v1_heads(4), 'cbn').save(tmp_path / 'none' / 'b.pth')


def test_the_function_is_there_after_importing_the_package():
    assert mmdet_norms.checkpoints.convert is convert
