"""The PyTorch ops against literal loops, gradcheck, mmdet's models and, if present, compiled mmcv.

Wrappers of ``mmcv.ops`` are pointed at the PyTorch ops, so these tests mean the same whether or
not the installed mmcv is compiled.
"""

import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from mmdet_norms.compat import mmcv_ops

ACTIVE = mmcv_ops.install()
import mmcv.ops  # noqa: E402  (needs the ops in place)

needs_compiled = pytest.mark.skipif(
    ACTIVE != 'compiled', reason='the installed mmcv has no compiled ops to compare with'
)
needs_lite = pytest.mark.skipif(
    ACTIVE != 'pytorch', reason='the installed mmcv is compiled, so the stand-in is not used'
)

# sampling_ratio, aligned
GEOMETRIES = [(0, True), (0, False), (1, True), (1, False), (3, True), (3, False)]


@pytest.fixture(autouse=True)
def wrappers_call_the_pytorch_ops(monkeypatch):
    for name in ('nms', 'roi_align', 'focal_loss'):
        # By sys.modules: the package attributes of these names are the functions.
        monkeypatch.setattr(sys.modules[f'mmcv.ops.{name}'], 'ext_module', mmcv_ops)


def random_boxes(count, seed, size=100.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(count, 2, generator=g, dtype=dtype) * size
    wh = torch.rand(count, 2, generator=g, dtype=dtype) * size / 2
    return torch.cat((xy, xy + wh), 1), torch.rand(count, generator=g, dtype=dtype)


def random_rois(count, images, size, seed, dtype=torch.float32):
    """RoIs inside, across the border, off the image, empty, and with corners on pixel centres."""
    g = torch.Generator().manual_seed(seed)
    xy = (torch.rand(count, 2, generator=g, dtype=dtype) * 2 - 0.5) * size
    wh = torch.rand(count, 2, generator=g, dtype=dtype) * size
    wh[::7] = 0
    xy[::5], wh[::5] = xy[::5].round(), wh[::5].round()
    wh[1::9] *= 4
    image = torch.randint(images, (count, 1), generator=g).to(dtype)
    return torch.cat((image, xy, xy + wh), 1)


def roi_align(features, rois, bins, scale=1.0, sampling_ratio=0, aligned=True, ops=mmcv_ops):
    output = features.new_full((len(rois), features.shape[1], *bins), float('nan'))
    unused = features.new_zeros(0)
    ops.roi_align_forward(
        features,
        rois,
        output,
        unused,
        unused,
        aligned_height=bins[0],
        aligned_width=bins[1],
        spatial_scale=scale,
        sampling_ratio=sampling_ratio,
        pool_mode=1,
        aligned=aligned,
    )
    return output


def roi_align_grad(grad, rois, shape, scale=1.0, sampling_ratio=0, aligned=True, ops=mmcv_ops):
    grad_input = grad.new_zeros(shape)
    unused = grad.new_zeros(0)
    ops.roi_align_backward(
        grad,
        rois,
        unused,
        unused,
        grad_input,
        aligned_height=grad.shape[2],
        aligned_width=grad.shape[3],
        spatial_scale=scale,
        sampling_ratio=sampling_ratio,
        pool_mode=1,
        aligned=aligned,
    )
    return grad_input


# --- Literal loops ---
def box_iou(a, b, offset):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def loop_nms(boxes, scores, threshold, offset):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(box_iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def loop_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    left, picked = dict(enumerate(scores)), []
    while left:
        best = max(left, key=left.get)
        picked.append((best, left.pop(best)))
        for i in list(left):
            iou = box_iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                left[i] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                left[i] *= 1 - iou if method == 'linear' else 0
            if left[i] < min_score:
                del left[i]
    return picked


def bilinear(image, y, x):
    """Value and the four (row, column, weight) of a bilinear sample of an (H, W) array."""
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0, []
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    corners = [
        (min(row, height - 1), min(column, width - 1), wy * wx)
        for row, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0))
        for column, wx in ((x0, 1 - (x - x0)), (x0 + 1, x - x0))
    ]
    return sum(image[r, c] * w for r, c, w in corners), corners


def loop_roi_align(features, rois, bins, scale, sampling_ratio, aligned, grad=None):
    """RoIAlign sample by sample; with ``grad`` also the gradient by the features."""
    output = np.zeros((len(rois), features.shape[1], *bins))
    grad_input = np.zeros(features.shape)
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in corners)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1), max(h, 1)
        bin_h, bin_w = h / bins[0], w / bins[1]
        grid_h = sampling_ratio or math.ceil(bin_h)
        grid_w = sampling_ratio or math.ceil(bin_w)
        count = max(grid_h * grid_w, 1)
        for c, i, j in np.ndindex(output.shape[1:]):
            plane = features[int(image), c]
            for iy in range(grid_h):
                for ix in range(grid_w):
                    value, taps = bilinear(
                        plane, y1 + (i + (iy + 0.5) / grid_h) * bin_h, x1 + (j + (ix + 0.5) / grid_w) * bin_w
                    )
                    output[r, c, i, j] += value / count
                    for row, column, weight in taps if grad is not None else ():
                        grad_input[int(image), c, row, column] += weight * grad[r, c, i, j] / count
    return output, grad_input


# --- nms ---
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.0, 0.3, 0.7, 1.0])
def test_nms_equals_a_literal_loop(threshold, offset):
    for seed in range(5):
        boxes, scores = random_boxes(60, seed, dtype=torch.float64)
        expected = loop_nms(boxes.tolist(), scores.tolist(), threshold, offset)
        assert mmcv_ops.nms(boxes, scores, threshold, offset).tolist() == expected


@pytest.mark.parametrize('block', [1, 2, 7, 64])
def test_nms_does_not_depend_on_the_block_size(monkeypatch, block):
    monkeypatch.setattr(mmcv_ops, 'NMS_BLOCK', block)
    boxes, scores = random_boxes(150, 0, dtype=torch.float64)
    expected = loop_nms(boxes.tolist(), scores.tolist(), 0.3, 0)
    assert mmcv_ops.nms(boxes, scores, 0.3).tolist() == expected


def test_nms_settles_a_chain_in_which_each_box_overlaps_only_its_neighbours():
    # Every second box survives, and each decision hangs on the one before.
    x = torch.arange(300.0) * 4
    boxes = torch.stack((x, torch.zeros(300), x + 10, torch.full((300,), 10.0)), 1)
    assert mmcv_ops.nms(boxes, -x, 0.3).tolist() == list(range(0, 300, 2))


@pytest.mark.parametrize('block', [1, 128])
def test_nms_prefers_the_first_of_equal_scores_and_needs_more_than_the_threshold(monkeypatch, block):
    monkeypatch.setattr(mmcv_ops, 'NMS_BLOCK', block)
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 2, 2]])
    scores = torch.ones(3)
    assert mmcv_ops.nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert mmcv_ops.nms(boxes, scores, 0.49).tolist() == [0]
    apart = torch.arange(1000.0)[:, None] * 3 + torch.tensor([0.0, 0, 2, 2])
    assert mmcv_ops.nms(apart, torch.ones(1000), 0.5).tolist() == list(range(1000))


def test_nms_of_nothing_is_nothing():
    kept = mmcv_ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64
    dets, kept = mmcv.ops.batched_nms(
        torch.zeros(3, 4), torch.zeros(3), torch.zeros(3), dict(type='nms', iou_threshold=0.5, score_threshold=0.1)
    )
    assert dets.shape == (0, 5) and kept.shape == (0,)


def test_nms_keeps_empty_boxes_whose_overlap_is_undefined():
    assert mmcv_ops.nms(torch.ones(3, 4), torch.arange(3.0), 0.5).tolist() == [2, 1, 0]


@pytest.mark.parametrize('split_thr', [10000, 10])
def test_batched_nms_treats_classes_apart(split_thr):
    boxes, scores = random_boxes(200, 3)
    classes = torch.randint(40, (200,), generator=torch.Generator().manual_seed(0))
    dets, kept = mmcv.ops.batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.3, split_thr=split_thr))
    expected = []
    for c in range(40):
        mine = (classes == c).nonzero()[:, 0]
        expected += mine[loop_nms(boxes[mine].tolist(), scores[mine].tolist(), 0.3, 0)].tolist()
    assert kept.tolist() == sorted(expected, key=lambda i: -scores[i])
    assert torch.equal(dets, torch.cat((boxes, scores[:, None]), 1)[kept])


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms_equals_a_literal_loop(method, offset):
    for seed in range(4):
        boxes, scores = random_boxes(50, seed, dtype=torch.float64)
        expected = loop_soft_nms(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.05, method, offset)
        dets, inds = mmcv.ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
        assert inds.tolist() == [i for i, _ in expected]
        assert torch.equal(dets[:, :4], boxes[inds])
        assert dets[:, 4].tolist() == pytest.approx([score for _, score in expected], rel=1e-12)


def test_soft_nms_leaves_its_inputs_alone_and_accepts_nothing():
    boxes, scores = random_boxes(20, 0)
    before = boxes.clone(), scores.clone()
    mmcv.ops.soft_nms(boxes, scores)
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])
    dets, inds = mmcv.ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5) and inds.shape == (0,)


# --- RoIAlign ---
@pytest.mark.parametrize(('sampling_ratio', 'aligned'), GEOMETRIES)
@pytest.mark.parametrize('shape', [(2, 2, 9, 12), (2, 1, 1, 6)])
def test_roi_align_equals_a_literal_float64_loop(shape, sampling_ratio, aligned):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rois = random_rois(40, 2, 20, seed=1, dtype=torch.float64)
    grad = torch.randn(40, shape[1], 3, 2, dtype=torch.float64)
    expected, expected_grad = loop_roi_align(
        features.numpy(), rois.tolist(), (3, 2), 0.5, sampling_ratio, aligned, grad.numpy()
    )
    output = roi_align(features, rois, (3, 2), 0.5, sampling_ratio, aligned)
    grad_input = roi_align_grad(grad, rois, shape, 0.5, sampling_ratio, aligned)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grad_input, expected_grad, rtol=0, atol=1e-12)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(('sampling_ratio', 'aligned'), GEOMETRIES)
def test_roi_align_passes_gradcheck_through_the_mmcv_wrapper(sampling_ratio, aligned):
    features = torch.randn(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    rois = random_rois(5, 2, 5, seed=2, dtype=torch.float64)
    assert gradcheck(lambda x: mmcv.ops.roi_align(x, rois, (2, 3), 1.0, sampling_ratio, 'avg', aligned), features)


def test_roi_align_does_not_depend_on_the_chunk_size(monkeypatch):
    features, rois = torch.randn(2, 3, 20, 20).double(), random_rois(30, 2, 20, 3).double()
    grad = torch.randn(30, 3, 4, 4).double()
    whole = roi_align(features, rois, (4, 4)), roi_align_grad(grad, rois, features.shape)
    monkeypatch.setattr(mmcv_ops, 'ROI_ALIGN_BUDGET', 300)
    torch.testing.assert_close(roi_align(features, rois, (4, 4)), whole[0])
    torch.testing.assert_close(roi_align_grad(grad, rois, features.shape), whole[1])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_in_half_precision_is_the_fp32_result_rounded_once(dtype):
    features, rois = torch.randn(2, 4, 16, 16).to(dtype), random_rois(20, 2, 16, 4).to(dtype)
    output = roi_align(features, rois, (7, 7))
    assert output.dtype == dtype
    assert torch.equal(output, roi_align(features.float(), rois.float(), (7, 7)).to(dtype))
    grad = torch.randn_like(output)
    grad_input = roi_align_grad(grad, rois, features.shape)
    assert torch.equal(grad_input, roi_align_grad(grad.float(), rois.float(), features.shape).to(dtype))


def test_roi_align_of_no_rois_is_empty_and_has_zero_gradient():
    features = torch.randn(1, 3, 8, 8, requires_grad=True)
    output = mmcv.ops.roi_align(features, torch.zeros(0, 5), (7, 7))
    assert output.shape == (0, 3, 7, 7)
    output.sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_gives_zero_for_rois_that_are_not_finite(sampling_ratio):
    features = torch.ones(1, 2, 8, 8)
    nan, inf = float('nan'), float('inf')
    rois = torch.tensor([[0, nan, 0, 4, 4], [0, 0, 0, inf, 4], [0, -inf, 0, 4, inf], [0, 1, 1, 5, 5]])
    output = roi_align(features, rois, (2, 2), sampling_ratio=sampling_ratio)
    assert not output[:3].any() and (output[3] == 1).all()


def test_roi_align_gives_zero_where_all_rois_are_empty():
    features = torch.ones(1, 2, 8, 8)
    assert not roi_align(features, torch.tensor([[0, 3.0, 3, 3, 3]]), (2, 2)).any()


def test_roi_align_refuses_max_pooling_by_name():
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'.*uninstall mmcv-lite"):
        mmcv.ops.roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), 2, 1.0, 0, 'max')


# --- Focal loss ---
@pytest.mark.parametrize('weighted', [False, True])
def test_focal_loss_and_its_gradient_follow_the_formula(weighted):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 5, generator=g, dtype=torch.float64).mul(4).requires_grad_()
    target = torch.randint(5 if weighted else 6, (30,), generator=g)
    weight = torch.rand(5, generator=g, dtype=torch.float64) if weighted else None
    loss = mmcv.ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, weight, 'none')
    for n, c in np.ndindex(30, 5):
        p = 1 / (1 + math.exp(-logits[n, c].item()))
        hit = target[n] == c
        expected = -0.3 * (1 - p) ** 1.5 * math.log(p) if hit else -0.7 * p**1.5 * math.log(1 - p)
        assert loss[n, c].item() == pytest.approx(expected * (weight[target[n]].item() if weighted else 1), rel=1e-10)
    assert gradcheck(lambda x: mmcv.ops.sigmoid_focal_loss(x, target, 1.5, 0.3, weight, 'sum'), logits)


def test_focal_loss_equals_the_one_mmdet_uses_without_a_gpu():
    from mmdet.models.losses import focal_loss

    logits, target = torch.randn(40, 7), torch.randint(8, (40,))
    one_hot = torch.nn.functional.one_hot(target, 8)[:, :7]
    torch.testing.assert_close(
        focal_loss.sigmoid_focal_loss(logits, target), focal_loss.py_sigmoid_focal_loss(logits, one_hot)
    )


def test_focal_loss_is_finite_and_linear_for_hopeless_logits():
    logits = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(logits, torch.tensor([0]), 2.0, 0.25, None, 'none')
    torch.testing.assert_close(loss, torch.tensor([[0.25 * 200, 0.75 * 200]]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.75]]))


# --- The stand-in ---
@needs_lite
def test_an_op_that_is_not_supplied_says_what_to_do_when_called():
    layer = mmcv.ops.DeformConv2d(2, 2, 3)
    with pytest.raises(
        NotImplementedError,
        match=r'deform_conv_forward.*mmcv-lite.*only nms, '
        r'.*pip uninstall mmcv-lite.*2\.2\.0',
    ):
        layer(torch.zeros(1, 2, 8, 8), torch.zeros(1, 18, 6, 6))


@needs_lite
def test_the_stand_in_behaves_as_a_module():
    ext = sys.modules['mmcv._ext']
    assert mmcv._ext is ext
    assert not hasattr(ext, '__path__') and not hasattr(ext, '_private')
    assert 'stand-in' in ext.__doc__
    with pytest.raises((TypeError, pickle.PicklingError)):
        pickle.dumps(ext)
    # How mmengine asks for the full mmcv; it must get an answer, and a true one.
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert not mmcv_full_available()


def test_install_is_idempotent_and_says_what_is_active():
    before = sys.modules.get('mmcv._ext')
    assert mmcv_ops.install() == mmcv_ops.install() == mmcv_ops.active() == ACTIVE
    assert sys.modules.get('mmcv._ext') is before
    assert ('PyTorch' if ACTIVE == 'pytorch' else 'compiled') in mmcv_ops.describe()


@needs_lite
@pytest.mark.parametrize(('rank', 'lines'), [('0', 1), ('1', 0)])
def test_one_line_is_logged_on_first_use_and_not_on_import(rank, lines):
    script = (
        'from mmdet_norms.compat import mmcv_ops; mmcv_ops.install()\n'
        'import torch, mmcv.ops\n'
        'print("imported", flush=True)\n'
        'for _ in range(3): mmcv.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)'
    )
    out = subprocess.run(
        [sys.executable, '-c', script],
        env={**os.environ, 'RANK': rank},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    before, after = out.stdout.split('imported')
    assert 'mmcv ops' not in before
    assert after.count('mmcv ops: PyTorch') == lines


# --- Detectors ---
def shrink(cfg):
    """A stock detector config with few channels and classes, in place."""
    for key, value in cfg.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                shrink(part)
        if 'channels' in key and value in (256, 1024):
            cfg[key] = 32
        if key == 'num_classes':
            cfg[key] = 3
    return cfg


@pytest.mark.parametrize(
    'config',
    [
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        'retinanet/retinanet_r50_fpn_1x_coco.py',
    ],
)
def test_a_detector_takes_a_training_step_and_predicts(config):
    pytest.importorskip('mmdet')
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    configs = os.path.join(os.path.dirname(mmdet.__file__), '.mim', 'configs')
    cfg = shrink(Config.fromfile(os.path.join(configs, config)).model)
    cfg.backbone.update(depth=18, init_cfg=None, norm_eval=False, frozen_stages=-1)
    cfg.neck.in_channels = [64, 128, 256, 512]
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    data = demo_mm_inputs(2, [[3, 96, 128], [3, 128, 96]], num_classes=3, with_mask='mask' in config)
    data = model.data_preprocessor(data, True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    model.eval()
    with torch.no_grad():
        results = model(**data, mode='predict')
    assert len(results) == 2 and results[0].pred_instances.bboxes.shape[1] == 4


# --- Compiled mmcv ---
@needs_compiled
@pytest.mark.parametrize(('sampling_ratio', 'aligned'), GEOMETRIES)
def test_roi_align_equals_compiled_mmcv(sampling_ratio, aligned):
    import mmcv._ext as compiled

    features, rois = torch.randn(2, 8, 40, 60), random_rois(200, 2, 400, seed=5)
    grad = torch.randn(200, 8, 7, 7)
    geometry = (0.125, sampling_ratio, aligned)
    torch.testing.assert_close(
        roi_align(features, rois, (7, 7), *geometry),
        roi_align(features, rois, (7, 7), *geometry, ops=compiled),
        rtol=0,
        atol=2e-5,
    )
    torch.testing.assert_close(
        roi_align_grad(grad, rois, features.shape, *geometry),
        roi_align_grad(grad, rois, features.shape, *geometry, ops=compiled),
        rtol=0,
        atol=2e-4,
    )


@needs_compiled
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_equals_compiled_mmcv(offset):
    # With distinct scores: the compiled op sorts equal ones in no particular order.
    import mmcv._ext as compiled

    for seed in range(5):
        boxes, scores = random_boxes(2000, seed, size=300.0)
        assert len(scores.unique()) == 2000
        for threshold in (0.3, 0.7):
            assert torch.equal(
                mmcv_ops.nms(boxes, scores, threshold, offset), compiled.nms(boxes, scores, threshold, offset)
            )


@needs_compiled
@pytest.mark.parametrize('method', [0, 1, 2])
def test_soft_nms_equals_compiled_mmcv_also_among_equal_scores(method):
    import mmcv._ext as compiled

    for seed in range(5):
        boxes, scores = random_boxes(200, seed)
        scores = (scores * 20).round() / 20
        dets = torch.zeros(2, 200, 5)
        settings = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=0)
        inds = mmcv_ops.softnms(boxes, scores, dets[0], **settings)
        expected = compiled.softnms(boxes, scores, dets[1], **settings)
        assert inds.tolist() == expected.tolist()
        torch.testing.assert_close(dets[0, : len(inds)], dets[1, : len(inds)], rtol=1e-5, atol=1e-6)
