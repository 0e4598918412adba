"""Nothing but what compiled code takes it for gets there: of every tensor, every way to be something else."""

import ctypes
import re

import pytest
import torch
from torch.nn import Parameter

from mmdet_norms.kernels import compiled, depthwise, pointers
from mmdet_norms.layers import BNET

needs_library = pytest.mark.skipif(compiled.library() is None, reason='installed without a C compiler')
N, C, H, W, K = 2, 5, 4, 6, 3


def job(name, layout=torch.contiguous_format, dtype=torch.float32):
    """Tensors of a sound call."""

    def a_map():
        return torch.randn(N, C, H, W, dtype=dtype).contiguous(memory_format=layout)

    weight, vector = torch.randn(C, 1, K, K, dtype=dtype), torch.rand(C, dtype=dtype) + 0.5
    tensors = dict(x=a_map(), weight=weight, mean=vector, var=vector.clone())
    if name == 'bnet_forward':
        return tensors | dict(bias=vector.clone(), residual=a_map(), y=a_map())
    return tensors | dict(grad=a_map(), grad_x=a_map(), grad_weight=weight.clone(), grad_bias=vector.clone())


def call(name, tensors, of_batch=True):
    backward = name == 'bnet_backward'
    compiled.call(name, tensors, 1e-5, of_batch, needs_x=backward, needs_weight=backward)


def freed(tensor):
    """As FSDP leaves a parameter that is on another process."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_off(tensor):
    """The second half of a longer one, whose memory ends amid it."""
    longer = torch.zeros(2 * tensor.numel(), dtype=tensor.dtype)
    part = longer.as_strided(tensor.shape, tensor.stride(), tensor.numel()).copy_(tensor)
    longer.untyped_storage().resize_((tensor.numel() + tensor.numel() // 2) * tensor.element_size())
    return part


class Subclass(torch.Tensor):
    pass


FAULTS = {
    'fewer channels': lambda t: t.narrow(min(1, t.dim() - 1) if t.shape[0] != C else 0, 0, C - 1).contiguous(),
    'a value less': lambda t: t.flatten()[:-1].clone(),
    'no dimensions': lambda t: t.sum(),
    'a dimension more': lambda t: t[..., None],
    'other order of dimensions': lambda t: t.transpose(0, -1).contiguous() if t.dim() > 1 else t.view(1, -1),
    'strided': lambda t: torch.stack([t, t], -1)[..., 0],
    'expanded': lambda t: (
        t.flatten()[:1].expand(t.numel()).view(t.shape) if t.dim() == 1 else t[..., :1].expand(t.shape)
    ),
    'double': lambda t: t.to(torch.float64),
    'half': lambda t: t.half(),
    'integers': lambda t: t.to(torch.int32),
    'on no device': lambda t: t.to('meta'),
    'sparse': lambda t: t.to_sparse(),
    'a subclass': lambda t: t.as_subclass(Subclass),
    'negative by name': lambda t: torch._neg_view(t),
    'without memory': freed,
    'cut off': cut_off,
    'empty': lambda t: t[:0],
}


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('name', ['bnet_forward', 'bnet_backward'])
@needs_library
def test_no_tensor_of_a_job_is_taken_on_trust(name, fault):
    for layout in (torch.contiguous_format, torch.channels_last):
        call(name, job(name, layout))
        for key in job(name):
            tensors = job(name, layout)
            kept = {other: t.clone() for other, t in tensors.items() if other != key}
            tensors[key] = FAULTS[fault](tensors[key])
            with pytest.raises(
                ValueError, match=rf'{name} of the compiled library got (?:\w+ (?:of|as)|torch|a map)'
            ) as error:
                call(name, tensors)
            assert 'must' in str(error.value)
            assert all(torch.equal(tensors[other], before) for other, before in kept.items())  # nothing was written


@pytest.mark.parametrize('name', ['bnet_forward', 'bnet_backward'])
@needs_library
def test_the_layout_of_each_map_is_that_of_x(name):
    for key in ('x', 'y', 'residual', 'grad', 'grad_x'):
        tensors = job(name)
        if key in tensors:
            tensors[key] = tensors[key].contiguous(memory_format=torch.channels_last)
            with pytest.raises(ValueError, match='must lie in memory as'):
                call(name, tensors)


@pytest.mark.parametrize('name', ['bnet_forward', 'bnet_backward'])
@needs_library
def test_a_missing_tensor_is_named(name):
    for key in job(name):
        if key != 'residual':
            with pytest.raises(ValueError, match=f'got no {key}'):
                call(name, job(name) | {key: None})


@needs_library
@pytest.mark.parametrize('shape', [(C, 1, 2, 2), (C, 1, 3, 5), (C, 1, 5, 3), (C, 2, 3, 3), (C, 1, 0, 0), (C, 9)])
def test_kernels_are_square_and_odd(shape):
    tensors = job('bnet_forward') | dict(weight=torch.zeros(shape))
    with pytest.raises(ValueError, match='got weight of'):
        call('bnet_forward', tensors)
    tensors = job('bnet_backward') | dict(weight=torch.zeros(shape), grad_weight=torch.zeros(shape))
    with pytest.raises(ValueError, match=r'got (grad_)?weight of'):
        call('bnet_backward', tensors)


@needs_library
def test_statistics_of_a_batch_need_two_values_and_places_in_a_kernel_32_bits():
    for shape in [(1, C, 1, 1), (0, C, 4, 4), (2, C, 0, 4)]:
        tensors = job('bnet_forward') | dict(x=torch.zeros(shape), y=torch.zeros(shape), residual=None)
        with pytest.raises(ValueError, match='two values per channel'):
            call('bnet_forward', tensors)
        call('bnet_forward', tensors, of_batch=False)
    one = torch.zeros(1)
    x, weight = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1).expand(1, 4097, 4097)[None].contiguous()
    with pytest.raises(ValueError, match='a kernel of 4097 x 4097'):
        call('bnet_forward', dict(x=x, y=x.clone(), weight=weight, bias=one, mean=one.clone(), var=one.clone()))
    assert not compiled.is_plain(x, weight)  # so that torch computes it


def raw(name, tensors, **changes):
    """A call past the check, as a job says it; what the C side answers."""
    given = [tensors.get(key) for key in compiled._NAMES]
    values = [0 if t is None else t.numel() for t in given]
    sizes = dict(n=N, c=C, h=H, w=W, k=K, last=0, of_batch=1, needs_x=1, needs_weight=1, relu=0)
    for key, value in changes.items():
        if key in sizes:
            sizes[key] = value
        else:
            values[compiled._NAMES.index(key)] = value
    addresses = [None if t is None else t.data_ptr() for t in given]
    struct = compiled._Job(*addresses, (ctypes.c_int64 * len(values))(*values), 1e-5, *sizes.values())
    return getattr(compiled.library(), f'{name}_f32')(ctypes.byref(struct), 1, None)


@needs_library
@pytest.mark.parametrize('name', ['bnet_forward', 'bnet_backward'])
def test_the_c_side_does_not_trust_its_caller_either(name):
    tensors = job(name)
    assert raw(name, tensors) == 0
    for key in tensors:
        for lie in (0, 1, tensors[key].numel() - 1, tensors[key].numel() + 1, -1, 2**63 - 1):
            assert raw(name, tensors, **{key: lie}) == 2, (key, lie)
        if key != 'residual':
            assert raw(name, tensors | {key: None}) == 2, key
    for key in 'nchw':
        for lie in (-1, 0, 1, 7, 2**31, 2**32 + N, 2**62, 2**63 - 1, -(2**63)):
            assert raw(name, tensors, **{key: lie}) == 2, (key, lie)
    for k in (-3, 0, 1, 2, 5, 4097, 2**31 - 1):
        assert raw(name, tensors, k=k) == 2, k
    huge = dict(n=2**31, c=2**31, h=2, w=1)  # a product that is N C H W again, modulo 2^64
    assert raw(name, tensors, **huge) == 2


@needs_library
def test_what_the_c_side_refuses_is_an_error(monkeypatch):
    monkeypatch.setattr(pointers, 'check', lambda *args: None)
    tensors = job('bnet_forward') | dict(mean=torch.zeros(C - 1))
    with pytest.raises(ValueError, match='bnet_forward of the compiled library refused a map of shape'):
        call('bnet_forward', tensors)


@needs_library
@pytest.mark.parametrize('wrong', ['bnconv.weight', 'bnconv.bias', 'running_mean', 'running_var'])
def test_a_layer_whose_parts_were_changed_by_hand_is_refused_by_name(wrong):
    layer, x = BNET(8), torch.randn(2, 8, 4, 4)
    layer.bn.eval()  # norm_eval: the statistics are given
    if wrong.startswith('bnconv'):
        name = wrong.split('.')[1]
        setattr(layer.bnconv, name, Parameter(getattr(layer.bnconv, name)[:6].detach().clone()))
    else:
        setattr(layer.bn, wrong, getattr(layer.bn, wrong)[:6].clone())
    name = wrong.split('.')[-1].removeprefix('running_')
    with pytest.raises(ValueError, match=rf'got {name} of shape \(6,.*with a map of shape \(2, 8, 4, 4\)'):
        layer(x)


@needs_library
def test_a_residual_in_the_memory_of_x_is_read_before_it_is_overwritten():
    weight, bias = torch.randn(3, 1, 3, 3), torch.randn(3)
    memory = torch.randn(2 * 3 * 4 * 5 + 7)
    for start in (0, 7):  # the same, and another part of the same memory
        both = memory.clone()
        x, residual = both[: 2 * 3 * 4 * 5].view(2, 3, 4, 5), both[start : start + 2 * 3 * 4 * 5].view(2, 3, 4, 5)
        expected = torch.nn.functional.conv2d(x, weight, bias, padding=1, groups=3) + residual
        torch.testing.assert_close(depthwise.inference(x, weight, bias, residual, inplace=True), expected)


@needs_library
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_saved_tensors_may_come_back_in_another_layout(layout):
    """Hooks that keep them elsewhere (``save_on_cpu``) promise values, not strides."""
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=layout)
    results = []
    for back in (lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t.contiguous()):
        leaf, layer = x.clone().requires_grad_(), BNET(4)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, back):
            layer(leaf).square().sum().backward()
        results.append((leaf.grad, layer.bnconv.weight.grad, layer.bnconv.bias.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_library
def test_signs_that_are_not_in_memory_are_seen():
    """Views such as the imaginary part of a conjugate carry a bit that says: negative."""
    x, layer = torch.randn(2, 4, 5, 6), BNET(4)
    torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))
    leaf = x.clone().requires_grad_()
    (of_view,) = torch.autograd.grad(layer(leaf), leaf, torch._neg_view(x.cos()))
    (plain,) = torch.autograd.grad(layer(leaf), leaf, -x.cos())
    torch.testing.assert_close(of_view, plain)


def test_messages_say_what_was_wanted():
    x = torch.zeros(2, 8, 4, 4)
    said = re.escape('it got mean of shape (6,) with a map of shape (2, 8, 4, 4); it must be (8,)')
    with pytest.raises(ValueError, match=f'^{said}$'):
        pointers.check('it', x, dict(mean=torch.zeros(6)), (torch.float32,))
    with pytest.raises(ValueError, match=r'got mean of shape \(8,\) .* must be \(2, 8\)'):
        pointers.check('it', x, dict(mean=torch.zeros(8)), (torch.float32,), per_instance=True)
    with pytest.raises(ValueError, match='a plain tensor of float32 or float16 on cpu'):
        pointers.check('it', x, dict(mean=torch.zeros(8).double()), (torch.float32, torch.float16))


@pytest.fixture
def unlaunched(monkeypatch):
    """Triton's wrappers; what is launched in spite of the check is an error, as there may be no GPU."""
    pytest.importorskip('triton', reason='no Triton here; it is for Linux only')
    from mmdet_norms.kernels.gpu import common, map_triton
    from mmdet_norms.kernels.gpu import depthwise_triton as kernels

    def moments(x):
        return torch.zeros(x.shape[1]), torch.ones(x.shape[1])

    monkeypatch.setattr(kernels, 'moments', moments)
    monkeypatch.setattr(type(kernels._depthwise_kernel), '__getitem__', lambda self, grid: pytest.fail('launched'))
    return kernels, map_triton, common


def triton_calls(kernels, maps):
    x, weight, vector, rows = torch.zeros(N, C, H, W), torch.zeros(C, 1, K, K), torch.zeros(C), torch.zeros(N, C)
    return {
        'bnet': (kernels.bnet, [x, weight, vector, 1e-5]),
        'bnet_given': (kernels.bnet_given, [x, weight, vector, vector, vector, 1e-5]),
        'bnet_backward': (kernels.bnet_backward, [x, x, weight, vector, vector, 1e-5, True, True, True]),
        'bnet_backward of x': (kernels.bnet_backward, [x, x, weight, vector, vector, 1e-5, False, True, False]),
        'bnet_inference': (kernels.bnet_inference, [x, weight, vector, x, True]),
        'affine': (maps.affine, [x, vector, vector, vector]),
        'affine of instances': (maps.affine, [x, rows, rows, rows]),
        'gradient_sums': (maps.gradient_sums, [x, x, vector]),
        'gradient_sums of instances': (maps.gradient_sums, [x, x, rows]),
        'gradient': (maps.gradient, [x, x, *[vector] * 4]),
        'gradient of instances': (maps.gradient, [x, x, *[rows] * 4]),
    }


UNREAD = {('bnet_backward of x', 1), ('bnet_backward of x', 3), ('bnet_backward', 4)}  # by the first kernel


def test_no_tensor_of_a_launch_is_taken_on_trust(unlaunched):
    kernels, maps, _ = unlaunched
    tried = 0
    for name, (function, arguments) in triton_calls(kernels, maps).items():
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor) and (name, place) not in UNREAD:
                for fault in (
                    'fewer channels',
                    'a value less',
                    'no dimensions',
                    'integers',
                    'on no device',
                    'a subclass',
                ):
                    changed = [*arguments[:place], FAULTS[fault](argument), *arguments[place + 1 :]]
                    with pytest.raises((ValueError, RuntimeError, IndexError)) as error:
                        function(*changed)
                    assert 'Triton kernel' in str(error.value) or fault != 'fewer channels' or place == 0, name
                    tried += 1
    assert tried > 150


def test_places_that_are_no_32_bit_numbers_are_refused_before_a_launch(unlaunched):
    _, maps, common = unlaunched
    vector = torch.zeros(1, device='meta')
    for shape in [(1, 1, 2**16, 2**15), (1, 1, 2**31, 1), (2**31, 1, 1, 1), (0, 1, 4, 4)]:
        x = torch.zeros(shape, device='meta', dtype=torch.float16)
        with pytest.raises(ValueError, match='must be 32 bit numbers'):
            common.launch(maps._affine_kernel, 1, x, x, vector, vector, vector, x, 1, 1, 1)
