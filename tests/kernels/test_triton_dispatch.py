"""When the Triton kernels are taken, what happens where they are not, and that GPUs could run them."""

import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from helpers import warm
from mmdet_norms.kernels import choose, gpu, map_aten
from mmdet_norms.layers import BNET

CPU = torch.device('cpu')
needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='no Triton here; it is for Linux only')


@pytest.fixture
def asked_anew(monkeypatch):
    """As on a machine that has Triton, and has not tried it yet."""
    monkeypatch.setattr(gpu, '_answers', {})
    monkeypatch.setattr(gpu, '_DEVICES', ('cpu',))
    monkeypatch.setattr(gpu, 'find_spec', lambda name: object())
    monkeypatch.setenv('MMDET_NORMS_TRITON', '1')


def test_training_on_a_cpu_does_not_import_the_kernels():
    code = (
        'import sys, torch, mmdet_norms.layers as l\n'
        'for layer in (l.BNET(4), l.MABN(4), l.AN(4), l.CBN(4)): layer(torch.randn(2, 4, 5, 5)).sum().backward()\n'
        'print(any(name.startswith("mmdet_norms.kernels.gpu.") for name in sys.modules))'
    )
    done = warm.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.stdout.split()[-1] == 'False', done.stderr


def test_a_cpu_is_not_supported():
    x = torch.randn(1, 2, 3, 3)
    assert not gpu.is_supported(x) and choose.map_operations(x) is map_aten
    assert 'BNET' not in str(BNET(2)(x.requires_grad_()).grad_fn)


def test_they_are_off_unless_the_environment_asks_for_them(asked_anew, monkeypatch, recwarn):
    monkeypatch.delenv('MMDET_NORMS_TRITON')
    assert not gpu.is_supported(torch.randn(1, 2, 3, 3))
    assert not recwarn.list


def test_no_triton_or_an_old_one_means_none_without_a_word(asked_anew, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, 'triton', SimpleNamespace(__version__='3.2.0'))
    assert not gpu.is_supported(torch.randn(1, 2, 3, 3))
    gpu._answers.clear()
    monkeypatch.setattr(gpu, 'find_spec', lambda name: None)
    assert not gpu.is_supported(torch.randn(1, 2, 3, 3))
    assert not recwarn.list


def test_a_triton_that_does_not_work_warns_once_and_training_goes_on(asked_anew, monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)  # import triton raises
    x, layer = torch.randn(2, 2, 3, 3, requires_grad=True), BNET(2)
    with pytest.warns(UserWarning, match='do not work here.*MMDET_NORMS_TRITON=1') as caught:
        layer(x).sum().backward()
        layer(x).sum().backward()
    assert len(caught) == 1
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-5)


@needs_triton
def test_kernels_that_compute_something_else_are_not_used(asked_anew, monkeypatch):
    monkeypatch.setattr(gpu, '_trains', lambda device: False)
    with pytest.warns(UserWarning, match='do not work here.*wrong numbers'):
        assert not gpu.is_supported(torch.randn(1, 2, 3, 3))


TYPES = {torch.float16: 'fp16', torch.float32: 'fp32', torch.bfloat16: 'bf16'}


def compile_for_a_gpu(kernel, options, *args, **sizes):
    """To machine code of compute capability 9.0, with what a launch on that GPU would have been called with."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values, constants, signature, aligned = {**dict(zip(kernel.arg_names, args)), **sizes}, {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned[(i,)] = f'*{TYPES[value.dtype]}', [['tt.divisibility', 16]]
        else:
            signature[parameter.name] = 'fp32' if isinstance(value, float) else 'i32'
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return compile(source, target=GPUTarget('cuda', 90, 32), options=options)


@needs_triton
@pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='Triton interprets in this process')
@pytest.mark.parametrize(
    'dtype, layout, width', [(torch.float16, torch.contiguous_format, 12), (torch.float32, torch.channels_last, 9)]
)
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(dtype, layout, width, monkeypatch, tmp_path):
    """The interpreter takes code that the compiler does not."""
    from mmdet_norms.kernels.gpu import depthwise_triton
    from mmdet_norms.kernels.gpu import map_triton as kernels

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    compiled = []

    def launch(kernel, programs, x, *args, per_instance=False, num_warps=4, **sizes):
        options = dict(num_warps=num_warps, enable_fp_fusion=True)
        result = compile_for_a_gpu(kernel, options, *args, **sizes, ACC=depthwise_triton.tl.float32)
        assert result.asm['cubin']
        compiled.append(kernel.__name__)

    monkeypatch.setattr(depthwise_triton, 'launch', launch)
    monkeypatch.setattr(kernels, 'launch', launch)
    x = torch.ones(2, 4, 5, width, dtype=dtype).contiguous(memory_format=layout)
    weight, (bias, mean, var) = torch.ones(4, 1, 3, 3), torch.ones(3, 4)
    depthwise_triton.bnet(x, weight, bias, 1e-5)
    depthwise_triton.bnet_backward(x, x, weight, mean, var, 1e-5, True, True, True)
    depthwise_triton.bnet_inference(x, weight, bias, x, True)
    kernels.second_moment(x)
    kernels.gradient_sums(x, x, mean)
    kernels.affine(x, mean, mean, mean)
    kernels.gradient(x, x, *torch.ones(4, 2, 4))
    written = {name for module in (depthwise_triton, kernels) for name in vars(module) if name.endswith('_kernel')}
    assert set(compiled) == written
