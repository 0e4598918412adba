"""mmcv's compiled ops. They take every tensor for contiguous, whatever its strides say."""

import functools
import importlib.util
import inspect
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import in_torch

EXT_NAME = 'mmcv._ext'
# How torch and mmcv say that an op has no code for a dtype, a device, an inverted RoI or, though padded, a small map.
_REFUSALS = (
    *('not implemented for', 'expected scalar type', 'implementation for device', 'image is smaller than kernel'),
    'roi_width >= 0',
)
# Where an op reads. As integers, numbers that are none or too large are addresses outside the map.
_PLACES = ('rois', 'offset')
_FAR = 1e9


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The extension and ``''``, or None and why not: ``''`` again where there is none, else the error of the import.

    An extension that was built for another torch is found, but does not load.
    """
    spec = importlib.util.find_spec(EXT_NAME)
    # The stand-in of this package is found too, once it is there; it has no loader.
    if spec is None or spec.loader is None:
        return None, ''
    try:
        return importlib.import_module(EXT_NAME), ''
    except (ImportError, OSError) as error:
        return None, str(error)


def built_with_cuda(extension: ModuleType) -> bool:
    """Whether it has ops for a GPU."""
    return extension.get_compiling_cuda_version() != 'not available'


def _writes(name: str) -> dict[str | int, bool]:
    """For each argument, by position and by name, whether the op writes to it; empty if unknown."""
    if name not in in_torch.OPS:
        return {}
    parameters = inspect.signature(in_torch.OPS[name]).parameters
    writes = {
        p: p in ('output', 'dets') or (p.startswith(('argmax_', 'grad_')) and p != 'grad_output') for p in parameters
    }
    return writes | dict(enumerate(writes.values()))


def _places(name: str) -> tuple[int, str] | None:
    """Position and name of the argument that says where the op reads, if it has one."""
    parameters = inspect.signature(in_torch.OPS[name]).parameters if name in in_torch.OPS else ()
    return next(((at, parameter) for at, parameter in enumerate(parameters) if parameter in _PLACES), None)


def for_any_layout(name: str, op: Callable) -> Callable:
    """``op`` of the extension, by this name there, for tensors of any layout, in and out.

    Tensors that are not contiguous are copied, and what it wrote to the copies is copied back. Of an op that is not in
    :data:`.in_torch.OPS`, nobody knows which ones it writes to: those that have changed, bit by bit.

    Returns:
        A function of the same arguments. It returns NotImplemented if an op of :data:`.in_torch.OPS` has no code for
        them, of which the op says so before it writes anything that counts; and where the op would end the process, at
        places that are not finite, as a model that diverges predicts them.
    """
    writes, places = _writes(name), _places(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        written: dict[int, set[bool | None]] = defaultdict(set)

        def contiguous(value: Any, key: str | int | None) -> Any:
            if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
                return type(value)(contiguous(v, None) for v in value)
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_contiguous():
                return value
            if id(value) not in copies:  # a tensor that is passed twice stays one
                copies[id(value)] = value, value.contiguous()
            written[id(value)].add(writes.get(key))
            return copies[id(value)][1]

        if places is not None and _far_off(args[places[0]] if len(args) > places[0] else kwargs.get(places[1])):
            return NotImplemented
        args = [contiguous(value, at) for at, value in enumerate(args)]
        kwargs = {key: contiguous(value, key) for key, value in kwargs.items()}
        try:
            result = op(*args, **kwargs)
        except RuntimeError as error:
            if writes and any(part in str(error) for part in _REFUSALS):
                return NotImplemented
            raise
        with torch.no_grad():
            for key, (value, copy) in copies.items():
                # What was only read must not look written to: autograd may have kept it.
                if True in written[key] or (None in written[key] and not _same_bits(value, copy)):
                    value.copy_(copy)
        return result

    call.__name__ = name
    return call


def _far_off(places: Any) -> bool:
    """Whether mmcv's code for a CPU would end the process. The ``offset`` of nms is a number."""
    return isinstance(places, Tensor) and places.device.type == 'cpu' and not bool((places.abs() < _FAR).all())


def _same_bits(value: Tensor, copy: Tensor) -> bool:
    return torch.equal(value.contiguous().view(torch.uint8), copy.view(torch.uint8))
