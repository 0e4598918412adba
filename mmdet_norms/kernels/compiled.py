"""The compiled CPU library, if the installation could build it: ``setup.py`` compiles ``csrc/`` if it can.

``MMDET_NORMS_COMPILED=0`` in the environment does without it.
"""

import ctypes
import importlib.machinery
import os
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_WORTH_A_THREAD = 1 << 16  # values; starting one costs as much as some ten thousand of them
_TORCH = Path(torch.__file__).parent
_OPENMP = re.compile(r'lib(gomp|iomp5|omp)\b.*\.so')
_SUFFIX = {torch.float32: 'f32', torch.float64: 'f64'}


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None: not built, built for another machine, or switched off."""
    if os.environ.get('MMDET_NORMS_COMPILED', '1') == '0':
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f'_cpu{suffix}')
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                return None
    return None


def is_plain(*tensors: Tensor | None) -> bool:
    """Can the library read these? Dense fp32 or fp64 on a CPU, all alike; None passes."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(
        tensor.device.type == 'cpu'
        and tensor.dtype in _SUFFIX
        and tensor.dtype == given[0].dtype
        and (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last))
        and type(tensor) in (Tensor, torch.nn.Parameter)
        for tensor in given
    )


def call(name: str, job: ctypes.Structure, x: Tensor) -> None:
    """Run ``name`` on as many threads as torch uses, or fewer if ``x`` is small; the interpreter is free meanwhile."""
    threads = min(torch.get_num_threads(), 1 + x.numel() // _WORTH_A_THREAD)
    if getattr(library(), f'{name}_{_SUFFIX[x.dtype]}')(ctypes.byref(job), threads, _openmp()):
        raise MemoryError(f'{name}: no memory for its working planes')


@cache
def _openmp() -> ctypes.c_void_p | None:
    """``GOMP_parallel`` of the OpenMP library that torch runs its threads in (GNU's, LLVM's or Intel's), if found."""
    try:
        with open('/proc/self/maps') as maps:  # Linux
            files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count('/')}
    except OSError:
        return None
    folders = (str(_TORCH), f'{_TORCH}.libs')
    torchs = [f for f in files if _OPENMP.match(os.path.basename(f)) and os.path.dirname(f).startswith(folders)]
    if len(torchs) != 1:  # none, as in some builds; or which one?
        return None
    try:
        return ctypes.cast(ctypes.CDLL(torchs[0]).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
