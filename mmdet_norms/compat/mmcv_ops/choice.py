"""Whose ops are used on which device."""

import functools
import logging
import os

import mmcv
import torch
from mmengine.logging import print_log

from ...errors import UserError
from . import compiled, in_torch, in_torchvision
from .remedy import remedy

# Environment variable that forces one of KINDS.
SETTING = 'MMDET_NORMS_OPS'
KINDS = ('mmcv', 'torchvision', 'torch')


def order(device: str) -> tuple[str, ...]:
    """The kinds of ops for tensors on this type of device, best first: each serves what those before do not know.

    Compiled mmcv; on a GPU torchvision's compiled ops; PyTorch, which on a CPU is faster than torchvision.

    Raises:
        UserError: ``MMDET_NORMS_OPS`` asks for what does not exist or is not installed.
    """
    return _order(os.environ.get(SETTING) or None, device)


@functools.cache
def _order(asked: str | None, device: str) -> tuple[str, ...]:
    if asked is not None:
        _require(asked, device)
        return tuple(dict.fromkeys((asked, 'torch')))
    kinds = ['torch']
    if device == 'cuda' and not in_torchvision.load() and in_torchvision.knows(device):
        kinds.insert(0, 'torchvision')
    extension, _ = compiled.load()
    if extension is not None and (device != 'cuda' or compiled.built_with_cuda(extension)):
        kinds.insert(0, 'mmcv')
    return tuple(kinds)


def _require(asked: str, device: str) -> None:
    if asked not in KINDS:
        raise UserError(f'{SETTING}={asked!r}: there are {", ".join(KINDS)}; write one of them, or unset it')
    problem = ''
    extension, error = compiled.load()
    on_gpu = device == 'cuda' and torch.cuda.is_available()
    if asked == 'mmcv':
        if extension is None:
            problem = error or f'mmcv {mmcv.__version__} has no compiled ops here. {remedy()}'
        elif on_gpu and not compiled.built_with_cuda(extension):
            problem = f'mmcv {mmcv.__version__} was compiled without CUDA'
    elif asked == 'torchvision':
        problem = in_torchvision.load()
        if not problem and on_gpu and not in_torchvision.knows(device):
            problem = 'torchvision was compiled without CUDA'
    if problem:
        raise UserError(f'{SETTING}={asked}: {problem}. Without {SETTING} the best of what is installed is used')


def choices() -> dict[str, str]:
    """For ``'cpu'`` and ``'cuda'``, whose ops are used there first: ``'mmcv'``, ``'torchvision'`` or ``'torch'``.

    Also where there is no GPU.

    Raises:
        UserError: as :func:`order`.
    """
    return {device: order(device)[0] for device in ('cpu', 'cuda')}


def active() -> str:
    """``'compiled'`` where mmcv has its extension and it loads, else ``'pytorch'`` (the ops of this package)."""
    return 'pytorch' if compiled.load()[0] is None else 'compiled'


@functools.cache
def announce() -> None:
    """Log :func:`describe`: once, on rank 0; at the start of a run or on first use, not on a mere import."""
    if os.environ.get('RANK', '0') == '0':
        print_log(describe(), logger='current', level=logging.INFO)


def describe() -> str:
    """One line that says whose ops are active, for each device that this machine has."""
    chosen = choices()
    if not torch.cuda.is_available():
        del chosen['cuda']
    names = {device: _name(kind) for device, kind in chosen.items()}
    if len(set(names.values())) == 1:
        line = f'mmcv ops: {names["cpu"]}'
    else:
        line = 'mmcv ops: ' + '; '.join(f'on {device} {name}' for device, name in names.items())
    if asked := os.environ.get(SETTING):
        line += f' ({SETTING}={asked})'
    extension, error = compiled.load()
    if error:
        line += f' (those of mmcv {mmcv.__version__} do not load: {error.splitlines()[0]})'
    if extension is None:
        line += f' (mmcv {mmcv.__version__} has none): {", ".join(in_torch.OPS)}; others raise NotImplementedError'
    return line


def _name(kind: str) -> str:
    if kind == 'mmcv':
        return f'compiled (mmcv {mmcv.__version__})'
    if kind == 'torchvision':
        import torchvision

        return f'torchvision {torchvision.__version__} (nms, roi_align, deform_conv2d), else PyTorch, from mmdet_norms'
    return 'PyTorch, from mmdet_norms'
