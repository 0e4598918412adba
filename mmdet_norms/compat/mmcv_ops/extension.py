"""The module ``mmcv._ext``, as mmcv's Python wrappers find it."""

import sys
import types
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from typing import Any

import mmcv
import torch

from ..torch_internals import disable_dynamo
from ..torch_versions import is_compiling
from . import compiled, in_torch, in_torchvision
from .choice import announce, order
from .remedy import remedy


def _device(values: Iterable) -> str:
    """Type of device of the first tensor."""
    return next((value.device.type for value in values if isinstance(value, torch.Tensor)), 'cpu')


def operator(name: str, own: Callable | None = None) -> Callable:
    """The op by this name that asks whose code to run; ``own``: of the extension, if mmcv has one."""
    code = {
        kind: ops[name] for kind, ops in (('torchvision', in_torchvision.OPS), ('torch', in_torch.OPS)) if name in ops
    }
    if own is not None:
        code['mmcv'] = compiled.for_any_layout(name, own)

    def run(*args: Any, **kwargs: Any) -> Any:
        announce()
        device = _device((*args, *kwargs.values()))
        kinds = order(device)
        # On a GPU the compiled ones add up gradients in the order in which threads come to them.
        if device == 'cuda' and 'torch' in code and 'backward' in name and torch.are_deterministic_algorithms_enabled():
            kinds = ('torch',)
        for kind in kinds:
            if kind in code and (result := code[kind](*args, **kwargs)) is not NotImplemented:
                return result
        if own is not None:
            return code['mmcv'](*args, **kwargs)
        raise NotImplementedError(
            f'mmcv op {name!r} is not available: mmcv-lite has no compiled ops and mmdet_norms '
            f'supplies only {", ".join(in_torch.OPS)} in PyTorch. {remedy()}'
        )

    run_outside = disable_dynamo(run)

    def op(*args: Any, **kwargs: Any) -> Any:
        # One break of the graph per op: what it calls has waits for the device, logs, or is compiled itself.
        return run_outside(*args, **kwargs) if is_compiling() else run(*args, **kwargs)

    op.__name__ = op.__qualname__ = name
    op.__module__ = compiled.EXT_NAME
    op.__doc__ = own and own.__doc__
    op.own = own
    return op


class _PyTorchExt(types.ModuleType):
    """Has every op, since mmcv checks that all exist on import; those not supplied raise."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith('_'):
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')
        if name in ('get_compiler_version', 'get_compiling_cuda_version'):
            return lambda: 'N/A'
        op = operator(name)
        setattr(self, name, op)
        return op


def install() -> str:
    """Make ``mmcv.ops`` importable without compiled ops, and right with them; returns :func:`.active`.

    With a compiled mmcv, the functions in ``mmcv._ext`` are replaced, where all of ``mmcv.ops`` look them up with
    every call; so it does not matter whether those were imported before. Otherwise call it before anything imports
    ``mmcv.ops`` or ``mmdet.models``. A second call does nothing.
    """
    extension, _ = compiled.load()
    if extension is None:
        if compiled.EXT_NAME not in sys.modules:
            ext = _PyTorchExt(compiled.EXT_NAME, 'PyTorch stand-in for the compiled ops; see mmdet_norms.')
            ext.__spec__ = ModuleSpec(compiled.EXT_NAME, loader=None)
            sys.modules[compiled.EXT_NAME] = mmcv._ext = ext
        return 'pytorch'
    for name, op in list(vars(extension).items()):
        if callable(op) and not name.startswith(('_', 'get_compil')) and not hasattr(op, 'own'):
            setattr(extension, name, operator(name, op))
    return 'compiled'
