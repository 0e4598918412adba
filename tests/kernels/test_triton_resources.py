"""What the Triton kernels take of a GPU, read from the machine code that a launch would run there; none is needed.

A kernel that keeps more than the registers of a thread hold spills: it works, and waits for memory all the time.
"""

import collections
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from helpers.choice import full

pytestmark = [
    pytest.mark.skipif(find_spec('triton') is None, reason='Triton is not installed; torch for GPUs has it'),
    pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='Triton interprets in this process'),
]
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
LARGE, MIDDLE, SMALL, ODD = (2, 256, 200, 336), (2, 512, 100, 168), (2, 2048, 25, 42), (2, 256, 200, 333)
# The largest kernel of each layout in every run; CONTRIBUTING.md says how to run all.
ALWAYS = [(LARGE, torch.float32, 'contiguous', 7), (LARGE, torch.float16, 'channels_last', 7)]
OTHERS = [
    (LARGE, torch.float32, 'contiguous', 5),
    *((MIDDLE, torch.float32, 'contiguous', size) for size in (3, 5, 7)),
    *((SMALL, torch.float32, 'contiguous', size) for size in (5, 7)),
    *((ODD, torch.bfloat16, 'contiguous', size) for size in (5, 7)),
    *((LARGE, torch.float16, 'channels_last', size) for size in (3, 5)),
    *((LARGE, torch.float32, 'channels_last', size) for size in (5, 7)),  # the width makes no difference to the code
]
HOPPER = 90


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Launches only compile, with all that Triton makes of their arguments; what they compiled is in this list."""
    import triton
    from triton.backends.compiler import GPUTarget

    from mmdet_norms.kernels.gpu import common, depthwise_triton, map_triton

    class Driver:
        get_current_device = get_current_stream = staticmethod(lambda *_: 'no device')
        get_current_target = staticmethod(lambda: GPUTarget('cuda', HOPPER, 32))

    def launch(kernel, programs, x, *args, per_instance=False, **sizes):
        result = kernel.run(
            *args, **sizes, grid=(programs,), warmup=True, ACC=common.accumulator(x), enable_fp_fusion=True
        )
        kernels.append((kernel.__name__, result))

    kernels = []
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    driver = triton.runtime.driver
    monkeypatch.setattr(driver, '_active' if hasattr(driver, '_active') else 'active', Driver())
    monkeypatch.setattr(depthwise_triton, 'launch', launch)
    monkeypatch.setattr(map_triton, 'launch', launch)
    return kernels


def tensors(shape, dtype, layout, size=3):
    """A map, kernels, and a vector of channels, without memory."""
    x = torch.empty(shape, dtype=dtype, device='meta').contiguous(memory_format=LAYOUTS[layout])
    return x, torch.empty(shape[1], 1, size, size, device='meta'), torch.empty(shape[1], device='meta')


def resources(kernel, folder):
    """Registers of a thread, and its bytes of memory, which are those that it spills."""
    import triton

    binary = Path(folder) / 'kernel.cubin'
    binary.write_bytes(kernel.asm['cubin'])
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    report = subprocess.run([tool, '--dump-resource-usage', binary], capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf'{name}:(\d+)', report)[1]) for name in ('REG', 'STACK')]


def spilling(kernels, folder):
    used = [(name, *resources(kernel, folder)) for name, kernel in kernels]
    return [kernel for kernel in used if kernel[2]]


def widths(kernel):
    """How often the code loads and stores 1, 2 or 4 words at once."""
    found = re.findall(r'(ld|st)\.global(?:\.v(\d))?\.b32', kernel.asm['ptx'])
    return {way: collections.Counter(int(width or 1) for name, width in found if name == way) for way in ('ld', 'st')}


def every_kernel_of_bnet(x, weight, vector):
    from mmdet_norms.kernels.gpu import depthwise_triton

    depthwise_triton._depthwise(x, weight, vector, eps=1e-5, mean=vector, var=vector, normalize=True)
    depthwise_triton._depthwise(x, weight, vector, other=x, relu=True)
    parts = depthwise_triton._sums(x, x, weight, vector)
    depthwise_triton._join(parts, x, weight, vector, 1e-5)
    through = dict(other=x, mean=vector, slope=vector, shift=vector)
    depthwise_triton._depthwise(x, weight, None, eps=1e-5, var=vector, backward=True, **through)


@pytest.mark.parametrize('shape, dtype, layout, size', [*ALWAYS, *(full(*case) for case in OTHERS)], ids=str)
def test_no_kernel_of_bnet_spills_at_the_sizes_of_a_resnet_50(shape, dtype, layout, size, compiled, tmp_path):
    every_kernel_of_bnet(*tensors(shape, dtype, layout, size))
    assert len(compiled) == 5
    assert not spilling(compiled, tmp_path)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_no_pass_spills_at_the_sizes_of_a_resnet_50(dtype, layout, compiled, tmp_path):
    from mmdet_norms.kernels.gpu import map_triton

    x, _, vector = tensors(LARGE, dtype, layout)
    map_triton.moments(x)
    map_triton.affine(x, vector, vector, vector)
    map_triton.gradient_sums(x, x, vector)
    map_triton.gradient(x, x, *[vector] * 4)
    assert len(compiled) == 6
    assert not spilling(compiled, tmp_path)


def test_a_tile_that_is_too_large_would_be_noticed(compiled, tmp_path, monkeypatch):
    from mmdet_norms.kernels.gpu import depthwise_triton

    tile = dict(LANES=4, STEP=8, UNIT=2, BLOCK_C=128, UNROLL=1, num_warps=4)
    monkeypatch.setattr(depthwise_triton, '_tile', lambda x, size: tile)
    x, weight, vector = tensors(LARGE, torch.float32, 'channels_last', 7)
    depthwise_triton.bnet_given(x, weight, vector, vector, vector, 1e-5)
    assert spilling(compiled, tmp_path)


@pytest.mark.parametrize('width, words', [(336, 4), (42, 2), (41, 1)])
def test_neighbouring_columns_are_loaded_and_stored_by_one_instruction(width, words, compiled):
    from mmdet_norms.kernels.gpu import depthwise_triton, map_triton

    x, weight, vector = tensors((2, 64, 25, width), torch.float32, 'contiguous', 5)
    depthwise_triton.bnet_given(x, weight, vector, vector, vector, 1e-5)
    map_triton.affine(x, vector, vector, vector)
    convolution, affine = (widths(kernel) for _, kernel in compiled)
    assert max(convolution['ld']) == max(convolution['st']) == max(affine['st']) == words <= max(affine['ld'])


def test_a_view_that_is_not_aligned_is_loaded_word_by_word(compiled):
    from mmdet_norms.kernels.gpu import depthwise_triton, map_triton

    weight, vector = torch.empty(8, 1, 3, 3), torch.empty(8)
    x = torch.empty(2 * 8 * 6 * 40 + 1)[1:].view(2, 8, 6, 40)
    depthwise_triton.bnet_given(x, weight, vector, vector, vector, 1e-5)
    map_triton.affine(x, vector, vector, vector)
    for _, kernel in compiled:
        assert set(widths(kernel)['ld']) == {1}


@pytest.mark.parametrize('shape', [full((2, 1, 4, 4)), (2, 3, 1, 1)], ids=str)
def test_sizes_of_one_compile(shape, compiled):
    """A launch makes constants of them, which the interpreter does not."""
    from mmdet_norms.kernels.gpu import depthwise_triton, map_triton

    x, weight, vector = tensors(shape, torch.float32, 'contiguous')
    depthwise_triton.bnet(x, weight, vector, 1e-5)
    depthwise_triton.bnet_backward(x, x, weight, vector, vector, 1e-5, True, True, True)
    map_triton.second_moment(x)
    map_triton.affine(x, vector, vector, vector)
    map_triton.gradient_sums(x, x, vector)
    map_triton.gradient(x, x, *[vector] * 4)
    assert all(kernel.asm['cubin'] for _, kernel in compiled)
