"""Which ops are used on which device."""

import functools
import importlib.util
import logging
import os

import mmcv
from mmengine.logging import print_log

from . import in_torch

EXT_NAME = 'mmcv._ext'


@functools.cache
def announce() -> None:
    """Log :func:`describe`: once, on rank 0; at the start of a run or on first use, not on a mere import."""
    if os.environ.get('RANK', '0') == '0':
        print_log(describe(), logger='current', level=logging.INFO)


def active() -> str:
    """``'compiled'`` where mmcv has its extension, else ``'pytorch'`` (the ops of this package)."""
    spec = importlib.util.find_spec(EXT_NAME)
    # The stand-in is found too once it is installed; it has no loader.
    return 'pytorch' if spec is None or spec.loader is None else 'compiled'


def choices() -> dict[str, str]:
    """For ``'cpu'`` and ``'cuda'``, whose ops are used there first: ``'mmcv'``, ``'torchvision'`` or ``'torch'``."""
    return dict.fromkeys(('cpu', 'cuda'), 'mmcv' if active() == 'compiled' else 'torch')


def describe() -> str:
    """One line that says which mmcv ops are active."""
    if active() == 'compiled':
        return f'mmcv ops: compiled (mmcv {mmcv.__version__})'
    return (
        f'mmcv ops: PyTorch, from mmdet_norms (mmcv-lite {mmcv.__version__} has none): '
        f'{", ".join(in_torch.OPS)}; others raise NotImplementedError'
    )
