"""torchvision's compiled ops against those in PyTorch, which they replace on a GPU.

More of the same by ``MMDET_NORMS_OPS=torchvision pytest tests/compat/test_mmcv_ops.py``: literal loops, gradcheck.
"""

import warnings

import pytest
import torch

from mmdet_norms.compat.mmcv_ops import in_torch, in_torchvision

if problem := in_torchvision.load():
    pytest.skip(problem, allow_module_level=True)
BOTH = in_torch.OPS, in_torchvision.OPS


@pytest.fixture(params=['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu'])
def device(request):
    return request.param


def test_the_private_names_of_torchvision_and_torch_are_as_they_were():
    """A canary: torchvision's ops take and return what they did, and torch says for which devices it has them."""
    schemas = {name: str(getattr(torch.ops.torchvision, name).default._schema) for name in in_torchvision.OPERATORS}
    settings = 'stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups, use_mask'
    names = dict(
        nms='dets, scores, iou_threshold',
        roi_align='input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned',
        _roi_align_backward=(
            'grad, rois, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width, '
            'sampling_ratio, aligned'
        ),
        deform_conv2d=f'input, weight, offset, mask, bias, {settings}',
        _deform_conv2d_backward=f'grad, input, weight, offset, mask, bias, {settings}',
    )
    for name, schema in schemas.items():
        arguments = schema.partition('(')[2].partition(') -> ')[0]
        assert ', '.join(argument.split()[1] for argument in arguments.split(', ')) == names[name]
    assert schemas['_deform_conv2d_backward'].endswith('(Tensor, Tensor, Tensor, Tensor, Tensor)')
    assert in_torchvision.knows('cpu') and not in_torchvision.knows('mps')
    assert in_torchvision.knows('cuda') == (torch.ops.torchvision._cuda_version() != -1)


def boxes_of(count, seed, device, steps=None):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=g) * 100
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(count, generator=g)
    if steps:
        boxes, scores = (boxes / 10).round(), (scores * steps).round() / steps
    return boxes.to(device), scores.to(device)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('threshold', [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize('steps', [None, 5])
def test_nms_keeps_the_same_in_the_same_order(dtype, threshold, steps, device):
    # With steps many scores are equal, and many overlaps are exactly the threshold.
    for seed in range(4):
        boxes, scores = boxes_of(1000, seed, device, steps)
        kept = [ops['nms'](boxes.to(dtype), scores.to(dtype), threshold) for ops in BOTH]
        assert torch.equal(*kept) and kept[1].dtype == torch.int64


def test_nms_leaves_legacy_boxes_and_scores_of_more_precision_to_others(device):
    boxes, scores = boxes_of(10, 0, device)
    assert in_torchvision.OPS['nms'](boxes, scores, 0.5, offset=1) is NotImplemented
    assert in_torchvision.OPS['nms'](boxes, scores.double(), 0.5) is NotImplemented
    assert in_torchvision.OPS['nms'](boxes[:0], scores[:0], 0.5).shape == (0,)


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('sampling_ratio', 'aligned'), [(0, True), (0, False), (2, True), (3, False)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_roi_align_and_its_gradient_are_the_same(dtype, sampling_ratio, aligned, layout, device):
    g = torch.Generator().manual_seed(0)
    rois = torch.rand(60, 5, generator=g) * 400 - 40
    rois[:, 3:] += rois[:, 1:3]
    rois[:, 0] = torch.arange(60) % 2
    rois[3, 3:], rois[4, 3:] = rois[3, 1:3], rois[4, 1:3] - 20  # empty, inverted
    rois[5, 1:], rois[6, 2], rois[7, 3:] = float('nan'), float('-inf'), float('inf')
    x = torch.randn(2, 8, 25, 40, generator=g).to(device, dtype, memory_format=layout)
    rois, grad = rois.to(device, dtype), torch.randn(60, 8, 7, 5, generator=g).to(device, dtype, memory_format=layout)
    settings = (7, 5, 0.125, sampling_ratio, 1, aligned)
    unused = x.new_zeros(0)
    outputs, grads = [], []
    for ops in BOTH:
        outputs.append(torch.full_like(grad, float('nan')))
        ops['roi_align_forward'](x, rois, outputs[-1], unused, unused, *settings)
        grads.append(torch.full_like(x, float('nan')))
        ops['roi_align_backward'](grad, rois, unused, unused, grads[-1], *settings)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(*outputs, rtol=rounding, atol=16 * max(rounding, 1e-7))
    torch.testing.assert_close(*grads, rtol=rounding, atol=64 * max(rounding, 1e-7))
    assert outputs[0].any() and not outputs[1][5:8].any()


def test_roi_align_leaves_max_pooling_and_nothing_to_others(device):
    x, unused, rois = torch.zeros(1, 2, 8, 8, device=device), torch.zeros(0), torch.zeros(1, 5, device=device)
    output = torch.zeros(1, 2, 2, 2, device=device)
    assert in_torchvision.OPS['roi_align_forward'](x, rois, output, unused, unused, 2, 2, 1.0, 0, 0, True) is (
        NotImplemented
    )
    assert in_torchvision.OPS['roi_align_backward'](output[:0], rois[:0], unused, unused, x, 2, 2, 1.0, 0, 1, True) is (
        NotImplemented
    )


CASES = [  # kernel, stride, padding, dilation, groups, deform_groups
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    ((3, 3), (2, 1), (1, 2), (1, 2), 2, 4),
    ((1, 3), (1, 2), (0, 1), (1, 1), 4, 2),
]


@pytest.mark.parametrize('zero', [False, True])
@pytest.mark.parametrize('modulated', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('case', CASES)
def test_deformable_convolutions_and_their_gradients_are_the_same(case, dtype, modulated, zero, device):
    # Offsets begin at 0: on pixels, and off the map, where one-sided derivatives must be the same ones.
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), groups, deform_groups = case
    g = torch.Generator().manual_seed(0)
    taps = kh * kw * deform_groups
    places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip((12, 15), *case[:4])]
    shapes = dict(
        x=(3, 8, 12, 15), offset=(3, 2 * taps, *places), mask=(3, taps, *places), weight=(16, 8 // groups, kh, kw)
    )
    x, offset, mask, weight = (torch.randn(shape, generator=g).to(device, dtype) for shape in shapes.values())
    grad, bias = torch.randn(3, 16, *places, generator=g).to(device, dtype), torch.randn(16).to(device, dtype)
    offset = offset.zero_() if zero else offset * 3
    if not zero:
        offset[0, :4, 0, :3] = torch.tensor([float('nan'), float('inf'), float('-inf')], device=device)
    x = x.to(memory_format=torch.channels_last)
    unused, found = x.new_zeros(0), []
    for ops in BOTH:
        results = [torch.full_like(value, float('nan')) for value in (grad, x, offset, mask, weight, bias)]
        output, by_x, by_offset, by_mask, by_weight, by_bias = results
        if modulated:
            how = (kh, kw, sh, sw, ph, pw, dh, dw, groups, deform_groups, True)
            ops['modulated_deform_conv_forward'](x, weight, bias, unused, offset, mask, output, unused, *how)
            ops['modulated_deform_conv_backward'](
                x, weight, bias, unused, offset, mask, unused, by_x, by_weight, by_bias, by_offset, by_mask, grad, *how
            )
            found.append(results)
        else:
            how = (kw, kh, sw, sh, pw, ph, dw, dh, groups, deform_groups)
            ops['deform_conv_forward'](x, weight, offset, output, unused, unused, *how, 3)
            ops['deform_conv_backward_input'](x, offset, grad, by_x, by_offset, weight, unused, *how, 3)
            ops['deform_conv_backward_parameters'](x, offset, grad, by_weight, unused, unused, *how, 0.5, 3)
            found.append([output, by_x, by_offset, by_weight])
    rounding = max(torch.finfo(dtype).eps, 1e-7)
    for ours, theirs in zip(*found):
        torch.testing.assert_close(theirs, ours, rtol=4 * rounding, atol=256 * rounding)
        assert ours.any()


def test_they_are_not_affected_by_autocast(device):
    x, rois = torch.randn(1, 4, 9, 9, device=device), torch.tensor([[0, 1.0, 1, 7, 7]], device=device)
    outputs = torch.zeros(2, 1, 4, 3, 3, device=device)
    weight, offset = torch.randn(4, 4, 3, 3, device=device), torch.rand(1, 18, 7, 7, device=device)
    maps = torch.zeros(2, 1, 4, 7, 7, device=device)
    unused = torch.zeros(0)
    for i in range(2):
        with torch.autocast(device, torch.bfloat16, enabled=bool(i)):
            in_torchvision.OPS['roi_align_forward'](x, rois, outputs[i], unused, unused, 3, 3, 1.0, 2, 1, True)
            how = (3, 3, 1, 1, 0, 0, 1, 1, 1, 1, 1)
            in_torchvision.OPS['deform_conv_forward'](x, weight, offset, maps[i], unused, unused, *how)
    assert torch.equal(*outputs) and torch.equal(*maps)


def test_they_say_nothing(device):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        test_nms_leaves_legacy_boxes_and_scores_of_more_precision_to_others(device)
