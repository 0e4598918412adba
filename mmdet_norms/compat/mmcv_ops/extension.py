"""The module ``mmcv._ext``, as mmcv's Python wrappers find it."""

import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import mmcv

from . import in_torch
from .choice import EXT_NAME, active, announce
from .remedy import REMEDY


class _PyTorchExt(types.ModuleType):
    """Has every op, since mmcv checks that all exist on import; those not supplied raise."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith('_'):
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')

        def op(*args, **kwargs):
            if name in in_torch.OPS:
                announce()
                return in_torch.OPS[name](*args, **kwargs)
            if name in ('get_compiler_version', 'get_compiling_cuda_version'):
                return 'N/A'
            raise NotImplementedError(
                f'mmcv op {name!r} is not available: mmcv-lite has no compiled ops and mmdet_norms '
                f'supplies only {", ".join(in_torch.OPS)} in PyTorch. {REMEDY}'
            )

        op.__name__ = name
        setattr(self, name, op)
        return op


def install() -> str:
    """Make ``mmcv.ops`` importable without compiled ops; returns :func:`.active`.

    Does nothing where mmcv is compiled or a stand-in is in place. Call it before anything
    imports ``mmcv.ops`` or ``mmdet.models``.
    """
    which = active()
    if which == 'pytorch' and EXT_NAME not in sys.modules:
        ext = _PyTorchExt(EXT_NAME, 'PyTorch stand-in for the compiled ops; see mmdet_norms.')
        ext.__spec__ = ModuleSpec(EXT_NAME, loader=None)
        sys.modules[EXT_NAME] = mmcv._ext = ext
    return which
