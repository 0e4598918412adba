"""What a forward used, for activation checkpointing to use again when it repeats the forward."""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compat.torch_internals import backward_pass, checkpointed_regions, is_looked_at
from ..compat.torch_versions import is_compiling

_ATTRIBUTE = '_mmdet_norms_calls'
_REMEMBERED_CALLS = 32  # covers a head shared by all levels of a pyramid, several times over; C-sized vectors each

# Torch keeps an object for every checkpointed region: it is made when the region first runs, is there when the region
# runs again, and goes with the graph. So that is where calls of a region are remembered: in their order, which the
# repetition has, too. Equal inputs, the order of regions in the backward pass, steps without one, and second backward
# passes (each repeats from the start) are then all the same. Where the object is, only the running functions know.


def in_backward() -> bool:
    """Is this forward run from within a backward pass? Then activation checkpointing is repeating it.

    (Or for somebody who looks at the saved tensors of a graph.) Compiled code is asked while it is traced, and traces
    every forward once: False.
    """
    return not is_compiling() and (backward_pass() is not None or is_looked_at())


@dataclass
class _Record:
    """The calls of one layer in one region; of the current repetition, which it is and how many were repeated."""

    calls: list[tuple[Tensor, ...]] = field(default_factory=list)
    repetition: Hashable = None
    repeated: int = 0


def _keep(region: object, layer: object, call: tuple[Tensor, ...]) -> None:
    vars(region).setdefault(_ATTRIBUTE, {}).setdefault(layer, _Record()).calls.append(call)


def remember(layer: object, call: tuple[Tensor, ...]) -> bool:
    """Keep what this forward used for its repetitions, if a checkpoint is around it. Returns whether there is one."""
    regions = [region for region, repetition in checkpointed_regions() if repetition is None]
    for region in regions:
        _keep(region, layer, call)
    return bool(regions)


def recall(layer: object) -> tuple[Tensor, ...] | None:
    """What the forward that is being repeated used; None if it was not remembered."""
    new = []  # regions within the repeated one, which may be repeated themselves
    for region, repetition in checkpointed_regions():
        if repetition is None:
            new.append(region)
            continue
        record = vars(region).get(_ATTRIBUTE, {}).get(layer)
        if record is None:
            return None
        if record.repetition != repetition:
            record.repetition, record.repeated = repetition, 0
        if record.repeated == len(record.calls):
            return None
        call = record.calls[record.repeated]
        record.repeated += 1
        for inner in new:
            _keep(inner, layer, call)
        return call
    return None


def once(layer: object, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``compute()``; in a forward that a checkpoint repeats, what it returned the first time.

    Where other code repeats, it is computed again. :class:`Calls` knows such repetitions, too.
    """
    if in_backward():
        return recall(layer) or compute()
    used = compute()
    remember(layer, used)
    return used


class Calls:
    """What the training forwards of one layer used, for their repetitions: ``layer._calls.once(key, compute)``.

    Other code than torch's checkpoint that repeats forwards (the compiler's partitioner, other libraries) has no
    regions. For it the last 32 calls are remembered, and that with the nearest ``key`` is taken; of equal ones from the
    latest on, as backward passes meet them.

    Copies and pickles are empty.
    """

    def __init__(self):
        self._last: deque[tuple[Tensor, ...]] = deque(maxlen=_REMEMBERED_CALLS)
        self._taken: dict[torch.Size, Tensor] = {}  # by shape of the key, how often each call was

    def once(self, key: Tensor, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``compute()``; in a repeated forward what it returned the first time.

        A forward inside a backward pass that repeats none is computed as well, and not remembered.

        Args:
            key: a vector, or rows of them, that depend on the input.
        """
        if in_backward():
            call = self.recall(key)
            return call[1:] if call else compute()
        used = compute()
        self.add((key, *used))
        return used

    def add(self, call: tuple[Tensor, ...]) -> None:
        """``call[0]`` is the key."""
        if not remember(self, call):
            self._last.append(call)
            self._taken = {}

    def recall(self, key: Tensor) -> tuple[Tensor, ...] | None:
        """The call that is being repeated. None if there is none: a forward that only looks like a repetition."""
        return recall(self) or self._nearest(key)

    def _nearest(self, key: Tensor) -> tuple[Tensor, ...] | None:
        """Without looking at a value on the host."""
        calls = [call for call in self._last if (call[0].device, call[0].shape) == (key.device, key.shape)]
        if not calls:
            return None
        taken = self._taken.get(key.shape)
        if taken is None or len(taken) != len(calls):
            taken = self._taken[key.shape] = torch.zeros(len(calls), dtype=torch.int64, device=key.device)
        stacks = [torch.stack(vectors) for vectors in zip(*calls)]
        # A batch with an inf or nan is near to nothing; nan would count as the least of all distances.
        distance = (stacks[0] - key).abs().flatten(1).sum(1).nan_to_num(nan=float('inf'))
        order = torch.arange(len(calls), device=key.device) - len(calls) * taken
        best = torch.where(distance <= distance.min(), order, torch.full_like(order, -(2**62))).argmax(0, keepdim=True)
        taken.index_add_(0, best, torch.ones_like(best))
        return tuple(stack.index_select(0, best)[0] for stack in stacks)

    def __reduce__(self):
        return Calls, ()
