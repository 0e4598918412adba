"""The course of a training, worked out before it: learning rates, and when it validates and saves."""

import bisect
import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner

from .norms import iterations_per_epoch
from .schedule import NEVER

_MOST = 5_000_000  # iterations that are stepped through


@dataclass
class Rates:
    """The learning rate of one optimizer over a training.

    Args:
        optimizer: its name where there are several, else empty.
        points: iteration -> learning rate of the first parameter group in that iteration: at the start, where
            schedulers begin, end or step, and in the last iteration.
        groups: how many parameter groups there are.
        factors: the lowest and the highest of their rates at the start, as multiples of the first one's.
        lowest, highest: of the whole training.
        waits: a scheduler waits for results of the validation, so that its steps are not known.
    """

    optimizer: str
    points: dict[int, float]
    groups: int
    factors: tuple[float, float]
    lowest: float
    highest: float
    waits: bool = False


def learning_rates(runner: Runner) -> list[Rates]:
    """What the schedulers of a runner will do until the end; nothing of it is done.

    Args:
        runner: whose train loop, optimizers and schedulers are built (in ``before_train``, say).
    """
    groups, schedulers = runner.optim_wrapper.param_groups, runner.param_schedulers or []
    groups = groups if isinstance(groups, dict) else {'': groups}
    schedulers = schedulers if isinstance(schedulers, dict) else {'': schedulers}
    return [_rates(name, own, schedulers.get(name, []), runner.train_loop) for name, own in groups.items()]


def validations(loop: BaseLoop) -> list[int]:
    """The epochs, or iterations in a loop of iterations, after which a loop of mmengine validates from now on."""
    _, end = end_of(loop)
    if loop.runner.val_loop is None or end is None:
        return []
    return [step for step in range(position(loop) + 1, end + 1) if validates_after(loop, step)]


def validates_after(loop: BaseLoop, step: int) -> bool:
    """Whether a loop of mmengine validates after that epoch, or iteration; False for one of another kind."""
    if not hasattr(loop, 'dynamic_milestones'):
        return False
    interval = loop.dynamic_intervals[bisect.bisect(loop.dynamic_milestones, step + 1) - 1]
    return step >= loop.val_begin and (step % interval == 0 or step == end_of(loop)[1])


def position(loop: BaseLoop) -> int:
    """Iterations that are done, in a loop of iterations, else epochs."""
    return loop.iter if isinstance(loop, IterBasedTrainLoop) else loop.epoch


def end_of(loop: BaseLoop) -> tuple[str, int | None]:
    """What ends the training, and when; None for a loop that knows no end."""
    key = 'max_iters' if isinstance(loop, IterBasedTrainLoop) else 'max_epochs'
    return key, getattr(loop, key, None)


def checkpoints(hook: CheckpointHook, loop: BaseLoop) -> list[int]:
    """The epochs, or iterations where the hook counts them, after which it will save from now on."""
    end, now = (loop.max_epochs, loop.epoch) if hook.by_epoch else (loop.max_iters, loop.iter)
    begin, interval = hook.save_begin, hook.interval
    due = {
        step for step in range(now + 1, end + 1) if interval > 0 and step >= begin and (step - begin) % interval == 0
    }
    return sorted(due | ({end} if hook.save_last and end > now else set()))


def epoch_length(loop: BaseLoop) -> int | None:
    """Iterations that show every image once; None for data without a length."""
    try:
        return max(1, iterations_per_epoch(loop.dataloader))
    except TypeError:
        return None


def _rates(name: str, groups: list[dict], schedulers: list[Any], loop: BaseLoop) -> Rates:
    first = {key: value for key, value in groups[0].items() if key != 'params'}
    # A stand-in for the optimizer: schedulers set values in param_groups, and look whether it has stepped.
    step = SimpleNamespace(_with_counter=True)
    stand_in = SimpleNamespace(param_groups=[first], step=step, _global_step=1)
    moving = []
    for scheduler in schedulers:
        if getattr(scheduler, 'need_val_args', False):
            continue
        twin = copy.copy(scheduler)
        twin.optimizer, twin.verbose = stand_in, False
        twin.base_values = list(scheduler.base_values[:1])
        twin._last_value = list(getattr(scheduler, '_last_value', [])[:1])
        moving.append(twin)
    by_iter = isinstance(loop, IterBasedTrainLoop)
    length = loop.max_iters if by_iter else len(loop.dataloader)
    start, end = loop.iter, min(loop.max_iters, loop.iter + _MOST)
    looked_at = {start, max(start, end - 1)} | {
        point for twin in moving if twin.param_name == 'lr' for point in _turns(twin, length) if start < point < end
    }
    points, lowest, highest = {}, math.inf, -math.inf
    for iteration in range(start, max(end, start + 1)):
        rate = float(first['lr'])
        lowest, highest = min(lowest, rate), max(highest, rate)
        if iteration in looked_at:
            points[iteration] = rate
        for twin in moving:
            if not twin.by_epoch or (not by_iter and (iteration + 1) % length == 0):
                twin.step()
    rates = [float(group.get('initial_lr', group['lr'])) for group in groups]
    factors = [rate / rates[0] for rate in rates] if rates[0] else [1.0]
    return Rates(
        name, points, len(groups), (min(factors), max(factors)), lowest, highest, waits=len(moving) < len(schedulers)
    )


def _turns(scheduler: Any, length: int) -> list[int]:
    """Iterations at which a scheduler begins, steps or ends."""
    steps = [scheduler.begin, *(getattr(scheduler, 'milestones', None) or ())]
    steps += [scheduler.end] if scheduler.end < NEVER else []
    if hasattr(scheduler, 'step_size'):
        steps += [scheduler.begin + scheduler.step_size * k for k in range(1, 4)]
    if hasattr(scheduler, 'periods'):
        total = scheduler.begin
        for period in scheduler.periods:
            total += period
            steps.append(total)
    unit = length if scheduler.by_epoch else 1
    return [int(step) * unit for step in steps]
