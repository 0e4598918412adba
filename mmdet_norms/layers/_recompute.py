"""Running a batch norm child where torch's own would count a batch twice, or refuse it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def in_backward() -> bool:
    """Is this forward run from within a backward pass? Then activation checkpointing is repeating it.

    Compiled code is asked while it is traced, and traces every forward once: False.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def statistics_kept(norm: _BatchNorm) -> Iterator[None]:
    """Inside, ``norm`` updates copies of its running statistics and batch counter, which are then dropped.

    Copies, because checkpointing compares what both forwards save for the backward pass: without running statistics,
    batch norm saves fewer tensors.
    """
    buffers = dict(norm._buffers)
    norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        yield
    finally:  # also when checkpointing stops a recomputation early, by an exception
        norm._buffers.update(buffers)


def run_batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` of a child batch norm, with two differences in training mode.

    * A forward that activation checkpointing repeats during the backward pass does not update the running statistics a
      second time: they end as without checkpointing. (torch's batch norm counts such batches twice.)
    * A batch with one value per channel, which has no variance, or with none (torch: an error, and a count) is
      normalized with the running statistics and leaves them as they are. A synchronized batch norm is called in any
      case: the values may be on other ranks, which wait for this one.

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
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    if in_backward():
        with statistics_kept(norm):
            return norm(x)
    return norm(x)


def _is_synchronized(norm: nn.Module) -> bool:
    if type(norm).__name__ != 'SyncBatchNorm':  # torch's and mmcv's, which share the name but no base class
        return False
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
