"""A few iterations of a real training, timed, which then ends: nothing of it is kept."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from .cost import images_per_iteration, peak_memory
from .course import Rates, checkpoints, epoch_length, learning_rates, validations
from .precise_bn import PreciseBNHook
from .together import model_of, models_of

_ITERATIONS = 8  # that are timed, in as much time as there is
_SECONDS = 20.0
_BATCHES = 4  # of the validation
_PRECISE_BATCHES = 3


class DryRunEnds(Exception):
    """What ends the training of a dry run."""


@dataclass
class Course:
    """What a training will do, from where it starts.

    Args:
        epoch, iteration: where it starts.
        rates: learning rates of each optimizer.
        validations: epochs, or iterations in a loop of iterations, after which it validates.
        checkpoints: unit and steps of each checkpoint hook, and how many it keeps (0 or less: all).
    """

    epoch: int
    iteration: int
    rates: list[Rates]
    validations: list[int]
    checkpoints: list[tuple[str, list[int], int]]


@dataclass
class Timing:
    """What :class:`DryRunHook` measured, in seconds.

    Args:
        iterations: of each timed iteration, from the end of the one before.
        data: the part of each in which it waited for its batch.
        settled: no norm was in its warm-up any more (CBN's burn-in, MABN's window).
        peak: the most bytes held, and of what: 'GPU', or 'process' without one.
    """

    iterations: list[float] = field(default_factory=list)
    data: list[float] = field(default_factory=list)
    settled: bool = True
    peak: int = 0
    peak_of: str = 'process'


class DryRunHook(Hook):
    """Note what a training will do, time some iterations of it, and end it by :class:`DryRunEnds`.

    Everything is the real thing: loader, augmentations, hooks, optimizer, processes. Nothing is saved or validated.
    All processes end at the same iteration.

    Args:
        settle: called with the model after the first iteration: ends warm-ups of norms, after which they cost what
            they cost in most of the training. Returns how many more iterations it takes until they do.
    """

    priority = 'LOWEST'

    def __init__(self, settle: Callable[[nn.Module], int] = lambda model: 0):
        self.settle = settle
        self.course: Course | None = None
        self.timing = Timing()
        self._warm_up = 1
        self._all: list[tuple[float, float]] = []  # seconds of each iteration, and of these waiting for data
        self._timed: list[tuple[float, float]] = []
        self._begun = self._ended = self._fetched = 0.0

    def before_train(self, runner: Runner) -> None:
        """Called when all is built and the checkpoint is loaded."""
        loop = runner.train_loop
        hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        self.course = Course(
            loop.epoch,
            loop.iter,
            learning_rates(runner),
            validations(loop),
            [
                ('epochs' if hook.by_epoch else 'iterations', checkpoints(hook, loop), hook.max_keep_ckpts)
                for hook in hooks
            ],
        )
        loop.val_begin = float('inf')
        for hook in hooks:
            hook.interval, hook.save_last = -1, False
        self._begun = time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """The batch is there."""
        self._fetched = time.monotonic()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Note the time; end the training if that was the last one."""
        if get_device() == 'cuda':
            torch.cuda.synchronize()
        now, timing = time.monotonic(), self.timing
        peak, timing.peak_of = peak_memory()
        timing.peak = max(timing.peak, peak)  # mmengine forgets it with each line that it logs
        last, self._ended = self._ended or self._begun, now
        self._all.append((now - last, self._fetched - last))
        done = len(self._all)
        if done > self._warm_up and batch_idx:  # not the start of a loader's workers
            self._timed.append(self._all[-1])
        if done == 1:
            self._warm_up += self.settle(model_of(runner))
        timing.settled = done > self._warm_up
        late = now - self._begun > _SECONDS and done >= 2
        enough = len(self._timed) >= _ITERATIONS or done >= self._warm_up + 2 * _ITERATIONS
        if _first_process_says(enough or late):
            self._end()

    def after_train(self, runner: Runner) -> None:
        """A training shorter than what was to be timed."""
        self._end()

    def _end(self) -> None:
        timed = self._timed or self._all[1:] or self._all  # the warm-up was not over, or an epoch has one iteration
        self.timing.iterations, self.timing.data = ([pair[k] for pair in timed] for k in range(2))
        raise DryRunEnds


def time_validation(runner: Runner) -> list[float]:
    """Seconds of each of some batches of the validation, without the first, which starts the loader, if there are more.

    The metrics are not computed.
    """
    loop = runner.val_loop
    if loop is None:
        return []
    times = []
    runner.model.eval()
    begun = last = time.monotonic()
    with torch.no_grad(), torch.autocast(_device_type(runner), enabled=bool(getattr(loop, 'fp16', False))):
        for i, batch in enumerate(loop.dataloader):
            runner.model.val_step(batch)
            if get_device() == 'cuda':
                torch.cuda.synchronize()
            now = time.monotonic()
            times.append(now - last)
            last = now
            if i + 1 >= _BATCHES or now - begun > _SECONDS:
                break
    return times[1:] or times


def time_precise_statistics(runner: Runner, course: Course) -> tuple[int, float] | None:
    """How often precise statistics are computed, and the seconds each time; None of a training without them."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, PreciseBNHook)), None)
    if hook is None:
        return None
    each = images_per_iteration(runner) or get_world_size()
    wanted = min(hook.num_images, len(runner.train_dataloader.dataset))
    hook.num_images = min(wanted, _PRECISE_BATCHES * each)
    hook.compute(runner)
    if not hook.batch_seconds:  # no norm has any
        return None
    # A checkpoint and an evaluation after the same iteration have them together.
    length = epoch_length(runner.train_loop) or 1
    by_iteration = isinstance(runner.train_loop, IterBasedTrainLoop)
    when = {step if by_iteration else step * length for step in course.validations}
    for unit, steps, _ in course.checkpoints:
        when |= {step * length if unit == 'epochs' else step for step in steps}
    batch = statistics.median(hook.batch_seconds[1:] or hook.batch_seconds)
    return len(when), hook.other_seconds + batch * math.ceil(wanted / each)


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn torch's errors about too little memory into one of :class:`MemoryError`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(str(error).partition('. ')[0]) from error
    except RuntimeError as error:
        if 'allocate memory' not in str(error):
            raise
        raise MemoryError(str(error).splitlines()[0]) from error


def state_bytes(runner: Runner) -> int:
    """About the size of a checkpoint: weights, buffers, averages of both, and the optimizers after a step."""
    states = [model.state_dict() for model in models_of(runner)]
    states.append(runner.optim_wrapper.state_dict())
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(states)}.values())


def _tensors(node: object) -> Iterator[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _tensors(value)


def _device_type(runner: Runner) -> str:
    return next(runner.model.parameters()).device.type


def _first_process_says(end: bool) -> bool:
    """The clock of one process decides for all; the others would wait for it."""
    flag = torch.tensor(int(end and get_rank() == 0))
    if get_device() == 'cuda':
        flag = flag.cuda()
    broadcast(flag)
    return bool(flag)
