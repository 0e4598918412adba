"""The same values in other places of memory, for tests that draw one."""

import torch


def as_contiguous(t):
    return t.contiguous()


def as_channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def as_slice(t):
    """Every other value of something larger, from its second on."""
    larger = t.new_full([2 * size + 1 for size in t.shape], torch.nan)
    view = larger[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def as_transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def as_later_part(t):
    """Dense, with another offset than memory is aligned by."""
    memory = t.new_full((t.numel() + 6,), torch.nan)
    part = memory[3 : 3 + t.numel()].view(t.shape)
    part.copy_(t)
    return part


def as_negative(t):
    """A view that says of what is in memory: times -1."""
    return torch._neg_view(-t)


LAYOUTS = [as_contiguous, as_channels_last, as_slice, as_transposed, as_later_part, as_negative]
