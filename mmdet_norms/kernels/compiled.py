"""The compiled CPU library, if the installation could build it: ``setup.py`` compiles ``csrc/`` if it can.

``MMDET_NORMS_COMPILED=0`` in the environment does without it; a path is that of another build (``make asan``).
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

from . import pointers
from .layouts import is_channels_last

_WORTH_A_THREAD = 1 << 16  # values; starting one costs as much as some ten thousand of them
_TORCH = Path(torch.__file__).resolve().parent
_OPENMP = re.compile(r'lib(gomp|iomp5|omp)\b.*\.so')
_INTERFACE = 3  # what csrc/cpu.c says, too: a library built from older sources would be called with the wrong arguments
_SUFFIX = {torch.float32: 'f32', torch.float64: 'f64'}
_LARGEST_KERNEL = 4095  # what csrc/bnet.h says, too: places in a kernel are 32 bit numbers there
_NAMES = ('x', 'grad', 'weight', 'bias', 'residual', 'y', 'grad_x', 'grad_weight', 'grad_bias', 'mean', 'var')
_NEEDED = {
    'bnet_forward': ('x', 'weight', 'bias', 'y', 'mean', 'var'),
    'bnet_backward': ('x', 'weight', 'grad', 'grad_weight', 'grad_bias', 'mean', 'var'),
}


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None: not built, built for another machine or from older sources, or switched off."""
    wanted = os.environ.get('MMDET_NORMS_COMPILED', '1')
    if wanted not in ('0', '1'):
        return _load(Path(wanted))
    if wanted == '0':
        return None
    folder = Path(__file__).parent
    # The last suffix is the plain one, which setup.py gives it; older checkouts hold one that names a Python's ABI.
    suffixes = reversed(importlib.machinery.EXTENSION_SUFFIXES)
    path = next((p for s in suffixes if (p := folder / f'_cpu{s}').exists()), None)
    return None if path is None else _load(path)


def why_not() -> str | None:
    """One sentence where there is no library: what that costs, and what to do about it."""
    if library() is not None:
        return None
    cost = 'a training step of BNET takes up to twice as long on a CPU'
    if os.environ.get('MMDET_NORMS_COMPILED') == '0':
        return f'MMDET_NORMS_COMPILED=0 leaves out the compiled kernels: {cost}'
    return (
        f'The kernels of mmdet_norms are not compiled: {cost}. With a C compiler (gcc or clang), install the package '
        'again: make install, or pip install -e .'
    )


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
        'install the package again (in a checkout: make install); python -m mmdet_norms.check_env says what is missing',
        stacklevel=3,
    )
    return None


def is_plain(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Can the library read these? Dense fp32 or fp64 on a CPU, all alike; None passes."""
    given = [tensor for tensor in (x, weight, *others) if tensor is not None]
    return weight.shape[-1] <= _LARGEST_KERNEL and all(
        tensor.device.type == 'cpu'
        and tensor.dtype in _SUFFIX
        and tensor.dtype == x.dtype
        and (tensor.is_contiguous() or (tensor.dim() == 4 and is_channels_last(tensor)))
        and not tensor.is_neg()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        for tensor in given
    )


class _Job(ctypes.Structure):
    """``job`` of ``csrc/bnet.h``: addresses, how many values lie at each, and what to do with them."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _NAMES),
        ('values', ctypes.c_int64 * len(_NAMES)),
        ('eps', ctypes.c_double),
        *((name, ctypes.c_int64) for name in 'nchw'),
        *((name, ctypes.c_int32) for name in ('k', 'last', 'of_batch', 'needs_x', 'needs_weight', 'relu')),
    ]


def call(
    name: str, tensors: dict[str, Tensor | None], eps: float, of_batch: bool, *, needs_x: bool = False,
    needs_weight: bool = False, relu: bool = False,
) -> None:  # fmt: skip
    """Run a function of the library: the only way to it, and past :func:`pointers.check`.

    It takes as many threads as torch uses, or fewer if the map is small; the interpreter is free meanwhile.

    Args:
        name: ``'bnet_forward'`` or ``'bnet_backward'``, see ``csrc/bnet.h``.
        tensors: by their names there. All are of one dtype, fp32 or fp64.
        eps: added to the variance.
        of_batch: the statistics are those of x, which needs two values per channel.
        needs_x, needs_weight: which gradients are wanted.
        relu: whether the forward ends with it.

    Raises:
        ValueError: a tensor is missing, or is not what the library would take it for.
        MemoryError: no memory to work in.
    """
    x, owner = tensors['x'], f'{name} of the compiled library'
    needed = (*_NEEDED[name], 'grad_x') if needs_x else _NEEDED[name]
    missing = [needed for needed in needed if tensors.get(needed) is None]
    if missing:
        raise ValueError(f'{owner} got no {", ".join(missing)}')
    if x.dtype not in _SUFFIX or x.device.type != 'cpu':
        raise ValueError(f'{owner} got {x.dtype} on {x.device}; it must be float32 or float64 on a CPU')
    pointers.check(owner, x, tensors, (x.dtype,))
    size = tensors['weight'].shape[-1]
    if size > _LARGEST_KERNEL:
        limit = f'{_LARGEST_KERNEL} x {_LARGEST_KERNEL}'
        raise ValueError(f'{owner} got a kernel of {size} x {size}; it takes {limit} at most')
    if of_batch and x.numel() <= x.shape[1]:
        raise ValueError(f'{owner} got a map of shape {tuple(x.shape)}; a variance takes two values per channel')
    given = [tensors.get(name) for name in _NAMES]
    job = _Job(
        *(None if tensor is None else tensor.data_ptr() for tensor in given),
        (ctypes.c_int64 * len(_NAMES))(*(0 if tensor is None else tensor.numel() for tensor in given)),
        eps,
        *x.shape,
        size,
        is_channels_last(x),
        of_batch,
        needs_x,
        needs_weight,
        relu,
    )
    threads = min(torch.get_num_threads(), 1 + x.numel() // _WORTH_A_THREAD)
    failed = getattr(library(), f'{name}_{_SUFFIX[x.dtype]}')(ctypes.byref(job), threads, _openmp())
    if failed == 1:
        raise MemoryError(f'{owner}: no memory for its working planes, with a map of shape {tuple(x.shape)}')
    if failed:
        raise ValueError(f'{owner} refused a map of shape {tuple(x.shape)} with a kernel of {size} x {size}')


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
