"""The PyTorch ops against literal loops, gradcheck, mmdet's models and, if present, compiled mmcv.

Wrappers of ``mmcv.ops`` are pointed at the PyTorch ops, so these tests mean the same whether or not the installed mmcv
is compiled. With MMDET_NORMS_OPS=torchvision, they are about torchvision's.
"""

import math
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from mmdet_norms.compat import mmcv_ops
from mmdet_norms.compat.mmcv_ops import extension, in_torch
from mmdet_norms.compat.mmcv_ops import nms as nms_in_torch
from mmdet_norms.compat.mmcv_ops import roi_align as roi_align_in_torch

ACTIVE = mmcv_ops.install()
KIND = os.environ.get('MMDET_NORMS_OPS', 'torch')
# As in the stand-in: what torchvision does not know is computed by PyTorch.
OPS = types.SimpleNamespace(**{name: extension.operator(name) for name in in_torch.OPS})
import mmcv.ops  # noqa: E402  (needs the ops in place)

needs_compiled = pytest.mark.skipif(
    ACTIVE != 'compiled', reason='the installed mmcv has no compiled ops to compare with'
)
needs_lite = pytest.mark.skipif(
    ACTIVE != 'pytorch', reason='the installed mmcv is compiled, so the stand-in is not used'
)

# As mmcv has them, with nothing around.
COMPILED = types.SimpleNamespace(**{name: getattr(mmcv._ext, name).own for name in in_torch.OPS})

# sampling_ratio, aligned
GEOMETRIES = [(0, True), (0, False), (1, True), (1, False), (3, True), (3, False)]


@pytest.fixture(autouse=True)
def wrappers_call_the_pytorch_ops(monkeypatch):
    monkeypatch.setenv('MMDET_NORMS_OPS', KIND)
    for name in ('nms', 'roi_align', 'focal_loss', 'deform_conv', 'modulated_deform_conv'):
        # By sys.modules: the package attributes of these names are the functions.
        monkeypatch.setattr(sys.modules[f'mmcv.ops.{name}'], 'ext_module', OPS)


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


def roi_align(features, rois, bins, scale=1.0, sampling_ratio=0, aligned=True, ops=OPS):
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


def roi_align_grad(grad, rois, shape, scale=1.0, sampling_ratio=0, aligned=True, ops=OPS):
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
        assert OPS.nms(boxes, scores, threshold, offset).tolist() == expected


@pytest.mark.parametrize('block', [1, 2, 7, 64])
def test_nms_does_not_depend_on_the_block_size(monkeypatch, block):
    monkeypatch.setattr(nms_in_torch, 'NMS_BLOCK', block)
    boxes, scores = random_boxes(150, 0, dtype=torch.float64)
    expected = loop_nms(boxes.tolist(), scores.tolist(), 0.3, 0)
    assert OPS.nms(boxes, scores, 0.3).tolist() == expected


def test_nms_settles_a_chain_in_which_each_box_overlaps_only_its_neighbours():
    # Every second box survives, and each decision hangs on the one before.
    x = torch.arange(300.0) * 4
    boxes = torch.stack((x, torch.zeros(300), x + 10, torch.full((300,), 10.0)), 1)
    assert OPS.nms(boxes, -x, 0.3).tolist() == list(range(0, 300, 2))


@pytest.mark.parametrize('block', [1, 128])
def test_nms_prefers_the_first_of_equal_scores_and_needs_more_than_the_threshold(monkeypatch, block):
    monkeypatch.setattr(nms_in_torch, 'NMS_BLOCK', block)
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 2, 2]])
    scores = torch.ones(3)
    assert OPS.nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert OPS.nms(boxes, scores, 0.49).tolist() == [0]
    apart = torch.arange(1000.0)[:, None] * 3 + torch.tensor([0.0, 0, 2, 2])
    assert OPS.nms(apart, torch.ones(1000), 0.5).tolist() == list(range(1000))


def test_nms_of_nothing_is_nothing():
    kept = OPS.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64
    dets, kept = mmcv.ops.batched_nms(
        torch.zeros(3, 4), torch.zeros(3), torch.zeros(3), dict(type='nms', iou_threshold=0.5, score_threshold=0.1)
    )
    assert dets.shape == (0, 5) and kept.shape == (0,)


def test_nms_keeps_empty_boxes_whose_overlap_is_undefined():
    assert OPS.nms(torch.ones(3, 4), torch.arange(3.0), 0.5).tolist() == [2, 1, 0]


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
    monkeypatch.setattr(roi_align_in_torch, 'ROI_ALIGN_BUDGET', 300)
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


# --- Deformable convolution ---
# kernel, stride, padding, dilation, groups, deform_groups, images
DEFORMABLE = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 2),
    ((3, 3), (2, 1), (1, 1), (1, 1), 2, 1, 1),
    ((3, 3), (1, 1), (2, 2), (2, 2), 1, 2, 1),
    ((3, 3), (1, 1), (0, 0), (1, 1), 4, 2, 3),
    ((1, 1), (1, 1), (0, 0), (1, 1), 4, 4, 2),
    ((1, 3), (1, 2), (0, 3), (1, 2), 2, 4, 1),
]


def loop_deform_conv(x, offset, mask, weight, grad, stride, padding, dilation, groups, deform_groups):
    """The sum as it is written, and its derivatives: output, then by x, offset, mask and weight."""
    channels, (height, width) = x.shape[1] // groups, x.shape[2:]
    results = [np.zeros(grad.shape), *(np.zeros(a.shape) for a in (x, offset, mask, weight))]
    output, grad_x, grad_offset, grad_mask, grad_weight = results
    taps = weight.shape[2] * weight.shape[3]
    for n, o, p, q in np.ndindex(grad.shape):
        for c, i, j in np.ndindex(weight.shape[1:]):
            channel = o // (len(weight) // groups) * channels + c
            tap = channel // (x.shape[1] // deform_groups) * taps + i * weight.shape[3] + j
            h = p * stride[0] - padding[0] + i * dilation[0] + offset[n, 2 * tap, p, q]
            w = q * stride[1] - padding[1] + j * dilation[1] + offset[n, 2 * tap + 1, p, q]
            if not (h > -1 and w > -1 and h < height and w < width):
                continue
            factor, coefficient, up = mask[n, tap, p, q], weight[o, c, i, j], grad[n, o, p, q]
            top, left = math.floor(h), math.floor(w)
            for a, b in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= a < height and 0 <= b < width:
                    by_h, by_w = 1 - abs(h - a), 1 - abs(w - b)
                    value = x[n, channel, a, b]
                    output[n, o, p, q] += coefficient * factor * by_h * by_w * value
                    grad_x[n, channel, a, b] += up * coefficient * factor * by_h * by_w
                    grad_weight[o, c, i, j] += up * factor * by_h * by_w * value
                    grad_mask[n, tap, p, q] += up * coefficient * by_h * by_w * value
                    sign_h, sign_w = 1 if a > top else -1, 1 if b > left else -1
                    grad_offset[n, 2 * tap, p, q] += up * coefficient * factor * sign_h * by_w * value
                    grad_offset[n, 2 * tap + 1, p, q] += up * coefficient * factor * sign_w * by_h * value
    return results


def deformable(kernel, stride, padding, dilation, groups, deform_groups, images, seed=0, dtype=torch.float64):
    """Input, offset, mask, weight and a gradient: places between pixels, on them, off the image and far off it."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 4, 5, 6, generator=g, dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, *kernel, generator=g, dtype=torch.float64)
    places = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip((5, 6), kernel, stride, padding, dilation)
    ]
    taps = deform_groups * kernel[0] * kernel[1]
    offset = torch.randn(images, 2 * taps, *places, generator=g, dtype=torch.float64) * 2
    kind = torch.randint(4, offset.shape, generator=g)
    offset[kind == 0] = offset[kind == 0].round()
    offset[(kind == 1) & (offset.abs() > 2)] *= 10
    mask = torch.rand(images, taps, *places, generator=g, dtype=torch.float64)
    grad = torch.randn(images, 8, *places, generator=g, dtype=torch.float64)
    return [value.to(dtype) for value in (x, offset, mask, weight, grad)]


def with_gradients(conv, inputs, grad):
    """The output, and the gradient by each input."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    output = conv(*inputs)
    output.backward(grad)
    return [output.detach(), *(value.grad for value in inputs)]


@pytest.mark.parametrize('case', DEFORMABLE)
def test_deformable_convolution_and_its_gradients_equal_a_literal_float64_loop(case):
    x, offset, mask, weight, grad = deformable(*case)
    plain = loop_deform_conv(*(v.numpy() for v in (x, offset, torch.ones_like(mask), weight, grad)), *case[1:6])
    found = with_gradients(lambda *inputs: mmcv.ops.deform_conv2d(*inputs, *case[1:6]), (x, offset, weight), grad)
    for value, expected in zip(found, plain[:3] + plain[4:]):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
        assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize('case', DEFORMABLE)
def test_modulated_deformable_convolution_and_its_gradients_equal_a_literal_float64_loop(case):
    x, offset, mask, weight, grad = deformable(*case, seed=1)
    bias = torch.randn(8, dtype=torch.float64)
    output, *expected = loop_deform_conv(*(v.numpy() for v in (x, offset, mask, weight, grad)), *case[1:6])
    expected = [output + bias.numpy()[:, None, None], *expected, grad.numpy().sum((0, 2, 3))]
    inputs = x, offset, mask, weight, bias
    found = with_gradients(lambda *inputs: mmcv.ops.modulated_deform_conv2d(*inputs, *case[1:6]), inputs, grad)
    for value, wanted in zip(found, expected):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-12)
    without_bias = mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, None, *case[1:6])
    np.testing.assert_allclose(without_bias, output, rtol=0, atol=1e-12)


@pytest.mark.parametrize('case', DEFORMABLE)
def test_deformable_convolutions_pass_gradcheck_through_the_mmcv_wrappers(case):
    x, offset, mask, weight, _ = deformable(*case)
    # Differentiable between pixels only.
    offset = offset.floor().clamp_(-3, 3) + torch.rand(offset.shape).double() * 0.8 + 0.1
    bias = torch.randn(8, dtype=torch.float64)
    x, offset, mask, weight, bias = (v.requires_grad_() for v in (x, offset, mask, weight, bias))
    plain, modulated = (x, offset, weight), (x, offset, mask, weight, bias)
    assert gradcheck(lambda *inputs: mmcv.ops.deform_conv2d(*inputs, *case[1:6]), plain, fast_mode=True)
    assert gradcheck(lambda *inputs: mmcv.ops.modulated_deform_conv2d(*inputs, *case[1:6]), modulated, fast_mode=True)


def test_the_derivative_by_an_offset_of_zero_is_that_to_the_next_pixel_and_none_off_the_image():
    # As compiled. It matters, because offsets start at 0, where the derivatives of the two sides differ.
    x = torch.tensor([[[[1.0, 3.0, 9.0]]]])
    offset = torch.zeros(1, 2, 3, 5, requires_grad=True)
    mmcv.ops.deform_conv2d(x, offset, torch.ones(1, 1, 1, 1), 1, 1).sum().backward()
    assert offset.grad[0, 1, 1].tolist() == [0, 2, 6, -9, 0]
    assert not offset.grad[0, :, ::2].any()


def test_a_place_counts_if_it_is_less_than_a_pixel_off_the_image_and_need_not_be_a_number():
    nan, inf = float('nan'), float('inf')
    places = [[0, 0], [-0.75, 0], [-1, 0], [1.75, 1], [2, 1], [0, 1.5], [nan, 0], [0, inf], [-inf, 0]]
    offset = torch.zeros(9, 8, 1, 1)
    offset[:, :2, 0, 0] = torch.tensor(places)
    weight = torch.tensor([[[[1.0, 0], [0, 0]]]])
    output, grad_x, grad_offset, _ = with_gradients(
        mmcv.ops.deform_conv2d, (torch.ones(9, 1, 2, 2), offset, weight), torch.ones(9, 1, 1, 1)
    )
    assert output.flatten().tolist() == grad_x.sum((1, 2, 3)).tolist() == [1, 0.25, 0, 0.25, 0, 0.5, 0, 0, 0]
    assert grad_offset.isfinite().all() and not grad_offset[[2, 4, 6, 7, 8]].any()


def test_deformable_convolution_at_offset_zero_is_a_convolution():
    x, settings = torch.randn(3, 6, 9, 7), dict(stride=2, padding=1, groups=2)
    layer = mmcv.ops.DeformConv2d(6, 8, 3, **settings)
    expected = torch.nn.functional.conv2d(x, layer.weight, None, **settings)
    torch.testing.assert_close(layer(x, torch.zeros(3, 18, 5, 4)), expected)
    layer = mmcv.ops.ModulatedDeformConv2d(6, 8, 3, **settings)
    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias, **settings)
    torch.testing.assert_close(layer(x, torch.zeros(3, 18, 5, 4), torch.ones(3, 9, 5, 4)), expected)


@pytest.mark.parametrize('step', [1, 2, 4, 32])
def test_deformable_convolution_does_not_depend_on_how_many_images_are_taken_at_a_time(step):
    x, offset, _, weight, grad = deformable(*DEFORMABLE[0][:6], 4)

    def conv(*inputs):
        return mmcv.ops.deform_conv2d(*inputs, 1, 1, 1, 1, 1, False, step)

    whole = with_gradients(conv, (x, offset, weight), grad)
    single = [with_gradients(conv, (x[[i]], offset[[i]], weight), grad[[i]]) for i in range(4)]
    for value, parts in zip(whole[:3], zip(*single)):
        torch.testing.assert_close(value, torch.cat(parts))
    torch.testing.assert_close(whole[3], sum(parts[3] for parts in single))


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_deformable_convolution_in_half_precision_is_the_fp32_result_rounded_once(dtype, autocast):
    x, offset, mask, weight, grad = deformable(*DEFORMABLE[2], dtype=dtype)
    settings, bias = DEFORMABLE[2][1:6], torch.randn(8).to(dtype)
    inputs = x, offset, mask, weight, bias
    conv = mmcv.ops.modulated_deform_conv2d
    exact = with_gradients(lambda *inputs: conv(*inputs, *settings), [v.float() for v in inputs], grad.float())
    with torch.autocast('cpu', dtype, enabled=autocast):
        found = with_gradients(lambda *inputs: conv(*inputs, *settings), inputs, grad)
    for value, expected in zip(found, exact):
        assert value.dtype == dtype and torch.equal(value, expected.to(dtype))


def test_deformable_convolution_says_which_shape_does_not_fit():
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 3, 3)
    with pytest.raises(ValueError, match=r'offset has shape \(1, 18, 5, 5\), but needs \(1, 18, 3, 3\)'):
        mmcv.ops.deform_conv2d(x, torch.zeros(1, 18, 5, 5), weight)
    with pytest.raises(ValueError, match=r'mask has shape \(1, 18, 3, 3\), but needs \(1, 9, 3, 3\)'):
        mmcv.ops.modulated_deform_conv2d(x, torch.zeros(1, 18, 3, 3), torch.zeros(1, 18, 3, 3), weight)
    with pytest.raises(ValueError, match=r'\(4, 4, 3, 3\) with groups=2 and deform_groups=1 does not fit 4 channels'):
        mmcv.ops.deform_conv2d(x, torch.zeros(1, 18, 3, 3), weight, 1, 0, 1, 2)


# --- The stand-in ---
@needs_lite
def test_an_op_that_is_not_supplied_says_what_to_do_when_called():
    with pytest.raises(
        NotImplementedError,
        match=r'roi_pool_forward.*mmcv-lite.*only nms, '
        r'.*pip uninstall mmcv-lite.*2\.2\.0',
    ):
        mmcv.ops.roi_pool(torch.zeros(1, 2, 8, 8), torch.zeros(1, 5), 2)


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


def test_install_is_idempotent_and_says_what_is_active(monkeypatch):
    monkeypatch.delenv('MMDET_NORMS_OPS')
    before = sys.modules.get('mmcv._ext')
    assert mmcv_ops.install() == mmcv_ops.install() == mmcv_ops.active() == ACTIVE
    assert sys.modules.get('mmcv._ext') is before
    assert ('PyTorch' if ACTIVE == 'pytorch' else 'compiled') in mmcv_ops.describe()


@needs_lite
def test_one_line_is_logged_on_first_use_and_not_on_import():
    """By the first process of a run and by no other one."""
    script = (
        'from mmdet_norms.compat import mmcv_ops; mmcv_ops.install()\n'
        'import os, torch, mmcv.ops\n'
        'print("imported", flush=True)\n'
        "os.environ['RANK'] = '0' if (child := os.fork()) else '1'\n"
        'for _ in range(3): mmcv.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n'
        'if child: os.wait(), print("used")'
    )
    out = subprocess.run(
        [sys.executable, '-c', script],
        env={**os.environ, 'MMDET_NORMS_OPS': 'torch'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    before, after = out.stdout.split('imported')
    assert 'mmcv ops' not in before
    assert after.count('mmcv ops: PyTorch') == 1 and after.endswith('used\n')


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
        'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
        'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
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
    if 'dcn' in cfg.backbone:
        cfg.backbone.update(depth=50, base_channels=16)  # a BasicBlock has none
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
    features, rois = torch.randn(2, 8, 40, 60), random_rois(200, 2, 400, seed=5)
    grad = torch.randn(200, 8, 7, 7)
    geometry = (0.125, sampling_ratio, aligned)
    torch.testing.assert_close(
        roi_align(features, rois, (7, 7), *geometry),
        roi_align(features, rois, (7, 7), *geometry, ops=COMPILED),
        rtol=0,
        atol=2e-5,
    )
    torch.testing.assert_close(
        roi_align_grad(grad, rois, features.shape, *geometry),
        roi_align_grad(grad, rois, features.shape, *geometry, ops=COMPILED),
        rtol=0,
        atol=2e-4,
    )


@needs_compiled
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_equals_compiled_mmcv(offset):
    # With distinct scores: the compiled op sorts equal ones in no particular order.
    for seed in range(5):
        boxes, scores = random_boxes(2000, seed, size=300.0)
        assert len(scores.unique()) == 2000
        for threshold in (0.3, 0.7):
            assert torch.equal(
                OPS.nms(boxes, scores, threshold, offset), COMPILED.nms(boxes, scores, threshold, offset)
            )


@needs_compiled
@pytest.mark.parametrize('method', [0, 1, 2])
def test_soft_nms_equals_compiled_mmcv_also_among_equal_scores(method):
    for seed in range(5):
        boxes, scores = random_boxes(200, seed)
        scores = (scores * 20).round() / 20
        dets = torch.zeros(2, 200, 5)
        settings = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=0)
        inds = OPS.softnms(boxes, scores, dets[0], **settings)
        expected = COMPILED.softnms(boxes, scores, dets[1], **settings)
        assert inds.tolist() == expected.tolist()
        torch.testing.assert_close(dets[0, : len(inds)], dets[1, : len(inds)], rtol=1e-5, atol=1e-6)


@needs_compiled
@pytest.mark.parametrize('case', DEFORMABLE)
def test_deformable_convolutions_and_their_gradients_equal_compiled_mmcv(case, monkeypatch):
    x, offset, mask, weight, grad = deformable(*case, dtype=torch.float32)
    bias = torch.randn(8)
    found = []
    for ops in (OPS, COMPILED):
        for name in ('deform_conv', 'modulated_deform_conv'):
            monkeypatch.setattr(sys.modules[f'mmcv.ops.{name}'], 'ext_module', ops)
        found.append(
            [
                *with_gradients(lambda *inputs: mmcv.ops.deform_conv2d(*inputs, *case[1:6]), (x, offset, weight), grad),
                *with_gradients(
                    lambda *inputs: mmcv.ops.modulated_deform_conv2d(*inputs, *case[1:6]),
                    (x, offset, mask, weight, bias),
                    grad,
                ),
            ]
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
