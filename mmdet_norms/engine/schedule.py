"""Whether the schedule of the learning rate fits the training: said before the first iteration."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..commands import typed
from ..errors import UserError

# What makes a schedule, in the order in which differences are said; all else of a scheduler is where it stands.
_MADE_OF = (
    *('milestones', 'step_size', 'T_max', 'periods', 'total_steps', 'begin', 'end', 'total_iters', 'by_epoch', 'gamma'),
    *('factor', 'start_factor', 'end_factor', 'power', 'eta_min', 'eta_min_ratio', 'restart_weights'),
)
NEVER = 10**9  # what mmengine writes for no end
_LONG = 0.5  # of the training, for a warm-up; and for what is left after the last step


@HOOKS.register_module()
class ScheduleHook(Hook):
    """Say what of the schedule never acts, or ends before the training does. ``tools/train.py`` adds it.

    A resumed run goes on with the schedule and the learning rates that its checkpoint has, whatever the config says:
    where the two differ it is said, and an error if an option of the command line asked for the others.

    Args:
        options: those that change the schedule, such as ``('--epochs 24',)``.
    """

    priority = 'VERY_LOW'

    def __init__(self, options: Sequence[str] = ()):
        self.options = tuple(options)
        self._made: list[dict] = []
        self._rates: list[float] = []

    def before_run(self, runner: Runner) -> None:
        """Called when the schedulers are built and no checkpoint is loaded."""
        self._made = [_made_of(scheduler) for scheduler in _schedulers(runner)]
        self._rates = _rates(runner)

    def before_train(self, runner: Runner) -> None:
        """Called when the checkpoint is loaded."""
        found = _schedulers(runner)
        difference = next(self._differences(found, _rates(runner)), None)
        if difference is not None:
            if self.options:
                raise UserError(
                    f'--resume with {" ".join(self.options)}: a resumed run goes on with the schedule of its '
                    f'checkpoint, and that is another one ({difference}). Give what the run was begun with, or start '
                    'from its weights in another work dir: --cfg-options load_from=CKPT'
                )
            runner.logger.warning(
                f'the run goes on with the schedule of its checkpoint, not with that of the config: {difference}'
            )
        by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
        try:
            length = max(1, len(runner.train_dataloader))
        except TypeError:  # of data without a length, which only a training in iterations takes
            length = 1
        for problem in schedule_problems(found, None if by_iter else runner.max_epochs, runner.max_iters, length):
            runner.logger.warning(problem)

    def _differences(self, found: list[Any], rates: list[float]) -> Iterator[str]:
        if len(found) == len(self._made):
            for scheduler, made in zip(found, self._made):
                has = _made_of(scheduler)
                for key in made:
                    if has.get(key) != made[key]:
                        yield f'{type(scheduler).__name__}: {key} {has.get(key)} there and {made[key]} here'
        for there, here in zip(rates, self._rates) if len(rates) == len(self._rates) else ():
            if abs(there - here) > 1e-6 * abs(here):
                yield f'a learning rate of {there:g} there and {here:g} here'


def schedule_problems(
    schedulers: Sequence[Any], max_epochs: int | None, max_iters: int, epoch_length: int
) -> list[str]:
    """What of a schedule does not fit the training, one sentence each.

    Args:
        schedulers: built.
        max_epochs: None for a loop that counts iterations only.
        max_iters: of the whole training.
        epoch_length: iterations of an epoch, by which those are counted as epochs.
    """
    training = _Training(max_epochs, max_iters, epoch_length)
    problems = [problem for scheduler in schedulers for problem in training.problems(scheduler)]
    return [*problems, *training.end_of(schedulers)]


class _Training:
    def __init__(self, max_epochs: int | None, max_iters: int, epoch_length: int) -> None:
        self.max_epochs, self.max_iters, self.epoch_length = max_epochs, max_iters, epoch_length

    def problems(self, s: Any) -> Iterator[str]:
        """Of one scheduler by itself."""
        name, total = type(s).__name__, self._total(s)
        if total is None:
            if not getattr(s, 'need_val_args', False):
                yield (
                    f'{name} counts epochs and this training counts iterations: it never changes the {_what(s)}. '
                    'Write by_epoch=False, or convert_to_iter_based=True'
                )
            return
        if s.begin >= total:
            yield f'{name} begins at {self._at(s, s.begin)}, which the training never reaches: it ends at {self._end}'
            return
        length = min(s.end, total) - s.begin
        if _is_warm_up(s):
            factor = getattr(s, 'start_factor', getattr(s, 'factor', 1.0))
            if s.end - s.begin == 1 and factor < getattr(s, 'end_factor', 1.0):
                yield (
                    f'{name} of one {"epoch" if s.by_epoch else "iteration"} never ends: the {_what(s)} stays at '
                    f'{factor:g} of what it should be. Write end={s.begin + 2}, or leave it out'
                )
            elif s.end < NEVER and length < s.end - s.begin:
                yield f'the warm-up ends at {self._at(s, s.end)} and the training at {self._end}: it is never over'
            elif s.begin == 0 and s.end < total and s.end > _LONG * total:
                yield f'the warm-up takes {self._at(s, s.end)} of {self._end}'
            return
        never = [step for step in _milestones(s) if not s.begin <= step < min(s.end, total)]
        if never:
            listed = ', '.join(self._at(s, step) for step in never)
            over = self._end if s.end >= total else f'{self._at(s, s.end)}, where {name} ends'
            yield f'{name} never comes to its step{"s" * (len(never) > 1)} at {listed}: it is over at {over}'
        wanted = _length(s)
        if wanted is not None and wanted > length + 1 and s.begin + wanted > total:
            yield (
                f'{name} is made for {self._at(s, s.begin + wanted)} and the training ends at {self._end}: the '
                f'{_what(s)} does not come to where it should'
            )
        if s.by_epoch and length <= 1 and s.end >= total and not _milestones(s) and not name.startswith('Constant'):
            yield (
                f'{name} changes the {_what(s)} after each epoch and has one only: it stays where it starts. Write '
                'convert_to_iter_based=True'
            )
        if 'Cosine' in name and 'Restart' not in name and s.T_max < length - 1:
            yield (
                f'{name} is at its lowest at {self._at(s, s.begin + s.T_max)} and rises again from then on: '
                f'T_max={s.T_max} is less than its length, {length}'
            )

    def end_of(self, schedulers: Sequence[Any]) -> Iterator[str]:
        """That the learning rate stays where it is, long before the training ends."""
        lowering = [s for s in schedulers if s.param_name == 'lr' and self._total(s) and not _is_warm_up(s)]
        if not lowering:
            return
        last = max(lowering, key=self._iterations)
        advice = f'--epochs N of {typed("train")} scales the schedule with the training'
        if self._iterations(last) < self.max_iters:
            where = self._at(last, _end_of(last))
            yield (
                f'the schedule of the learning rate ends at {where} and the training at {self._end}: it stays at '
                f'{_value(last)} from then on. {advice}'
            )
            return
        listed = [s for s in lowering if hasattr(s, 'milestones')]
        steps = [step for s in listed for step in s.milestones if step < min(s.end, self._total(s))]
        if len(lowering) == 1 and steps and max(steps) < _LONG * self._total(last):
            yield (
                f'the last step of the learning rate is at {self._at(last, max(steps))} and the training ends at '
                f'{self._end}: most of it goes by at {_value(last)}. {advice}'
            )

    def _total(self, s: Any) -> int | None:
        return self.max_epochs if s.by_epoch else self.max_iters

    def _iterations(self, s: Any) -> float:
        return _end_of(s) * (self.epoch_length if s.by_epoch else 1)

    def _at(self, s: Any, step: float) -> str:
        if s.by_epoch:
            return f'epoch {step:g}'
        if self.max_epochs is not None and step and step % self.epoch_length == 0:
            return f'iteration {int(step)} (epoch {int(step // self.epoch_length)})'
        return f'iteration {int(step)}'

    @property
    def _end(self) -> str:
        iterations = f'iteration {self.max_iters}'
        return iterations if self.max_epochs is None else f'epoch {self.max_epochs} ({iterations})'


def _schedulers(runner: Runner) -> list[Any]:
    found = getattr(runner, 'param_schedulers', None) or []
    lists = found.values() if isinstance(found, dict) else [found]
    return [s for schedulers in lists for s in schedulers if hasattr(s, 'base_values')]


def _made_of(scheduler: Any) -> dict:
    return {key: vars(scheduler)[key] for key in _MADE_OF if key in vars(scheduler)}


def _rates(runner: Runner) -> list[float]:
    """The learning rates that the schedule starts from, or that stay where there is none."""
    groups = getattr(runner.optim_wrapper, 'param_groups', None) or []
    groups = [group for part in groups.values() for group in part] if isinstance(groups, dict) else groups
    return [float(group.get('initial_lr', group['lr'])) for group in groups]


def _what(s: Any) -> str:
    return {'lr': 'learning rate'}.get(s.param_name, s.param_name)


def _is_warm_up(s: Any) -> bool:
    """Whether a scheduler leads up to the values that the others start from."""
    name = type(s).__name__
    if 'Warmup' in name:
        return True
    if name.startswith('Linear'):
        return s.end_factor >= s.start_factor
    return name.startswith('Constant') and s.begin == 0 and s.factor < 1


def _milestones(s: Any) -> list[float]:
    """When a scheduler changes its value by steps."""
    found = getattr(s, 'milestones', None)
    if found is not None:
        return sorted(step for step in found)
    return [s.begin + s.step_size] if hasattr(s, 'step_size') else []


def _length(s: Any) -> float | None:
    """For how long a scheduler goes on until its value is where it should come to; None where it is nowhere."""
    for key in ('T_max', 'total_steps'):
        if hasattr(s, key):
            return getattr(s, key)
    if hasattr(s, 'periods'):
        return sum(s.periods)
    towards = hasattr(s, 'total_iters') and not type(s).__name__.startswith('Constant')
    return s.end - s.begin if towards and s.end < NEVER else None


def _end_of(s: Any) -> float:
    """When a scheduler changes nothing any more."""
    whole = [s.begin + getattr(s, key) for key in ('total_steps',) if hasattr(s, key)]
    whole += [s.begin + sum(s.periods)] if hasattr(s, 'periods') else []
    return min([s.end, *whole])


def _value(s: Any) -> str:
    """What a scheduler leaves behind, in words where that is not plain."""
    base = s.base_values[0] if s.base_values else 1.0
    if hasattr(s, 'milestones'):
        return f'{base * s.gamma ** sum(s.milestones[step] for step in s.milestones if step < s.end):g}'
    if hasattr(s, 'eta_min') and s.eta_min is not None:
        return f'about {s.eta_min:g}'
    return 'what it has then'
