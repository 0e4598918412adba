"""Running a batch norm child where torch's own would count a batch twice, be poisoned by it, or refuse it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..compat.torch_versions import is_compiling
from ._numerics import all_finite
from ._replay import in_backward, once


@contextmanager
def statistics_kept(norm: _BatchNorm) -> Iterator[dict[str, Tensor]]:
    """Inside, ``norm`` updates copies of its running statistics and batch counter, which are given here.

    Copies, because checkpointing compares what both forwards save for the backward pass: without running statistics,
    batch norm saves fewer tensors.
    """
    own, copies = dict(norm._buffers), copied_statistics(norm)
    norm._buffers.update(copies)
    try:
        yield copies
    finally:  # also when checkpointing stops a recomputation early, by an exception
        norm._buffers.update(own)


@torch.no_grad()
def take_if_finite(norm: _BatchNorm, **new: Tensor) -> None:
    """Write running statistics and batch counter, unless a statistic would be inf or nan: then all stay as they are.

    Loss scalers and hooks skip the step of a batch that overflowed, but its statistics would stay for ever.
    """
    new = {name: value.to(getattr(norm, name).dtype) for name, value in new.items()}
    good = all_finite(*(value for value in new.values() if value.is_floating_point()))
    for name, value in new.items():
        buffer = getattr(norm, name)
        buffer.copy_(torch.where(good, value, buffer))


@torch.no_grad()
def go_back_if_not_finite(norm: _BatchNorm, before: dict[str, Tensor]) -> None:
    """The same where the norm has taken them already: ``before`` are its :func:`copied_statistics` of before that."""
    if before:
        good = all_finite(norm.running_mean, norm.running_var)
        for name, old in before.items():
            buffer = getattr(norm, name)
            buffer.copy_(torch.where(good, buffer, old))


def copied_statistics(norm: _BatchNorm) -> dict[str, Tensor]:
    """Copies of the running statistics and the batch counter."""
    return {name: buffer.clone() for name, buffer in norm._buffers.items() if buffer is not None}


def _run_guarded(norm: _BatchNorm, x: Tensor) -> Tensor:
    """``norm(x)``, whose statistics stay if they would become inf or nan."""
    # Copies are updated: autograd remembers them, and would object to a write after the forward.
    if is_compiling():  # it does not follow a module that gets another buffer
        copies = copied_statistics(norm)
        y = torch.func.functional_call(norm, copies, (x,))
    else:
        with statistics_kept(norm) as copies:
            y = norm(x)
    take_if_finite(norm, **copies)
    return y


def run_batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` of a child batch norm, with three differences in training mode.

    * A forward that activation checkpointing repeats during the backward pass does not update the running statistics a
      second time: they end as without checkpointing. (torch's batch norm counts such batches twice.)
    * A batch with one value per channel, which has no variance, or with none (torch: an error, and a count) is
      normalized with the running statistics and leaves them as they are: in a repeated forward, those of then. A
      synchronized batch norm is called in any case: the values may be on other ranks, which wait for this one.
    * A batch whose mean or variance is inf or nan (in one channel is enough) leaves the running statistics and the
      batch counter as they are: see :func:`take_if_finite`.

    The child is called as a module wherever possible, so that hooks, SyncBN conversion, tracing and conv-BN fusion see
    it; anything but a batch norm (such as what a fusion left in its place) is just called.

    Args:
        norm: the child.
        x: ``(N, C, ...)``; under symbolic tracing, a proxy.
    """
    if not isinstance(x, Tensor) or not isinstance(norm, _BatchNorm) or not norm.training:
        return norm(x)
    if norm.running_mean is None or not norm.track_running_stats:
        return norm(x)
    if x.dim() == 4 and x.shape[0] * x.shape[2] * x.shape[3] <= 1 and not _is_synchronized(norm):
        return F.batch_norm(x, *running_statistics(norm), norm.weight, norm.bias, False, 0.0, norm.eps)
    if in_backward():
        with statistics_kept(norm):
            return norm(x)
    return _run_guarded(norm, x)


def running_statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Copies of the running mean and variance, for a training forward; when repeated, what they were then.

    Later forwards of a shared layer change them before the backward pass.
    """
    if is_compiling():
        return norm.running_mean, norm.running_var
    return once(norm, lambda: (norm.running_mean.clone(), norm.running_var.clone()))


def _is_synchronized(norm: nn.Module) -> bool:
    if type(norm).__name__ != 'SyncBatchNorm':  # torch's and mmcv's, which share the name but no base class
        return False
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
