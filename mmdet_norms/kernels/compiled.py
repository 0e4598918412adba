"""The compiled CPU library, if the installation could build it: ``setup.py`` compiles ``csrc/`` if it can.

``MMDET_NORMS_COMPILED=0`` in the environment does without it.
"""

import ctypes
import importlib.machinery
import os
import re
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_WORTH_A_THREAD = 1 << 16  # values; starting one costs as much as some ten thousand of them
_TORCH = Path(torch.__file__).resolve().parent
_OPENMP = re.compile(r'lib(gomp|iomp5|omp)\b.*\.so')
_INTERFACE = 2  # what csrc/cpu.c says, too: a library built from older sources would be called with the wrong arguments
_SUFFIX = {torch.float32: 'f32', torch.float64: 'f64'}


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None: not built, built for another machine or from older sources, or switched off."""
    if os.environ.get('MMDET_NORMS_COMPILED', '1') == '0':
        return None
    folder = Path(__file__).parent
    path = next((p for s in importlib.machinery.EXTENSION_SUFFIXES if (p := folder / f'_cpu{s}').exists()), None)
    return None if path is None else _load(path)


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        loaded = ctypes.CDLL(str(path))
        if loaded.mmdet_norms_interface() == _INTERFACE:
            return loaded
    except OSError:
        return None
    except AttributeError:  # older still
        pass
    warnings.warn(
        f'{path} was compiled from another version of mmdet_norms, so BNET does without it, which is slower: '
        'install the package again (make install, or pip install -e .)',
        stacklevel=3,
    )
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
    loaded = [file for file in files if _OPENMP.match(os.path.basename(file))]
    found = [file for file in loaded if os.path.dirname(file).startswith((f'{_TORCH}/', f'{_TORCH}.libs'))] or loaded
    if len(found) != 1:  # none, as in some builds; or which one?
        return None
    try:
        return ctypes.cast(ctypes.CDLL(found[0]).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
