"""Triton kernels of BNET, and of the map operations that MABN, AN and CBN are made of, for GPUs.

Triton comes with torch's GPU builds and is imported when it is first needed. Where it is missing or does not work, on
other devices, and without ``MMDET_NORMS_TRITON=1`` in the environment, :func:`is_supported` says so, and everything is
computed as on any machine. (On request only as yet: the kernels were tested by Triton's interpreter, but on no GPU.)
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from ...compat.torch_internals import constant_in_compiled_code, is_functorch_active

_DEVICES = ('cuda',)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OLDEST_GPU = (8, 0)  # compute capability that Triton supports
_OLDEST_TRITON = (3, 3)  # that of torch 2.7; older ones know no tuples in kernels
_LARGEST_KERNEL = 7  # columns; more than 7 x 7 values do not fit the registers of a thread
_LARGEST_INSTANCE = 2**31 - 2**20  # places within one are 32 bit numbers, also those that a tile has beyond its end
_answers: dict[torch.device, bool] = {}
_switched_on: bool | None = None  # by the context below; None: what the environment says


def is_supported(x: Tensor, *others: Tensor) -> bool:
    """Is this a case for the kernels: a map on a GPU that Triton works on, not empty, plain tensors all of them?

    Args:
        x: the map ``(N, C, H, W)``.
        others: what it is computed with: vectors, and kernels ``(C, 1, k, k)``.
    """
    return (
        isinstance(x, Tensor)
        and x.device.type in _DEVICES
        and not torch.jit.is_tracing()
        and not _is_exporting()  # to where these operators are unknown
        and not is_functorch_active()
        and x.dim() == 4
        and 0 < x.numel() < _LARGEST_INSTANCE * x.shape[0]
        and all(t.device == x.device and t.dtype in _DTYPES and _is_plain(t) for t in (x, *others))
        and all(t.shape[-1] <= _LARGEST_KERNEL for t in others if t.dim() == 4)
        and is_available(x.device)
    )


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Inside, eager code uses the kernels where they work, or does not, whatever the environment says."""
    global _switched_on
    before, _switched_on = _switched_on, on
    try:
        yield
    finally:
        _switched_on = before


@constant_in_compiled_code
def is_available(device: torch.device) -> bool:
    """Whether the kernels are switched on, and compute what they should on this device. Tried once."""
    on = os.environ.get('MMDET_NORMS_TRITON') == '1' if _switched_on is None else _switched_on
    if on and device not in _answers:
        _answers[device] = _try(device)
    return on and _answers[device]


def _try(device: torch.device) -> bool:
    """Triton also needs a C compiler, a driver that is new enough, and a place for its files: does it work?"""
    if find_spec('triton') is None:
        return False
    if not hasattr(torch.library, 'custom_op'):  # torch < 2.4
        return False
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return False
    try:
        import triton

        if tuple(map(int, triton.__version__.split('.')[:2])) < _OLDEST_TRITON:
            return False
        if _trains(device):
            return True
        reason = 'a trial step gave wrong numbers'
    except Exception as error:  # of any kind: what is missing shows in the compiler, the linker, or the driver
        reason = f'{type(error).__name__}: {error}'
    warnings.warn(
        f'the Triton kernels of mmdet_norms do not work here, so slower ones are used: {reason}. Without '
        'MMDET_NORMS_TRITON=1 in the environment they are not tried',
        stacklevel=2,
    )
    return False


def _trains(device: torch.device) -> bool:
    """A step of every kind, BNET's with a kernel of one value."""
    from . import depthwise_triton, map_triton

    x, one = torch.arange(4.0, device=device).view(1, 1, 2, 2), torch.ones(1, 1, 1, 1, device=device)
    y, mean, var = depthwise_triton.bnet(x, 2 * one, one.view(1), 0.0)
    of_x, of_weight, of_bias = depthwise_triton.bnet_backward(y, x, 2 * one, mean, var, 0.0, True, True, True)
    results = [mean, var, map_triton.gradient(x, y, *one.new_ones(4, 1)).mean(), of_weight, of_bias, of_x.mean() + 1]
    return all(abs(value.item() - exact) < 1e-4 for value, exact in zip(results, (1.5, 1.25, 2.5, 8, 4, 1)))


def _is_exporting() -> bool:
    return hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()  # torch 2.7


def _is_plain(tensor: Tensor) -> bool:
    """No subclass, which may not be what the kernels would read."""
    return type(tensor) in (Tensor, torch.nn.Parameter)
