"""The conventions of mmdet 0.x / 1.x and maskrcnn-benchmark against their formulas, written out in inclusive corners.

The oracles below know nothing of x2 + 1: a box is (x1, y1, x2, y2) with both ends inside, its width x2 - x1 + 1.
"""

import copy
import itertools
import math
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import MODELS, TASK_UTILS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from PIL import Image

from helpers.choice import in_turn
from helpers.meta import on_meta
from mmdet_norms import PLACEMENTS, apply_norm
from mmdet_norms.cli.common import load_config
from mmdet_norms.cli.test import parse_args
from mmdet_norms.errors import UserError
from mmdet_norms.layers._args import ConfigError
from mmdet_norms.models.legacy import CONVENTIONS, MASKRCNN_BENCHMARK, MMDET_V1, boxes_to_original_image, use_geometry

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
ROWS = sorted(path for folder in ('cbn', 'an', 'mabn') for path in CONFIGS.glob(f'{folder}/*.py'))
OF_MMDET = ('gn-all', '_sn_')  # in the papers' tables, but not trained by their authors
PUBLISHED = [path for path in ROWS if not any(norm in path.name for norm in OF_MMDET)]
STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)
PLUS_ONE = np.array([0, 0, 1, 1])
STDS = (0.1, 0.1, 0.2, 0.2)

both = pytest.mark.parametrize('convention', CONVENTIONS)


# --- The formulas ---
MABN_ANCHORS = {  # stride: (w, h) for the ratios 0.5, 1, 2
    4: ((48, 24), (32, 32), (24, 48)),
    8: ((88, 48), (64, 64), (48, 96)),
    16: ((184, 96), (128, 128), (88, 176)),
    32: ((360, 176), (256, 256), (184, 368)),
    64: ((728, 368), (512, 512), (360, 720)),
}


def legacy_anchors(stride, convention, scale=8):
    """(3, 4) inclusive corners at position (0, 0)."""
    center = (stride - 1) / 2
    anchors = []
    for i, ratio in enumerate(RATIOS):
        if convention == MMDET_V1:
            w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
            corners = [center - (w - 1) / 2, center - (h - 1) / 2, center + (w - 1) / 2, center + (h - 1) / 2]
            anchors.append([round(corner) for corner in corners])
        else:
            w, h = MABN_ANCHORS[stride][i]
            anchors.append([center - (w - 1) / 2, center - (h - 1) / 2, center + (w - 1) / 2, center + (h - 1) / 2])
    return np.array(anchors, dtype=float)


def legacy_grid(stride, height, width, convention):
    """All anchors of a level: by row, by column, by ratio."""
    shifts = [(x * stride, y * stride) * 2 for y in range(height) for x in range(width)]
    return np.concatenate([legacy_anchors(stride, convention) + shift for shift in np.array(shifts, dtype=float)])


def legacy_decode(boxes, deltas, stds, convention, shape=None):
    """(N, 4) inclusive boxes, (N, 4) deltas; ``shape`` (H, W) clips to [0, W - 1]."""
    decoded = []
    limit = math.log(1000 / 16)
    for (x1, y1, x2, y2), delta in zip(boxes, deltas * np.array(stds)):
        dx, dy, dw, dh = delta
        dw, dh = min(dw, limit), min(dh, limit)
        if convention == MMDET_V1:
            dw, dh = max(dw, -limit), max(dh, -limit)
        w, h = x2 - x1 + 1, y2 - y1 + 1
        cx, cy = (x1 + x2) / 2 + dx * w, (y1 + y2) / 2 + dy * h
        w, h = w * math.exp(dw), h * math.exp(dh)
        decoded.append([cx - w / 2 + 0.5, cy - h / 2 + 0.5, cx + w / 2 - 0.5, cy + h / 2 - 0.5])
    decoded = np.array(decoded).reshape(-1, 4)
    if shape is not None:
        decoded[:, 0::2] = decoded[:, 0::2].clip(0, shape[1] - 1)
        decoded[:, 1::2] = decoded[:, 1::2].clip(0, shape[0] - 1)
    return decoded


def legacy_iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    inter = max(w, 0) * max(h, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return inter / (sum(areas) - inter)


def legacy_nms(boxes, scores, threshold):
    kept = []
    for i in np.argsort(-scores):
        if all(legacy_iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def legacy_levels(boxes, convention):
    """Level of each inclusive box: 0 to 3."""
    roots = [math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) for x1, y1, x2, y2 in boxes]
    if convention == MMDET_V1:
        levels = [math.floor(math.log2(root / 56 + 1e-6)) for root in roots]
    else:
        levels = [math.floor(4 + math.log2(root / 224 + 1e-6)) - 2 for root in roots]
    return [min(max(level, 0), 3) for level in levels]


def legacy_roi_align(feature, box, stride, bins, convention, sampling=2):
    """(C, bins, bins) of ``feature`` (C, H, W) at one inclusive box of the image."""
    height, width = feature.shape[1:]
    x1, y1, x2, y2 = box
    if convention == MMDET_V1:
        left, top, right, bottom = x1 / stride, y1 / stride, (x2 + 1) / stride, (y2 + 1) / stride
        roi_w, roi_h = max(right - left, 0), max(bottom - top, 0)
    else:
        left, top, right, bottom = x1 / stride, y1 / stride, x2 / stride, y2 / stride
        roi_w, roi_h = max(right - left, 1), max(bottom - top, 1)

    def pixel(y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return np.zeros(len(feature))
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        fy, fx = y - y0, x - x0
        upper = feature[:, y0, x0] * (1 - fx) + feature[:, y0, x1] * fx
        lower = feature[:, y1, x0] * (1 - fx) + feature[:, y1, x1] * fx
        return upper * (1 - fy) + lower * fy

    out = np.zeros((len(feature), bins, bins))
    for i, j, m, n in itertools.product(range(bins), range(bins), range(sampling), range(sampling)):
        y = top + (i + (m + 0.5) / sampling) * roi_h / bins
        x = left + (j + (n + 0.5) / sampling) * roi_w / bins
        out[:, i, j] += pixel(y, x) / sampling**2
    return out


def legacy_detections(boxes, scores, convention, scale, nms=0.5, score_thr=0.05, most=100):
    """From decoded inclusive boxes (N, classes, 4) of the resized image to the detections of one image.

    Returns:
        Inclusive boxes of the original image, the same of the resized one, scores, labels; by descending score.
    """
    original = boxes / np.array([*scale, *scale])
    found = []
    for label in range(boxes.shape[1]):
        candidates = np.flatnonzero(scores[:, label] > score_thr)
        seen = (original if convention == MMDET_V1 else boxes)[candidates, label]
        for i in candidates[legacy_nms(seen, scores[candidates, label], nms)]:
            found.append((scores[i, label], label, original[i, label], boxes[i, label]))
    found.sort(key=lambda detection: -detection[0])
    scores, labels, original, resized = zip(*found[:most])
    return np.array(original), np.array(resized), np.array(scores), np.array(labels)


def legacy_paste(probability, box, height, width, convention):
    """Probability map (H, W) of one instance; ``box``: inclusive corners of the original image."""
    x1, y1, x2, y2 = box
    if convention == MASKRCNN_BENCHMARK:
        factor = (len(probability) + 2) / len(probability)
        probability = np.pad(probability, 1)
        half_w, half_h = (x2 - x1) / 2 * factor, (y2 - y1) / 2 * factor
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        x1, y1, x2, y2 = cx - half_w, cy - half_h, cx + half_w, cy + half_h
    x1, y1, x2, y2 = int(x1), int(y1), int(x2), int(y2)
    w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    patch = cv2.resize(probability.astype(np.float32), (w, h), interpolation=cv2.INTER_LINEAR)
    image = np.zeros((height, width))
    for y, x in itertools.product(range(max(y1, 0), min(y1 + h, height)), range(max(x1, 0), min(x1 + w, width))):
        image[y, x] = patch[y - y1, x - x1]
    return image


# --- Helpers ---
def stored(boxes):
    """Inclusive numpy boxes -> what the package stores."""
    return torch.from_numpy(np.asarray(boxes, dtype=float) + PLUS_ONE)


def inclusive(boxes):
    return boxes.numpy() - PLUS_ONE


def random_boxes(n, width, height, smallest=2.0, seed=0):
    """(n, 4) inclusive boxes of all sizes, some across the border."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(math.log(smallest), math.log(max(width, height)), (n, 2)))
    start = rng.uniform(-0.1, 0.9, (n, 2)) * (width, height)
    return np.concatenate([start, start + size - 1], 1)


def coder(convention, stds=STDS, **kwargs):
    return TASK_UTILS.build(dict(
        type='PlusOneDeltaXYWHBBoxCoder', convention=convention, target_stds=stds, **kwargs,
    ))  # fmt: skip


def anchor_generator(convention):
    return TASK_UTILS.build(dict(
        type='PlusOneAnchorGenerator', convention=convention, strides=STRIDES, ratios=RATIOS, scales=[8],
    ))  # fmt: skip


def extractor(convention, channels=3, **layer):
    return MODELS.build(dict(
        type='PlusOneRoIExtractor', convention=convention, out_channels=channels, featmap_strides=STRIDES[:4],
        roi_layer=dict(dict(type='RoIAlign', output_size=3, sampling_ratio=2), **layer),
    ))  # fmt: skip


def box_head(convention, kind='Shared4Conv1FC', classes=3, **kwargs):
    return MODELS.build(dict(
        type=f'PlusOne{kind}BBoxHead', convention=convention, in_channels=8, fc_out_channels=8, num_classes=classes,
        bbox_coder=dict(type='PlusOneDeltaXYWHBBoxCoder', convention=convention, target_stds=STDS), **kwargs,
    ))  # fmt: skip


TEST_CFG = ConfigDict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100, mask_thr_binary=0.5)


# --- Anchors ---
@both
@pytest.mark.parametrize('level', range(5))
def test_anchors_are_the_legacy_ones(convention, level):
    generator = anchor_generator(convention)
    anchors = inclusive(generator.base_anchors[level])
    np.testing.assert_array_equal(anchors, legacy_anchors(STRIDES[level], convention))
    grid = generator.grid_priors([(3, 2)] * 5, device='cpu')[level]
    np.testing.assert_array_equal(inclusive(grid), legacy_grid(STRIDES[level], 3, 2, convention))


def test_anchors_have_the_corners_that_the_two_code_bases_print():
    assert inclusive(anchor_generator(MMDET_V1).base_anchors[0])[0].tolist() == [-21, -9, 24, 12]
    assert inclusive(anchor_generator(MASKRCNN_BENCHMARK).base_anchors[0])[0].tolist() == [-22, -10, 25, 13]


@pytest.mark.parametrize('scale_major', [True, False])
def test_several_scales_come_in_the_order_of_mmdet(scale_major):
    common = dict(strides=[16], ratios=RATIOS, scales=[4, 8], scale_major=scale_major)
    ours = TASK_UTILS.build(dict(type='PlusOneAnchorGenerator', convention=MASKRCNN_BENCHMARK, **common))
    stock = TASK_UTILS.build(dict(type='AnchorGenerator', **common))

    def shapes(generator):
        boxes = generator.base_anchors[0]
        return (boxes[:, 2:] - boxes[:, :2]).numpy()

    assert abs(shapes(ours) / shapes(stock) - 1).max() < 0.1  # rounded, but in the same places


# --- Boxes ---
@both
@pytest.mark.parametrize('shape', [None, (300, 500)])
def test_decoding_is_the_legacy_formula(convention, shape):
    boxes = random_boxes(200, 500, 300)
    deltas = np.random.default_rng(1).normal(0, 3, (200, 4)) * (1, 1, 8, 8)  # beyond ± log(1000 / 16) / 0.2 too
    ours = coder(convention).decode(stored(boxes), torch.from_numpy(deltas), max_shape=shape)
    np.testing.assert_allclose(inclusive(ours), legacy_decode(boxes, deltas, STDS, convention, shape), atol=1e-9)


def test_decoding_takes_several_classes_per_box():
    boxes, deltas = random_boxes(5, 500, 300), np.random.default_rng(1).normal(0, 9, (5, 8))
    for convention in CONVENTIONS:
        ours = coder(convention).decode(stored(boxes), torch.from_numpy(deltas), max_shape=(300, 500))
        for c in range(2):
            want = legacy_decode(boxes, deltas[:, 4 * c : 4 * c + 4], STDS, convention, (300, 500))
            np.testing.assert_allclose(inclusive(ours[:, 4 * c : 4 * c + 4]), want, atol=1e-9)


@both
def test_encoding_is_the_legacy_formula_and_decodes_back(convention):
    boxes, truths = random_boxes(50, 500, 300, 8), random_boxes(50, 500, 300, 8, seed=1)
    w, h = (boxes[:, 2:] - boxes[:, :2] + 1).T
    tw, th = (truths[:, 2:] - truths[:, :2] + 1).T
    dx, dy = ((truths[:, :2] + truths[:, 2:]) / 2 - (boxes[:, :2] + boxes[:, 2:]) / 2).T
    want = np.stack([dx / w, dy / h, np.log(tw / w), np.log(th / h)], 1) / STDS
    ours = coder(convention).encode(stored(boxes), stored(truths))
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)  # mmdet encodes in fp32, as mmdet 0.6 did
    back = coder(convention).decode(stored(boxes), torch.from_numpy(want))
    np.testing.assert_allclose(inclusive(back), truths, atol=1e-9)


@both
def test_a_box_beside_the_image_keeps_one_pixel_as_only_inclusive_clipping_does(convention):
    boxes = np.array([[600.0, 50, 700, 90], [-90.0, -80, -20, -10]])
    ours = coder(convention).decode(stored(boxes), torch.zeros(2, 4, dtype=torch.float64), max_shape=(300, 500))
    assert inclusive(ours).tolist() == [[499, 50, 499, 90], [0, 0, 0, 0]]
    assert coder(convention).decode(torch.zeros(0, 4), torch.zeros(0, 4), max_shape=(300, 500)).shape == (0, 4)


def test_clip_border_off_and_box_types_stay_what_they_are_in_mmdet():
    boxes = np.array([[600.0, 50, 700, 90]])
    zero = torch.zeros(1, 4, dtype=torch.float64)
    free = coder(MMDET_V1, clip_border=False).decode(stored(boxes), zero, max_shape=(300, 500))
    np.testing.assert_allclose(inclusive(free), boxes)
    typed = coder(MMDET_V1, use_box_type=True).decode(stored(boxes), zero, max_shape=(300, 500))
    assert typed.tensor.tolist() == [[499, 50, 500, 91]]


@both
def test_boxes_and_their_xywh_reach_the_original_image_as_before(convention):
    box = np.array([[10.0, 20, 39, 99]])  # 30 x 80 in the resized image
    ours = boxes_to_original_image(stored(box), (2.5, 2.0))
    np.testing.assert_allclose(inclusive(ours), [[4, 10, 15.6, 49.5]])
    x, y, w, h = CocoMetric().xyxy2xywh(ours[0].numpy())
    np.testing.assert_allclose([x, y, w, h], [4, 10, 15.6 - 4 + 1, 49.5 - 10 + 1])


# --- RoIs ---
@both
def test_pooled_regions_are_the_legacy_ones_from_the_smallest_roi_on(convention):
    rng = np.random.default_rng(0)
    image_w, image_h = 320, 256
    features = [rng.normal(size=(3, image_h // stride, image_w // stride)) for stride in STRIDES[:4]]
    boxes = np.concatenate([
        random_boxes(40, image_w, image_h, smallest=0.1),
        [[100, 100, 100, 100], [100.3, 50, 99.5, 80], [0, 0, 319, 255], [319, 255, 319, 255], [30, 30, 120, 33]],
        [[30, 30, 180, 170], [-80, -60, 390, 400]],
    ])  # fmt: skip
    rois = torch.cat([torch.zeros(len(boxes), 1), stored(boxes)], 1)
    pooled = extractor(convention)([torch.from_numpy(feature)[None] for feature in features], rois)
    levels = legacy_levels(boxes, convention)
    assert set(levels) == {0, 1, 2, 3}
    for roi, box, level in zip(pooled, boxes, levels):
        want = legacy_roi_align(features[level], box, STRIDES[level], 3, convention)
        np.testing.assert_allclose(roi, want, atol=1e-9)


@both
def test_rois_of_several_images_and_none_at_all_pool_with_gradients(convention):
    features = [torch.randn(2, 3, 64 // stride, 64 // stride, requires_grad=True) for stride in STRIDES[:4]]
    rois = torch.tensor([[0, 5.0, 5, 20, 20], [1, 5, 5, 20, 20]])
    pooled = extractor(convention)(features, rois)
    assert not torch.equal(pooled[0], pooled[1])
    pooled.sum().backward()
    assert features[0].grad[0].abs().sum() > 0 and rois.tolist()[0] == [0, 5, 5, 20, 20]
    assert extractor(convention)(features, rois[:0]).shape == (0, 3, 3, 3)


@both
def test_levels_are_the_legacy_ones_at_the_boundaries_too(convention):
    sides = np.array([111, 111.999, 112, 112.001, 223, 224, 225, 447.999, 448, 5, 2000])
    # A double holds what a float of the two code bases would round away.
    near = 112 * (1 - np.array([2e-6, 0.5e-6, 1e-7]))
    sides = np.concatenate([sides, near])
    boxes = np.stack([sides * 0, sides * 0, sides - 1, sides - 1], 1)
    rois = torch.cat([torch.zeros(len(boxes), 1), stored(boxes)], 1)
    assert extractor(convention).map_roi_levels(rois, 4).tolist() == legacy_levels(boxes, convention)


def test_the_two_conventions_put_a_box_just_below_a_boundary_on_different_levels():
    side = 112 * (1 - 1e-6)
    levels = [legacy_levels([(0, 0, side - 1, side - 1)], convention) for convention in CONVENTIONS]
    assert levels == [[0], [1]]


# --- Detections ---
def predict(head, rois, scores, deltas, scale, shape, rescale=True, cfg=TEST_CFG):
    logits = torch.from_numpy(np.concatenate([scores, 1 - scores.sum(1, keepdims=True)], 1)).log()
    meta = dict(img_shape=shape, scale_factor=scale)
    rois = torch.cat([torch.zeros(len(rois), 1), stored(rois)], 1)
    # Single precision, because mmcv's compiled NMS knows no other on a CPU.
    inputs = [(x.float(),) for x in (rois, logits, torch.from_numpy(deltas))]
    (result,) = head.predict_by_feat(*inputs, [meta], cfg, rescale=rescale)
    return result


@both
@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('agnostic', [False, True])
def test_detections_are_those_of_the_legacy_code(convention, rescale, agnostic):
    rng = np.random.default_rng(3)
    rois = np.repeat(random_boxes(15, 500, 300, smallest=8), 4, 0) + rng.normal(0, 1, (60, 4))
    scores = rng.dirichlet([0.4] * 4, 60)[:, :3]
    deltas = rng.normal(0, 0.5, (60, 4 if agnostic else 12))
    scale, shape = (2.5, 2.5), (300, 500)
    decoded = np.stack(
        [legacy_decode(rois, delta, STDS, convention, shape) for delta in np.split(deltas, deltas.shape[1] // 4, 1)], 1
    )
    original, resized, want_scores, want_labels = legacy_detections(
        np.broadcast_to(decoded, (60, 3, 4)), scores, convention, scale
    )
    head = box_head(convention, reg_class_agnostic=agnostic)
    result = predict(head, rois, scores, deltas, scale, shape, rescale)
    np.testing.assert_allclose(inclusive(result.bboxes), original if rescale else resized, atol=1e-3)
    np.testing.assert_allclose(result.scores, want_scores, atol=1e-5)
    np.testing.assert_array_equal(result.labels, want_labels)
    assert 20 < len(result) < 180  # NMS had something to do


def test_nms_sees_the_original_image_in_mmdet_and_the_resized_one_in_maskrcnn_benchmark():
    # 40 pixels wide, 14 apart: IoU 26 / 54 < 0.5. At a quarter of the size 10.75 and 3.5: IoU 7.25 / 14.25 > 0.5.
    rois = np.array([[0.0, 0, 39, 39], [14, 0, 53, 39]])
    scores = np.array([[0.9], [0.6]])
    for kind in ('Shared4Conv1FC', 'Shared2FC'):
        counts = [
            len(predict(box_head(convention, kind, 1), rois, scores, np.zeros((2, 4)), (4.0, 4.0), (300, 500)))
            for convention in CONVENTIONS
        ]
        assert counts == [1, 2]


@both
def test_without_a_test_cfg_all_boxes_come_back_and_without_rois_none(convention):
    head = box_head(convention)
    rois, scores = random_boxes(5, 500, 300), np.full((5, 3), 0.2)
    for rescale in (True, False):
        result = predict(head, rois, scores, np.zeros((5, 12)), (2.0, 2.0), (300, 500), rescale, None)
        boxes = legacy_decode(rois, np.zeros((5, 4)), STDS, convention, (300, 500)) / (2 if rescale else 1)
        np.testing.assert_allclose(inclusive(result.bboxes[:, :4]), boxes, atol=1e-3)
        assert result.bboxes.shape == (5, 12) and result.scores.shape == (5, 4)
    none = predict(head, rois[:0], scores[:0], np.zeros((0, 12)), (2.0, 2.0), (300, 500))
    assert none.bboxes.shape == (0, 4) and none.labels.shape == (0,)


# --- Masks ---
def mask_head(convention, **kwargs):
    return MODELS.build(dict(
        type='PlusOneFCNMaskHead', convention=convention, num_convs=1, in_channels=8, conv_out_channels=8,
        num_classes=3, **kwargs,
    ))  # fmt: skip


def paste(head, logits, boxes, labels, meta, rescale=True, threshold=0.5):
    results = InstanceData(bboxes=stored(boxes), labels=torch.tensor(labels), scores=torch.ones(len(labels)))
    cfg = ConfigDict(TEST_CFG, mask_thr_binary=threshold)
    return head.predict_by_feat((logits,), [results], [meta], cfg, rescale=rescale)[0]


@both
@pytest.mark.parametrize('rescale', [True, False])
def test_masks_are_pasted_as_in_the_legacy_code(convention, rescale):
    generator = torch.Generator().manual_seed(0)
    # Smooth maps, so that few pixels are near the threshold.
    coarse = torch.randn(6, 3, 5, 5, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, size=28, mode='bicubic') * 4
    labels, scale = [0, 1, 2, 0, 1, 2], (1.6, 1.6)
    boxes = np.array([
        [8, 16, 87, 79], [0, 0, 95.9, 111.2], [40, 3, 40, 90], [93, 100, 95, 111], [30.5, 40.7, 33.2, 44.1],
        [0.4, 50.3, 31, 70],
    ])  # fmt: skip
    meta = dict(ori_shape=(70, 60), img_shape=(112, 96), scale_factor=scale)
    result = paste(mask_head(convention), logits, boxes, labels, meta, rescale)
    height, width, factor = (70, 60, 1.6) if rescale else (112, 96, 1.0)
    assert result.masks.shape == (6, height, width) and result.masks.dtype == torch.bool
    np.testing.assert_allclose(inclusive(result.bboxes), boxes / factor)
    for mask, logit, label, box in zip(result.masks.numpy(), logits, labels, boxes / factor):
        want = legacy_paste(logit[label].sigmoid().numpy(), box, height, width, convention)
        near = abs(want - 0.5) < 1e-5
        assert near.mean() < 0.001
        np.testing.assert_array_equal(mask[~near], (want > 0.5)[~near])


@both
def test_probability_maps_agnostic_masks_and_boxes_outside_paste_too(convention):
    head = mask_head(convention, class_agnostic=True)
    logits = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = np.array([[10.0, 10, 29, 39], [300, 300, 320, 330], [60, 10, 90, 30], [10, -40, 30, -10]])
    meta = dict(ori_shape=(60, 50), img_shape=(60, 50), scale_factor=(1.0, 1.0))
    masks = paste(head, logits, boxes, [2, 1, 0, 0], meta, threshold=-1).masks
    want = legacy_paste(logits[0, 0].sigmoid().numpy(), boxes[0], 60, 50, convention) * 255
    assert masks.dtype == torch.uint8 and abs(masks[0].numpy() - want).max() <= 1
    assert not masks[1:].any()


@both
def test_an_image_without_detections_has_no_masks(convention):
    meta = dict(ori_shape=(60, 50), img_shape=(60, 50), scale_factor=(1.0, 1.0))
    result = paste(mask_head(convention), torch.zeros(0, 3, 28, 28), np.zeros((0, 4)), [], meta)
    assert result.masks.shape == (0, 60, 50)


# --- Images ---
def resize(convention, height, width, scale=(1333, 800), **more):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    transform = TRANSFORMS.build(dict(type='LegacyResize', scale=scale, convention=convention))
    return image, transform(dict(img=image.copy(), **more))


@pytest.mark.parametrize('height, width', [(427, 640), (640, 427), (480, 1000), (500, 333), (800, 1200), (37, 99)])
def test_mmdet_v1_scales_boxes_by_the_one_factor_it_asked_for(height, width):
    image, result = resize(MMDET_V1, height, width)
    factor = min(1333 / max(height, width), 800 / min(height, width))
    assert result['scale_factor'] == pytest.approx((factor, factor), rel=1e-12)
    assert result['img_shape'] == (int(height * factor + 0.5), int(width * factor + 0.5))
    stock = TRANSFORMS.build(dict(type='Resize', scale=(1333, 800), keep_ratio=True))(dict(img=image.copy()))
    np.testing.assert_array_equal(result['img'], stock['img'])


@pytest.mark.parametrize(
    'height, width, size',
    [
        (427, 640, (800, 1199)),  # 800 * 640 / 427 = 1199.06
        (640, 427, (1199, 800)),
        (375, 500, (800, 1066)),  # 1066.67, truncated
        (500, 375, (1066, 800)),
        (480, 1000, (640, 1333)),  # 1333 * 480 / 1000 = 639.84 -> 640, 640 * 1000 / 480 = 1333.3
        (375, 471, (800, 1004)),  # 1004.8; to fit 1004 exactly, the short side would be 799.4
        (800, 1000, (800, 1000)),
    ],
)
def test_maskrcnn_benchmark_truncates_the_long_side_and_averages_like_pillow(height, width, size):
    image, result = resize(MASKRCNN_BENCHMARK, height, width)
    assert result['img_shape'] == size and result['img'].shape == (*size, 3)
    assert result['scale_factor'] == pytest.approx((size[1] / width, size[0] / height))
    want = Image.fromarray(image).resize(size[::-1], Image.BILINEAR)
    np.testing.assert_array_equal(result['img'], np.asarray(want))


def test_shrinking_averages_only_in_maskrcnn_benchmark():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    spread = {}
    for convention in CONVENTIONS:
        transform = TRANSFORMS.build(dict(type='LegacyResize', scale=(16, 16), convention=convention))
        spread[convention] = transform(dict(img=stripes.copy()))['img'][8, :, 0].astype(float).mean()
    assert spread[MASKRCNN_BENCHMARK] == pytest.approx(64, abs=4) and spread[MMDET_V1] < 1


@both
def test_masks_follow_the_image(convention):
    masks = BitmapMasks(np.ones((2, 375, 471), np.uint8), 375, 471)
    _, result = resize(convention, 375, 471, gt_masks=masks)
    assert result['gt_masks'].masks.shape[1:] == result['img_shape']


# --- Errors ---
@pytest.mark.parametrize(
    'registry, cfg',
    [
        (TASK_UTILS, dict(type='PlusOneAnchorGenerator', strides=[4], ratios=[1.0], scales=[8])),
        (TASK_UTILS, dict(type='PlusOneDeltaXYWHBBoxCoder')),
        (MODELS, dict(type='PlusOneRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7), out_channels=8,
                      featmap_strides=[4])),
        (MODELS, dict(type='PlusOneShared4Conv1FCBBoxHead')),
        (MODELS, dict(type='PlusOneShared2FCBBoxHead')),
        (MODELS, dict(type='PlusOneFCNMaskHead')),
        (TRANSFORMS, dict(type='LegacyResize', scale=(1333, 800))),
    ],
)  # fmt: skip
def test_a_wrong_convention_says_what_to_write(registry, cfg):
    with pytest.raises(ValueError, match=rf"{cfg['type']}.convention='mmdet-v2' is unknown; write 'mmdet-v1'"):
        registry.build(dict(cfg, convention='mmdet-v2'))


def test_what_the_convention_decides_cannot_be_said_otherwise():
    with pytest.raises(ValueError, match=r'roi_layer.aligned=True is decided by convention=.mmdet-v1.; leave it out'):
        extractor(MMDET_V1, aligned=True)
    with pytest.raises(ValueError, match=r"roi_layer.type='RoIPool' has no legacy form; write 'RoIAlign'"):
        extractor(MMDET_V1, type='RoIPool')
    with pytest.raises(ValueError, match=r'LegacyResize.scale=800 must be \(long limit, short limit\)'):
        TRANSFORMS.build(dict(type='LegacyResize', scale=800))


# --- Configs ---
CONVENTION_OF = dict(cbn=MMDET_V1, an=MMDET_V1, mabn=MASKRCNN_BENCHMARK)
ONE_PER_KIND = (
    'cbn/faster-rcnn_r50_fpn_cbn_1x_coco.py',
    'cbn/mask-rcnn_r50_fpn_cbn_1x_coco.py',
    'mabn/mask-rcnn_r50-scratch_fpn_mabn_180k_coco.py',
    'an/mask-rcnn_r50_fpn_an-gn-head_2x_coco.py',
    'an/cascade-mask-rcnn_r101_fpn_an_20e_coco.py',
)


@cache
def load(path):
    return Config.fromfile(path)


@cache
def published(path):
    """A row of the zoo in the convention of the authors' checkpoints."""
    cfg = copy.deepcopy(load(path))
    use_geometry(cfg, CONVENTION_OF[path.parent.name])
    return cfg


def dicts(node):
    """Every dict in a config, with its place."""
    todo = [('', node)]
    while todo:
        place, node = todo.pop()
        if isinstance(node, dict):
            yield place, node
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
        todo += [(f'{place}.{key}', value) for key, value in items]


@pytest.mark.parametrize('path', PUBLISHED, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_a_row_with_geometry_is_the_row_but_for_its_convention(path):
    cfg, row = published(path), load(path)
    convention = CONVENTION_OF[path.parent.name]
    types = dict(
        anchor_generator='PlusOneAnchorGenerator', bbox_coder='PlusOneDeltaXYWHBBoxCoder',
        bbox_roi_extractor='PlusOneRoIExtractor', mask_roi_extractor='PlusOneRoIExtractor',
        mask_head='PlusOneFCNMaskHead',
    )  # fmt: skip
    legacy, plain = dict(dicts(cfg.model)), dict(dicts(row.model))
    assert set(legacy) == set(plain)  # the same parts in the same places ...
    for place, part in legacy.items():
        name = place.split('.')[-1]
        kind = types.get(name, f'PlusOne{plain[place].get("type", "").removeprefix("Norm")}')
        ours = name in types or kind.endswith('BBoxHead')
        want = dict(plain[place], type=kind, convention=convention) if ours else dict(plain[place])
        values = {key: value for key, value in want.items() if not isinstance(value, (dict, list))}
        # ... with the same values but types and convention
        assert {key: value for key, value in part.items() if not isinstance(value, (dict, list))} == values, place
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        names = [step['type'] for step in loader.dataset.pipeline]
        assert names == [s['type'].replace('Resize', 'LegacyResize') for s in row.test_dataloader.dataset.pipeline]
        assert loader.dataset.pipeline[1] == dict(type='LegacyResize', scale=(1333, 800), convention=convention)
    assert cfg.train_dataloader == row.train_dataloader


@pytest.mark.parametrize('name', ONE_PER_KIND)
def test_a_row_with_geometry_has_the_parameters_of_the_row(name):
    init_default_scope('mmdet')
    path = CONFIGS / name
    with on_meta():
        ours, row = (MODELS.build(copy.deepcopy(cfg.model)).state_dict() for cfg in (published(path), load(path)))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in row.items()}


@pytest.mark.parametrize('name, norm', in_turn(ONE_PER_KIND, PLACEMENTS, each=4))
def test_a_norm_by_name_goes_where_it_goes_in_the_row_and_leaves_the_convention(name, norm):
    init_default_scope('mmdet')
    path = CONFIGS / name
    ours, row = (apply_norm(cfg.model, norm) for cfg in (published(path), load(path)))
    assert sum('convention' in part for _, part in dicts(ours)) == sum(
        'convention' in p for _, p in dicts(published(path).model)
    )
    other_order = Config(dict(model=copy.deepcopy(row)))
    use_geometry(other_order, CONVENTION_OF[path.parent.name])
    assert {place: part.get('convention') for place, part in dicts(other_order.model)} == {
        place: part.get('convention') for place, part in dicts(ours)
    }
    with on_meta():
        ours, row = (MODELS.build(model).state_dict() for model in (ours, row))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in row.items()}


def test_configs_that_do_not_ask_for_it_keep_the_stock_types():
    for path in ROWS[::4]:
        assert 'PlusOne' not in (text := load(path).pretty_text) and 'LegacyResize' not in text
    for registry, name in (
        (TASK_UTILS, 'AnchorGenerator'), (TASK_UTILS, 'LegacyAnchorGenerator'), (TASK_UTILS, 'DeltaXYWHBBoxCoder'),
        (MODELS, 'SingleRoIExtractor'), (MODELS, 'Shared4Conv1FCBBoxHead'), (MODELS, 'FCNMaskHead'),
        (TRANSFORMS, 'Resize'),
    ):  # fmt: skip
        assert registry.get(name).__module__.startswith('mmdet.')


def mmdets(path, **changes):
    cfg = Config.fromstring(f'_base_ = {f"mmdet::{path}"!r}', '.py')
    cfg.merge_from_dict(changes)
    return cfg


FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'


def test_geometry_changes_validation_and_test_of_a_stock_detector_and_can_be_changed():
    cfg, stock = mmdets(FASTER, **{'model.roi_head.bbox_roi_extractor.roi_layer.aligned': True}), mmdets(FASTER)
    for convention in CONVENTIONS:
        use_geometry(cfg, convention)
        assert {part.convention for _, part in dicts(cfg._cfg_dict) if 'convention' in part} == {convention}
        assert cfg.model.roi_head.bbox_roi_extractor.roi_layer == dict(type='RoIAlign', output_size=7, sampling_ratio=2)
    assert cfg.train_dataloader == stock.train_dataloader and cfg.train_pipeline == stock.train_pipeline
    cfg.test_dataloader.dataset.pipeline[1].scale = (100, 60)
    assert cfg.val_dataloader.dataset.pipeline[1].scale == (1333, 800)


def test_geometry_of_a_config_that_names_classes():
    cfg = Config(dict(model=load(ROWS[0]).to_dict()['model']))
    cfg.model.rpn_head.anchor_generator.type = TASK_UTILS.get('mmdet.AnchorGenerator')
    cfg.model.rpn_head.bbox_coder.type = 'mmdet.DeltaXYWHBBoxCoder'
    use_geometry(cfg, MMDET_V1)
    assert cfg.model.rpn_head.anchor_generator.type == 'PlusOneAnchorGenerator'
    assert cfg.model.rpn_head.bbox_coder.type == 'PlusOneDeltaXYWHBBoxCoder'


NO_RATIO = dict(type='Resize', scale=(8, 8), keep_ratio=False)


@pytest.mark.parametrize(
    'cfg, said',
    [
        (lambda: mmdets('retinanet/retinanet_r50_fpn_1x_coco.py'), r'no rpn_head.anchor_generator; Faster, Mask and'),
        (
            lambda: mmdets('double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py'),
            r"model.roi_head.bbox_head.type='DoubleConvFCBBoxHead' has no legacy form; Shared2FCBBoxHead and",
        ),
        (
            lambda: mmdets(FASTER, test_dataloader=dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile')]))),
            'test_dataloader.dataset.pipeline has no step Resize',
        ),
        (
            lambda: mmdets(FASTER, val_dataloader=dict(dataset=dict(pipeline=[NO_RATIO]))),
            'val_dataloader.dataset.pipeline: Resize has a legacy form only with keep_ratio=True',
        ),
    ],
)
def test_what_has_no_legacy_geometry_is_named(cfg, said):
    with pytest.raises(ConfigError, match=said):
        use_geometry(cfg(), MMDET_V1)
    with pytest.raises(ConfigError, match=r"geometry 'mmdet' is unknown; write one of: mmdet-v1, maskrcnn-benchmark"):
        use_geometry(cfg(), 'mmdet')


def test_the_option_of_the_commands(capsys):
    def config_of(name, *options):
        return load_config(parse_args([str(CONFIGS / name), 'CKPT', *options]))

    name = 'cbn/mask-rcnn_r50_fpn_cbn_1x_coco.py'
    cfg = config_of(name, '--geometry', MMDET_V1, '--norm', 'bnet5')
    assert cfg.model.rpn_head.anchor_generator.type == 'PlusOneAnchorGenerator'
    assert cfg.work_dir == './work_dirs/mask-rcnn_r50_fpn_cbn_1x_coco_bnet5_mmdet-v1'
    assert config_of(name).model.rpn_head.anchor_generator.type == 'AnchorGenerator'
    with pytest.raises(UserError, match='--geometry maskrcnn-benchmark: the model has no rpn_head'):
        load_config(parse_args(['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', 'CKPT', '--geometry', CONVENTIONS[1]]))
    with pytest.raises(SystemExit):
        parse_args([name, 'CKPT', '--geometry', 'v1'])
    assert "--geometry: invalid choice: 'v1' (choose from" in capsys.readouterr().err


def tiny_model(name, norm=None, **test_cfg):
    """The detector of a config, with the norms of a name, at a small width, with weights that find something."""
    cfg = copy.deepcopy(published(CONFIGS / name))
    if norm is not None:
        cfg.model = apply_norm(cfg.model, norm)
    head = cfg.model.roi_head.bbox_head
    # A list of norms is AN's, whose groups must divide the width.
    for part in (cfg.model.neck, *(head if isinstance(head, list) else [head]), cfg.model.roi_head.get('mask_head')):
        norms = (part or {}).get('norm_cfg') or []
        for norm in norms if isinstance(norms, list) else [norms]:
            if norm['type'] in ('GN', 'AN'):
                norm['num_groups'] = 4
    small = dict(in_channels=8, num_classes=3)
    cfg.model.backbone.update(base_channels=8, depth=50, init_cfg=None)
    cfg.model.neck.update(in_channels=[32, 64, 128, 256], out_channels=8)
    cfg.model.rpn_head.update(in_channels=8, feat_channels=8)
    cfg.model.roi_head.bbox_roi_extractor.out_channels = 8
    for part in head if isinstance(head, list) else [head]:
        part.update(small, fc_out_channels=16)
        if 'conv_out_channels' in part:
            part.conv_out_channels = 8
    if 'mask_head' in cfg.model.roi_head:
        cfg.model.roi_head.mask_roi_extractor.out_channels = 8
        cfg.model.roi_head.mask_head.update(small, conv_out_channels=8)
    cfg.model.test_cfg.rpn.update(nms_pre=30, max_per_img=20)
    cfg.model.test_cfg.rcnn.update(test_cfg)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(tuple(f'{part}.weight' for part in ('_cls', '_reg', 'conv_logits'))):
                parameter.normal_(0, 0.5)
    return model


def sample(height, width, factor):
    meta = dict(
        img_id=0, img_path='', ori_shape=(round(height / factor), round(width / factor)), img_shape=(height, width),
        batch_input_shape=(128, 160), pad_shape=(128, 160), scale_factor=(factor, factor),
    )  # fmt: skip
    return DetDataSample(metainfo=meta)


@pytest.mark.parametrize('name', ONE_PER_KIND)
def test_a_row_with_geometry_runs_a_test_step(name):
    model = tiny_model(name, score_thr=0.0, max_per_img=10)
    image = torch.randint(0, 256, (3, 100, 150), dtype=torch.uint8)
    data = dict(inputs=[image], data_samples=[sample(100, 150, 2.0)])
    with torch.no_grad():
        result = model.test_step(data)[0].pred_instances
    assert len(result) == 10 and result.scores.isfinite().all()
    boxes = result.bboxes
    # Inside the original image of 50 x 75 pixels, counted inclusively: the last column of 150 is number 149.
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 149 / 2 + 1).all() and (boxes[:, 3] <= 99 / 2 + 1).all()
    if 'mask' in name:
        assert result.masks.shape == (10, 50, 75)


# Heads of each kind, and names for the backbone, for the heads, and for one norm per convolution.
TRAINED = [(name, norm) for name in ONE_PER_KIND for norm in (None, 'bnet5', 'gn', 'an-gn-head', 'mabn')]


@pytest.mark.parametrize('name, norm', TRAINED)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_published_checkpoint_can_be_trained_on_with_any_norm(name, norm):
    model = tiny_model(name, norm).train()
    data = sample(100, 150, 1.0)
    data.gt_instances = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 60, 80], [70, 20, 140, 90]]), labels=torch.tensor([0, 2]),
        masks=BitmapMasks(np.ones((2, 100, 150), np.uint8), 100, 150),
    )  # fmt: skip
    losses = model.loss(torch.randn(1, 3, 128, 160), [data])
    total = sum(sum(value) if isinstance(value, list) else value for key, value in losses.items() if 'loss' in key)
    total.backward()
    assert total.isfinite()
    assert model.rpn_head.rpn_reg.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('name', [ONE_PER_KIND[1], ONE_PER_KIND[2]])
def test_a_whole_detector_finds_what_the_legacy_code_would(name):
    """From the feature maps on, every step by the formulas above; only convolutions are the model's."""
    convention = CONVENTION_OF[name.split('/')[0]]
    model = tiny_model(name, score_thr=0.2, max_per_img=8)
    height, width, factor = 100, 150, 2.5
    torch.manual_seed(1)
    image = torch.randn(1, 3, 128, 160)
    meta = sample(height, width, factor)
    with torch.no_grad():
        features = model.extract_feat(image)
        ours = model.predict(image, [meta])[0].pred_instances

        # RPN: the best of each level, decoded and clipped, NMS per level, the best of all.
        boxes, scores = [], []
        for stride, logits, deltas in zip(STRIDES, *model.rpn_head(features)):
            anchors = legacy_grid(stride, *logits.shape[2:], convention)
            level_scores = logits[0].sigmoid().permute(1, 2, 0).reshape(-1).numpy()
            best = np.argsort(-level_scores)[:30]
            deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4).numpy()[best]
            decoded = legacy_decode(anchors[best], deltas, (1, 1, 1, 1), convention, (height, width))
            kept = legacy_nms(decoded, level_scores[best], 0.7)
            boxes.append(decoded[kept])
            scores.append(level_scores[best][kept])
        order = np.argsort(-np.concatenate(scores))[:20]
        proposals = np.concatenate(boxes)[order]

        def pool(boxes, bins):
            levels = legacy_levels(boxes, convention)
            maps = [feature[0].numpy() for feature in features]
            rois = [legacy_roi_align(maps[k], box, STRIDES[k], bins, convention) for box, k in zip(boxes, levels)]
            return torch.from_numpy(np.stack(rois)).float()

        logits, deltas = model.roi_head.bbox_head(pool(proposals, 7))
        deltas = deltas.view(-1, 3, 4).numpy()
        decoded = [legacy_decode(proposals, deltas[:, c], STDS, convention, (height, width)) for c in range(3)]
        original, resized, want_scores, want_labels = legacy_detections(
            np.stack(decoded, 1), logits.softmax(1)[:, :3].numpy(), convention, (factor, factor), 0.5, 0.2, 8
        )
        probabilities = model.roi_head.mask_head(pool(resized, 14)).sigmoid().numpy()

    assert len(ours) == len(original) > 2
    np.testing.assert_array_equal(ours.labels, want_labels)
    np.testing.assert_allclose(ours.scores, want_scores, atol=1e-4)
    np.testing.assert_allclose(inclusive(ours.bboxes), original, atol=5e-3)
    for mask, probability, label, box in zip(ours.masks.numpy(), probabilities, want_labels, original):
        want = legacy_paste(probability[label], box, 40, 60, convention)
        near = abs(want - 0.5) < 1e-4
        np.testing.assert_array_equal(mask[~near], (want > 0.5)[~near])
