"""Data workers hand their images over in shared memory; where there is none, torch waits for ever or dies."""

import os
import shutil
import sys
from pathlib import Path

from mmengine.config import Config

from ..errors import UserError

SHARED = Path('/dev/shm')
_SIDE = 640  # of an image whose size the config does not say
_WAYS_OUT = '{key}.num_workers=0 (and {key}.persistent_workers=False) needs none; Docker gives more by --shm-size=8g'


def require_shared_memory(cfg: Config, keys: tuple[str, ...]) -> None:
    """Raise unless the shared memory holds what the workers of ``cfg[key]`` put there: their images in advance.

    Raises:
        UserError: it is not there, cannot be written to, or is smaller; with how much is needed and the ways out.
    """
    if not sys.platform.startswith('linux'):
        return
    for key in keys:
        loader = cfg.get(key)
        workers = (loader or {}).get('num_workers') or 0
        if not workers:
            continue
        batches = workers * (loader.get('prefetch_factor') or 2) + 1  # and the one in use
        problem = _problem(batches * (loader.get('batch_size') or 1) * 3 * _pixels(loader))
        if problem is not None:
            raise UserError(f'{key}.num_workers={workers}: {problem}; {_WAYS_OUT.format(key=key)}')


def _problem(need: int) -> str | None:
    if not SHARED.is_dir():
        return f'data workers need shared memory, and there is no {SHARED}'
    if not os.access(SHARED, os.W_OK):
        return f'data workers need shared memory, and {SHARED} cannot be written to'
    total, _, free = shutil.disk_usage(SHARED)
    if total and free < need:
        return f'data workers need at least {need / 1e6:.1f} MB of shared memory, and {SHARED} has {free / 1e6:.1f} MB'
    return None


def _pixels(node: object) -> int:
    """Of the smallest image that the pipelines of a dataloader name, or of a moderate one."""
    sizes = list(_scales(node))
    return min(sizes, default=_SIDE * _SIDE)


def _scales(node: object):
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ('scale', 'scales', 'img_scale', 'crop_size'):
                yield from _areas(value)
            yield from _scales(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _scales(value)


def _areas(value: object):
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value):
            yield min(value) ** 2  # the longer side is a limit, not a size
        else:
            for entry in value:
                yield from _areas(entry)
