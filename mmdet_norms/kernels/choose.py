"""Who computes an operation: chosen here, once per forward, among modules that have the same functions.

======================================  ==============================================================================
operations                              by the first of these that takes the tensors
======================================  ==============================================================================
``second_moment``, ``moments``,         Triton (``gpu/map_triton.py``): on a GPU, where it is switched on;
``affine``, ``gradient_sums``,          aten (``map_aten.py``): on a CPU or GPU;
``gradient`` (``map_ops.py``)           formula (``map_formula.py``): on other devices, and in compiled code, which the
                                        compiler fuses better
``normalize_and_convolve``              Triton (``gpu/depthwise_triton.py``); C (``depthwise_compiled.py``): on a CPU,
(``depthwise.py``)                      where it was built; torch (``depthwise_torch.py``): on a CPU; nobody else
``inference`` (``depthwise.py``)        Triton; C: contiguous maps on a CPU; torch: everywhere
======================================  ==============================================================================
"""

from types import ModuleType

import torch
from torch import Tensor

from ..compat.torch_internals import is_functorch_active
from ..compat.torch_versions import autocast_is_on, is_compiling
from . import compiled, depthwise_compiled, depthwise_torch, gpu, map_aten, map_formula


def map_operations(x: Tensor) -> ModuleType:
    """Who computes the map operations of ``x`` ``(N, C, H, W)``, in forward and backward."""
    if is_compiling():
        return map_formula
    if gpu.is_supported(x):
        from .gpu import map_triton

        return map_triton
    return map_aten if x.device.type in ('cpu', 'cuda') else map_formula


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, *statistics: Tensor) -> ModuleType | None:
    """Who computes ``normalize_and_convolve`` of a map ``(N, C, H, W)``; None: nobody, so use the formula.

    Args:
        x, weight, bias, statistics: all that the operation reads.
    """
    tensors = (x, weight, bias, *statistics)
    if gpu.is_supported(*tensors):
        return _depthwise_triton()
    if not (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.dtype in (torch.float32, torch.float64)
        and all(t.dtype == x.dtype and t.device.type == 'cpu' for t in tensors)
        and not autocast_is_on('cpu')
        and is_eager()
    ):
        return None
    return depthwise_compiled if compiled.library() and compiled.is_plain(*tensors) else depthwise_torch


def depthwise_inference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> ModuleType:
    """Who computes ``inference`` of a map ``(N, C, H, W)``."""
    tensors = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors if isinstance(t, Tensor)):
        return depthwise_torch
    if not _is_like(residual, x):
        return depthwise_torch
    if gpu.is_supported(x, weight, bias):
        return _depthwise_triton()
    takes = depthwise(*tensors) is depthwise_compiled
    # In channels_last, torch's own convolution is the faster.
    if takes and x.numel() > 0 and x.is_contiguous() and (residual is None or residual.is_contiguous()):
        return depthwise_compiled
    return depthwise_torch


def is_eager() -> bool:
    """Whether this code runs on numbers: nobody compiles or traces it, and no ``torch.func`` transforms it."""
    return not is_compiling() and not torch.jit.is_tracing() and not is_functorch_active()


def _depthwise_triton() -> ModuleType:
    from .gpu import depthwise_triton

    return depthwise_triton


def _is_like(residual: Tensor | None, x: Tensor) -> bool:
    """The same but for its values and layout; plain, as a subclass may not be what kernels would read."""
    return residual is None or (
        type(residual) is Tensor
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
