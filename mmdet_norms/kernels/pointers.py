"""The one check of tensors before compiled code gets their addresses: the C library's and Triton's.

An address says nothing about what lies there. So everything that compiled code is told comes through here, whatever the
layers and autograd functions in front have asked already.
"""

import torch
from torch import Tensor

from .layouts import is_channels_last

_MAPS = ('x', 'grad', 'residual', 'other', 'y', 'grad_x', 'out')
_KERNELS = ('weight', 'grad_weight')
_PARTS = ('parts', 'origins', 'sums', 'squares', 'centred_sums')  # (any, C, ...); everything else has a value a channel


def check(
    owner: str,
    x: Tensor,
    tensors: dict[str, Tensor | None],
    dtypes: tuple[torch.dtype, ...],
    per_instance: bool = False,
) -> None:
    """Raise unless every tensor is what compiled code takes it for, by its name there, beside the map ``x``.

    Args:
        owner: for messages.
        x: a map ``(N, C, H, W)``.
        tensors: by name: maps are shaped and laid out as x, kernels are ``(C, 1, k, k)`` of one odd k, vectors
            ``(C,)``; None passes.
        dtypes: that the tensors may have.
        per_instance: vectors are ``(N, C)``.

    Raises:
        ValueError: names the tensor, what it is, and what it must be.
    """
    if x.dim() != 4 or x.layout != torch.strided:
        raise ValueError(f'{owner} got a map of shape {tuple(x.shape)}, {x.layout}; it must be (N, C, H, W), dense')
    size = next((t.shape[-1] for name in _KERNELS if (t := tensors.get(name)) is not None and t.dim()), 1)
    if not size % 2:
        raise ValueError(f'{owner} got weight of {size} columns; it must be an odd number of them')
    channels, names = x.shape[1], ' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype not in dtypes or tensor.device != x.device:
            raise ValueError(
                f'{owner} got {name} as a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}; it must be a '
                f'plain tensor of {names} on {x.device}'
            )
        if name in _MAPS:
            shape = x.shape
        elif name in _KERNELS:
            shape = (channels, 1, size, size)
        elif name in _PARTS:
            shape = (tensor.shape[0] if tensor.dim() else 0, channels, *tensor.shape[2:])
        else:
            shape = x.shape[:2] if per_instance else (channels,)
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f'{owner} got {name} of shape {tuple(tensor.shape)} with a map of shape {tuple(x.shape)}; it must be '
                f'{tuple(shape)}'
            )
        layout = torch.channels_last if name in _MAPS and is_channels_last(x) else torch.contiguous_format
        if not _lies_as_it_looks(tensor, layout):
            raise ValueError(
                f'{owner} got {name} of shape {tuple(tensor.shape)}, which must lie in memory as {layout} says: dense, '
                'all of it, with its own signs'
            )


def _lies_as_it_looks(tensor: Tensor, layout: torch.memory_format) -> bool:
    """Every value in its place in the layout, within the memory (FSDP takes it away), with the sign that memory has."""
    if tensor.layout != torch.strided or tensor.is_neg() or not tensor.is_contiguous(memory_format=layout):
        return False
    end = tensor.storage_offset() + tensor.numel()
    return tensor.numel() == 0 or end * tensor.element_size() <= tensor.untyped_storage().nbytes()
