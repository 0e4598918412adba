"""Whose ops are used on which device."""

import os
import subprocess
import sys
import types

import pytest
import torch

from mmdet_norms.compat import mmcv_ops
from mmdet_norms.compat.mmcv_ops import choice, compiled, extension, in_torch, in_torchvision
from mmdet_norms.compat.mmcv_ops.remedy import remedy
from mmdet_norms.errors import UserError


@pytest.fixture
def world(monkeypatch):
    """Pretend what is installed: ``world(mmcv='cpu', torchvision='cuda', gpu=True)``, for which devices."""

    def pretend(mmcv=None, torchvision=None, gpu=True, error=''):
        cuda = 'CUDA 12.4' if mmcv == 'cuda' else 'not available'
        module = types.SimpleNamespace(get_compiling_cuda_version=lambda: cuda) if mmcv else None
        monkeypatch.setattr(compiled, 'load', lambda: (module, error))
        monkeypatch.setattr(in_torchvision, 'load', lambda: '' if torchvision else 'torchvision is not installed')
        monkeypatch.setitem(sys.modules, 'torchvision', types.SimpleNamespace(__version__='0.28.0'))
        monkeypatch.setattr(in_torchvision, 'knows', lambda device: device in ('cpu', torchvision))
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
        choice._order.cache_clear()

    monkeypatch.delenv('MMDET_NORMS_OPS', raising=False)
    yield pretend
    choice._order.cache_clear()


@pytest.mark.parametrize(
    ('mmcv', 'torchvision', 'on_cpu', 'on_gpu'),
    [
        (None, None, ['torch'], ['torch']),
        (None, 'cpu', ['torch'], ['torch']),
        (None, 'cuda', ['torch'], ['torchvision', 'torch']),
        ('cpu', None, ['mmcv', 'torch'], ['torch']),
        ('cpu', 'cuda', ['mmcv', 'torch'], ['torchvision', 'torch']),
        ('cuda', 'cuda', ['mmcv', 'torch'], ['mmcv', 'torchvision', 'torch']),
    ],
)
def test_the_order_is_compiled_mmcv_then_torchvision_on_a_gpu_then_pytorch(world, mmcv, torchvision, on_cpu, on_gpu):
    world(mmcv, torchvision)
    assert [list(choice.order(device)) for device in ('cpu', 'cuda')] == [on_cpu, on_gpu]
    assert mmcv_ops.choices() == dict(cpu=on_cpu[0], cuda=on_gpu[0])


@pytest.mark.parametrize('kind', ['mmcv', 'torchvision', 'torch'])
def test_the_variable_forces_one_and_pytorch_does_what_that_does_not_know(world, monkeypatch, kind):
    world('cuda', 'cuda')
    monkeypatch.setenv('MMDET_NORMS_OPS', kind)
    assert mmcv_ops.choices() == dict(cpu=kind, cuda=kind)
    assert choice.order('cpu') == ((kind, 'torch') if kind != 'torch' else ('torch',))
    assert f'(MMDET_NORMS_OPS={kind})' in mmcv_ops.describe()


@pytest.mark.parametrize(
    ('asked', 'installed', 'message'),
    [
        ('torchvison', {}, r"MMDET_NORMS_OPS='torchvison': there are mmcv, torchvision, torch"),
        ('torchvision', {}, r'MMDET_NORMS_OPS=torchvision: torchvision is not installed'),
        ('torchvision', dict(torchvision='cpu'), r'torchvision was compiled without CUDA'),
        ('mmcv', {}, r'MMDET_NORMS_OPS=mmcv: mmcv \S+ has no compiled ops here.*doctor'),
        ('mmcv', dict(error='undefined symbol: _ZN'), r'MMDET_NORMS_OPS=mmcv: undefined symbol: _ZN'),
        ('mmcv', dict(mmcv='cpu'), r'was compiled without CUDA'),
    ],
)
def test_what_cannot_be_forced_is_one_error(world, monkeypatch, asked, installed, message):
    world(**installed)
    monkeypatch.setenv('MMDET_NORMS_OPS', asked)
    for ask in (mmcv_ops.choices, mmcv_ops.describe):
        with pytest.raises(UserError, match=message):
            ask()


def test_an_op_says_so_too_when_it_is_called(monkeypatch):
    monkeypatch.setenv('MMDET_NORMS_OPS', 'nonsense')
    with pytest.raises(UserError, match=r"MMDET_NORMS_OPS='nonsense'"):
        extension.operator('nms')(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_one_line_says_which_for_each_device_that_is_there(world):
    world('cpu', None, gpu=False)
    assert mmcv_ops.describe().startswith('mmcv ops: compiled (mmcv ')
    world(None, None)
    assert mmcv_ops.describe().startswith('mmcv ops: PyTorch, from mmdet_norms (mmcv ')
    world('cpu', None)
    assert 'on cpu compiled (mmcv ' in mmcv_ops.describe() and '; on cuda PyTorch' in mmcv_ops.describe()
    world(None, None, error='undefined symbol: _ZN\nmore')
    assert 'do not load: undefined symbol: _ZN)' in mmcv_ops.describe() and 'more' not in mmcv_ops.describe()


def test_on_a_gpu_what_shall_repeat_exactly_is_computed_by_pytorch(monkeypatch):
    called = []
    for kind, ops in (('torchvision', in_torchvision.OPS), ('torch', in_torch.OPS)):
        for name in ('roi_align_forward', 'roi_align_backward'):
            monkeypatch.setitem(ops, name, lambda *args, kind=kind: called.append(kind))
    monkeypatch.setattr(extension, 'order', lambda device: ('torchvision', 'torch'))
    monkeypatch.setattr(extension, '_device', lambda values: 'cuda')
    forward, backward = extension.operator('roi_align_forward'), extension.operator('roi_align_backward')
    forward(), backward()
    torch.use_deterministic_algorithms(True)
    try:
        forward(), backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert called == ['torchvision', 'torchvision', 'torchvision', 'torch']


def test_what_one_does_not_know_the_next_one_does(monkeypatch):
    monkeypatch.setattr(extension, 'order', lambda device: ('mmcv', 'torchvision', 'torch'))
    monkeypatch.setitem(in_torchvision.OPS, 'nms', lambda *args: NotImplemented)
    unknown = RuntimeError('"nms" not implemented for \'BFloat16\'')

    def own(*args):
        raise unknown

    assert extension.operator('nms', own)(torch.rand(2, 4), torch.tensor([0.1, 0.2]), 0.5).tolist() == [1, 0]


def test_compiled_ops_that_do_not_load_are_replaced_by_the_others(tmp_path):
    # As after an update of torch: the extension is there, and its import fails.
    (tmp_path / 'mmcv').mkdir()
    import mmcv

    init = f'__path__.append({os.path.dirname(mmcv.__file__)!r})\nexec(open({mmcv.__file__!r}).read())\n'
    (tmp_path / 'mmcv' / '__init__.py').write_text(init)
    (tmp_path / 'mmcv' / '_ext.py').write_text('raise ImportError("undefined symbol: _ZN3c10")')
    script = (
        'import torch, mmdet_norms, mmcv.ops\n'
        'from mmdet_norms.compat import mmcv_ops\n'
        'print(mmcv.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5)[1].tolist(), mmcv_ops.active())'
    )
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
    env.pop('MMDET_NORMS_OPS', None)
    out = subprocess.run(
        [sys.executable, '-c', script], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert out.returncode == 0, out.stdout
    assert '[0] pytorch' in out.stdout and 'do not load: undefined symbol: _ZN3c10' in out.stdout


def test_the_fork_of_mmcv_is_not_replaced_by_mmcv(monkeypatch):
    monkeypatch.setattr('importlib.metadata.distribution', lambda name: name)
    assert 'onedl-mmcv' in remedy() and 'uninstall' not in remedy() and 'doctor' in remedy()
