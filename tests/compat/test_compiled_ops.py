"""Compiled mmcv reads memory as if contiguous; nobody else shall have to think of it."""

import inspect
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmdet_norms.compat import mmcv_ops
from mmdet_norms.compat.mmcv_ops import compiled, in_torch

ACTIVE = mmcv_ops.install()
import mmcv.ops  # noqa: E402  (needs the ops in place)

needs_compiled = pytest.mark.skipif(ACTIVE != 'compiled', reason='the installed mmcv has no compiled ops')


def memory(tensor):
    """What lies in memory, as compiled code sees it."""
    return np.lib.stride_tricks.as_strided(tensor.detach().numpy(), (tensor.numel(),), (tensor.element_size(),))


def careless(read, more, output, *, other=None):
    """An op that writes 10 * read + more to ``output`` and doubles ``other``, by addresses."""
    memory(output)[:] = 10 * memory(read) + memory(more[0])
    if other is not None:
        memory(other)[:] *= 2
    return read


LAYOUTS = {
    'contiguous': lambda x: x,
    'channels last': lambda x: x.to(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    'every second': lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_an_op_that_thinks_of_addresses_only_gets_and_gives_every_layout(layout):
    maps = [torch.randn(2, 3, 4, 5) for _ in range(4)]
    expected = 10 * maps[0] + maps[1], maps[3] * 2
    read, more, output, other = (layout(value.clone()) for value in maps)
    kept = read.clone(), more.clone()
    compiled.for_any_layout('careless', careless)(read, [more], output, other=other)
    assert torch.equal(output, expected[0]) and torch.equal(other, expected[1])
    assert torch.equal(read, kept[0]) and torch.equal(more, kept[1])
    assert output.stride() == layout(maps[2]).stride()


def test_what_an_op_only_reads_is_not_written_to_even_if_it_is_not_a_number():
    read = torch.full((2, 3, 4, 5), float('nan')).to(memory_format=torch.channels_last)
    output = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    versions = read._version, output._version
    compiled.for_any_layout('careless', careless)(read, [read], output)
    assert read._version == versions[0]  # else autograd refuses what it kept of it
    assert output._version > versions[1] and output.isnan().all()


def test_a_tensor_that_is_passed_twice_stays_one():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    expected = 10 * x + x
    compiled.for_any_layout('careless', careless)(x, [x], x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    'message', ['"ROIAlign" not implemented for \'BFloat16\'', 'nms_impl: implementation for device cuda:0 not found.']
)
def test_what_a_compiled_op_does_not_know_is_left_to_the_next_if_there_is_one(message):
    def op(*args):
        raise RuntimeError(message)

    assert compiled.for_any_layout('nms', op)() is NotImplemented
    with pytest.raises(RuntimeError, match=message[-10:]):
        compiled.for_any_layout('carafe_forward', op)()


def test_an_error_of_another_kind_is_an_error():
    def op(*args):
        raise RuntimeError('out of memory')

    with pytest.raises(RuntimeError, match='out of memory'):
        compiled.for_any_layout('nms', op)()


def test_the_arguments_that_ops_write_to_are_known_by_position_and_by_name():
    written = {name: {key for key, writes in compiled._writes(name).items() if writes} for name in in_torch.OPS}
    assert written['roi_align_forward'] == {2, 'output', 3, 'argmax_y', 4, 'argmax_x'}
    assert written['roi_align_backward'] == {2, 'argmax_y', 3, 'argmax_x', 4, 'grad_input'}
    assert written['softnms'] == {2, 'dets'} and not written['nms']
    assert written['deform_conv_backward_input'] == {3, 'grad_input', 4, 'grad_offset'}
    assert written['deform_conv_backward_parameters'] == {3, 'grad_weight'}
    assert {key for key in written['modulated_deform_conv_backward'] if isinstance(key, int)} == {7, 8, 9, 10, 11}
    assert compiled._writes('carafe_forward') == {}


@needs_compiled
def test_the_arguments_of_the_compiled_ops_have_the_same_order():
    for name, op in in_torch.OPS.items():
        own = getattr(mmcv._ext, name).own.__doc__.splitlines()[0].partition('(')[2].split(', ')
        own = [argument.split(':')[0].replace('_', '').lower() for argument in own]
        assert own == [argument.replace('_', '').lower() for argument in inspect.signature(op).parameters], name


# --- Each op of mmcv that a detector calls with maps, and that runs on a CPU ---
def _corner_pool(x):
    return mmcv.ops.CornerPool('top')(x)


ROIS = torch.tensor([[0, 4.0, 4, 60, 60], [1, 10, 2, 70, 40]])
ROTATED = torch.cat((ROIS, torch.tensor([[0.3], [1.0]])), 1)
OPS = {
    'roi_align': lambda x, offset, mask, weight: mmcv.ops.roi_align(x, ROIS, 7, 0.25, 2, 'avg', True),
    'roi_align adaptive': lambda x, offset, mask, weight: mmcv.ops.roi_align(x, ROIS, (5, 6), 0.25, 0, 'avg', False),
    'roi_align max': lambda x, offset, mask, weight: mmcv.ops.roi_align(x, ROIS, 7, 0.25, 2, 'max', True),
    'roi_align_rotated': lambda x, offset, mask, weight: mmcv.ops.roi_align_rotated(x, ROTATED, 7, 0.25),
    'deform_conv2d': lambda x, offset, mask, weight: mmcv.ops.deform_conv2d(x, offset, weight, 1, 1),
    'modulated_deform_conv2d': lambda x, offset, mask, weight: mmcv.ops.modulated_deform_conv2d(
        x, offset, mask, weight, None, 1, 1
    ),
    'corner_pool': lambda x, offset, mask, weight: _corner_pool(x),
    'psa_mask': lambda x, offset, mask, weight: mmcv.ops.PSAMask('collect', (3, 3))(x[:, :9]),
}


def _results(op, layout):
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, channels, 20, 24, generator=g) for channels in (16, 18, 9)]
    inputs = [layout(value).detach().requires_grad_() for value in (*maps, torch.randn(16, 16, 3, 3, generator=g))]
    output = op(*inputs)
    grad = torch.randn(output.shape, generator=g)
    output.backward(layout(grad))
    return [output.detach(), *(value.grad for value in inputs if value.grad is not None)]


@needs_compiled
@pytest.mark.parametrize('layout', [LAYOUTS[name] for name in list(LAYOUTS)[1:]], ids=list(LAYOUTS)[1:])
@pytest.mark.parametrize('op', OPS.values(), ids=OPS)
def test_every_layout_gives_the_same_output_and_gradients(op, layout):
    for found, expected in zip(_results(op, layout), _results(op, LAYOUTS['contiguous']), strict=True):
        assert torch.equal(found, expected) and expected.any()


@needs_compiled
def test_every_compiled_op_is_replaced_whenever_mmcv_ops_was_imported():
    bare = [
        name for name, op in vars(mmcv._ext).items()
        if callable(op) and not name.startswith(('_', 'get_compil')) and not hasattr(op, 'own')
    ]  # fmt: skip
    assert not bare and len(vars(mmcv._ext)) > 90
    for first, then in (('mmcv.ops', 'mmdet_norms'), ('mmdet_norms', 'mmcv.ops')):
        script = (
            f'import {first}, {then}, torch, sys, mmcv.ops\n'
            'x = torch.randn(1, 4, 20, 24)\n'
            'rois = torch.tensor([[0, 4.0, 4, 60, 60]])\n'
            'a, b = (mmcv.ops.roi_align(z, rois, 7, 0.25, 2) for z in (x, x.to(memory_format=torch.channels_last)))\n'
            'assert torch.equal(a, b)'
        )
        subprocess.run([sys.executable, '-c', script], check=True)


@needs_compiled
def test_a_second_installation_wraps_nothing_twice():
    before = mmcv._ext.nms
    mmcv_ops.install()
    assert mmcv._ext.nms is before and not hasattr(before.own, 'own')
    assert pickle.loads(pickle.dumps(before)) is before


@needs_compiled
def test_a_map_smaller_than_the_kernel_is_padded_as_by_any_convolution():
    x, offset, weight = torch.randn(2, 4, 1, 2), torch.zeros(2, 18, 1, 2), torch.randn(4, 4, 3, 3)
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(mmcv.ops.deform_conv2d(x, offset, weight, 1, 1), expected)
    mask = torch.ones(2, 9, 1, 2)
    torch.testing.assert_close(mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1), expected)


@needs_compiled
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu_where_the_compiled_op_has_no_code_for_it(dtype):
    boxes = ROIS[:, 1:].to(dtype)
    assert mmcv.ops.nms(boxes, torch.tensor([0.5, 0.6], dtype=dtype), 0.9)[1].tolist() == [1, 0]
    x = torch.randn(2, 4, 20, 24).to(dtype).requires_grad_()
    output = mmcv.ops.roi_align(x, ROIS, 7, 0.25, 2)  # RoIs in fp32 beside it
    expected = mmcv.ops.roi_align(x.detach().float(), ROIS, 7, 0.25, 2)
    torch.testing.assert_close(output.float(), expected, rtol=1e-2, atol=1e-2)
    output.sum().backward()
    assert x.grad.dtype == dtype and x.grad.any()
    loss = mmcv.ops.sigmoid_focal_loss(torch.randn(3, 4).to(dtype), torch.tensor([0, 3, 4]), 2.0, 0.25, None, 'mean')
    assert loss.isfinite()


@needs_compiled
@pytest.mark.parametrize('place', [float('nan'), float('inf'), -float('inf'), 1e12], ids=str)
@pytest.mark.parametrize('op', ['roi_align', 'inverted', 'deform_conv', 'modulated_deform_conv'])
def test_places_of_a_model_that_diverges_are_nowhere_and_do_not_end_the_process(monkeypatch, op, place):
    torch.manual_seed(0)
    x, filters = torch.randn(1, 2, 6, 6, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
    rois, offset = torch.tensor([[0, 1.0, 1, 5, 3], [0, 1, 2, 5, place]]), torch.zeros(1, 18, 6, 6)
    offset[:, ::5] = place
    offset.requires_grad_()
    inverted = torch.tensor([[0, 1.0, 1, 5, 3], [0, 5, 2, 1, 4]])

    def run():
        if op in ('roi_align', 'inverted'):
            output = mmcv.ops.roi_align(x, rois if op == 'roi_align' else inverted, (3, 3), 1.0, 2, 'avg', True)
            return output.detach(), torch.autograd.grad(output.sum(), x)[0]
        if op == 'deform_conv':
            output = mmcv.ops.deform_conv2d(x, offset, filters, 1, 1)
        else:
            output = mmcv.ops.modulated_deform_conv2d(x, offset, torch.ones(1, 9, 6, 6), filters, None, 1, 1)
        return output.detach(), *torch.autograd.grad(output.sum(), (x, offset, filters))

    found = run()
    monkeypatch.setenv('MMDET_NORMS_OPS', 'torch')
    for ours, expected in zip(found, run()):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@needs_compiled
def test_places_that_do_not_end_the_process_are_left_to_the_compiled_op(monkeypatch):
    monkeypatch.setattr(in_torch, 'OPS', {})
    for name in ('roi_align_forward', 'nms', 'deform_conv_forward'):
        assert compiled._places(name) is None
    monkeypatch.undo()
    assert (
        compiled._places('roi_align_backward') == (1, 'rois') and compiled._places('deform_conv_forward')[1] == 'offset'
    )
    assert not compiled._far_off(torch.tensor([[0, -90.0, -9, 2e4, 3]])) and not compiled._far_off(torch.zeros(0, 5))
    assert not compiled._far_off(1)
