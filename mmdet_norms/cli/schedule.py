"""``--epochs`` and ``--lr``: another length and another learning rate, and a schedule that fits them."""

import argparse
import contextlib
import copy
import io
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from mmdet.registry import DATASETS, HOOKS, PARAM_SCHEDULERS
from mmengine.config import Config
from mmengine.registry import LOOPS, OPTIMIZERS, DefaultScope
from mmengine.runner import IterBasedTrainLoop

from mmdet_norms.engine.dist import number_of_processes
from mmdet_norms.entries import class_of, is_a, parameter_of
from mmdet_norms.errors import UserError
from mmdet_norms.layers._args import is_number

from .options import given_options, merge_options

WARM_UP = 0.1
"""The part of a training that a warm-up in iterations may take at most."""

CHECKPOINTS = 5
"""How many a training writes at least."""

# What of a scheduler is a point in time or a length.
_TIMES = ('begin', 'end', 'T_max', 'step_size', 'total_steps')
_LISTS = ('milestones', 'periods')
# Of hooks that act at an epoch.
_OF_HOOKS = ('num_last_epochs', 'switch_epoch', 'begin_epoch')
# Values that are learning rates, not parts of one.
_RATES = ('eta_min', 'eta_max', 'min_value')
_SCALED = ('train_cfg', 'param_scheduler', 'default_hooks', 'optim_wrapper')


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """``--epochs`` and ``--lr``."""
    parser.add_argument(
        '--epochs',
        type=int,
        metavar='N',
        help='train for N epochs: the schedule of the learning rate is stretched or shrunk with it, and so are the '
        'intervals of validation and checkpoints; a warm-up takes a tenth at most',
    )
    parser.add_argument(
        '--lr',
        type=float,
        metavar='LR',
        help='the learning rate that the schedule starts from; with --auto-scale-lr or --batch-size the '
        'one for auto_scale_lr.base_batch_size',
    )


def apply_schedule_options(cfg: Config, args: argparse.Namespace) -> list[str]:
    """Change ``cfg`` as ``--epochs`` and ``--lr`` say; what ``--cfg-options`` say about the schedule stays.

    Returns:
        What was done, one line each.

    Raises:
        UserError: a number that is none, both options and ``--cfg-options`` for one value, or nothing to scale.
    """
    given = [f'--{name} {getattr(args, name)}' for name in ('epochs', 'lr') if getattr(args, name) is not None]
    args.schedule_options = given
    if not given:
        return []
    options = given_options(args)
    notes = []
    if args.epochs is not None:
        if args.epochs < 1:
            raise UserError(f'--epochs {args.epochs}: must be 1 or more')
        require_once(f'--epochs {args.epochs}', options, 'train_cfg', ('max_epochs', 'max_iters'))
        notes += scale_to(cfg, args.epochs, args.launcher)
    if args.lr is not None:
        if not (args.lr > 0 and math.isfinite(args.lr)):
            raise UserError(f'--lr {args.lr}: must be positive, such as 0.02')
        require_once(f'--lr {args.lr}', options, 'optim_wrapper.optimizer', ('lr',))
        notes += set_learning_rate(cfg, args.lr)
        if args.auto_scale_lr:
            notes[-1] += ', for auto_scale_lr.base_batch_size images; --auto-scale-lr multiplies it'
    merge_options(cfg, args, leave=lambda key: key.partition('.')[0] not in _SCALED)
    return notes


def require_order(cfg: Config) -> None:
    """Raise if a scheduler would end before it begins, as one without an end does that begins after the training."""
    loop = cfg.get('train_cfg') or {}
    for i, entry in enumerate(schedulers(cfg.get('param_scheduler'))):
        epochs = counts_epochs(entry)
        begin, end = entry.get('begin', 0), entry.get('end', loop.get('max_epochs' if epochs else 'max_iters'))
        if isinstance(begin, (int, float)) and isinstance(end, (int, float)) and end <= begin:
            name = getattr(class_of(entry, PARAM_SCHEDULERS), '__name__', entry.get('type'))
            unit = 'epochs' if epochs else 'iterations'
            raise UserError(
                f'param_scheduler.{i}: {name} begins at {begin} and ends at {end} ({unit}'
                + ('' if 'end' in entry else ', as the training does')
                + '). --epochs N scales a schedule together with the training; train_cfg.max_epochs alone does not'
            )


def end_warm_ups(cfg: Config, length: Callable[[], int]) -> None:
    """Let a warm-up that was shortened to one iteration change nothing.

    mmengine's begins with its factor there and takes its next step never: the rate would stay a hundredth for good.

    Args:
        length: iterations of an epoch, which are asked for where a warm-up takes one.
    """
    for entry in schedulers(cfg.get('param_scheduler')):
        steps = entry.get('end', math.inf) - entry.get('begin', 0)
        if not _is_warm_up(entry) or steps > 1:
            continue
        if counts_epochs(entry) and not (entry.get('convert_to_iter_based') and length() == 1):
            continue
        name = getattr(class_of(entry, PARAM_SCHEDULERS), '__name__', '')
        if name.startswith('Linear'):
            entry['start_factor'] = entry.get('end_factor', 1.0)
        elif name.startswith('Constant'):
            entry['factor'] = 1.0


def scale_to(cfg: Config, epochs: int, launcher: str = 'none') -> list[str]:
    """Let a training take ``epochs`` epochs, and everything in it that is a time take the same part of it.

    Times in epochs stay so where they come out whole, else they are counted in iterations. A warm-up in iterations
    keeps its length, but takes a tenth of the training at most. A training in iterations gets those of so many epochs.
    Intervals of validation and checkpoints are rounded such that there are no more than before, except that there are
    five checkpoints or more.
    """
    return _Scaling(cfg, epochs, launcher).run()


class _Scaling:
    def __init__(self, cfg: Config, epochs: int, launcher: str) -> None:
        self.cfg, self.epochs, self.launcher = cfg, epochs, launcher
        self.loop = cfg.get('train_cfg') or {}
        self._length: int | None = None
        self.warm_up: dict[int, int] = {}  # iterations at which a warm-up ended -> ends now

    def run(self) -> list[str]:
        loop, epochs = self.loop, self.epochs
        by_iter = issubclass_of_iter_loop(loop)
        old = loop.get('max_iters' if by_iter else 'max_epochs')
        if not isinstance(old, (int, float)) or old <= 0:
            raise UserError(
                f'--epochs {epochs}: the config does not say for how long to train (train_cfg.max_epochs), so that '
                'there is nothing to scale; set it by --cfg-options'
            )
        new = epochs * self.length if by_iter else epochs
        self.factor = new / old
        loop['max_iters' if by_iter else 'max_epochs'] = new
        ends = (old, new)
        scale_validations(loop, self.factor, ends)
        entries = list(schedulers(self.cfg.get('param_scheduler')))
        for entry in entries:
            self._shorten_warm_up(entry)
        for entry in entries:
            self._scale(entry)
        end_warm_ups(self.cfg, lambda: self.length)
        checkpoint = (self.cfg.get('default_hooks') or {}).get('checkpoint') or {}
        counts_iters = not checkpoint.get('by_epoch', True)
        if counts_iters == by_iter and isinstance(checkpoint.get('interval'), int) and checkpoint['interval'] > 0:
            # a config of few epochs writes few checkpoints, and a run that is killed starts again from the last one
            checkpoint['interval'] = min(
                whole_interval(checkpoint['interval'], self.factor, ends), math.ceil(new / CHECKPOINTS)
            )
        for hook in self.cfg.get('custom_hooks') or () if not by_iter else ():
            for key in _OF_HOOKS:
                if isinstance(hook.get(key), int) and parameter_of(hook, key, HOOKS) is not None:
                    hook[key] = round(hook[key] * self.factor)
        unit = 'iterations' if by_iter else 'epochs'
        now = f'{new} iterations' if by_iter else f'{new} epochs'
        return [
            f'--epochs {epochs}: the schedule of {old:g} {unit}, made to take {now}: '
            + ('; '.join(map(_described, entries)) or 'the learning rate stays the same throughout')
            + f'; validation every {loop.get("val_interval", 1)} {unit}'
        ]

    @property
    def length(self) -> int:
        """Iterations of an epoch, of the data as the run reads them."""
        if self._length is None:
            self._length = epoch_length(self.cfg, self.launcher)
        return self._length

    def _shorten_warm_up(self, entry: dict) -> None:
        if counts_epochs(entry) or entry.get('begin', 0) != 0 or not _is_warm_up(entry) or 'end' not in entry:
            return
        end = min(entry['end'], max(1, int(WARM_UP * self.epochs * self.length)))
        self.warm_up[entry['end']] = entry['end'] = end

    def _scale(self, entry: dict) -> None:
        if not counts_epochs(entry) and entry.get('end') in self.warm_up.values() and _is_warm_up(entry):
            return
        times = {key: entry[key] for key in _TIMES if is_number(entry.get(key))}
        lists = {key: list(entry[key]) for key in _LISTS if isinstance(entry.get(key), (list, tuple))}
        whole_length = times.get('T_max') == times.get('end', 0) - times.get('begin', 0)
        inside = [value < times.get('end', math.inf) for value in lists.get('milestones', ())]
        times = {key: value * self.factor for key, value in times.items()}
        lists = {key: [value * self.factor for value in values] for key, values in lists.items()}
        unit, begin = 1, None
        if counts_epochs(entry):
            whole = all(map(_is_whole, [*times.values(), *(value for values in lists.values() for value in values)]))
            # a curve that moves after each epoch stands still in one
            still = not {'milestones', 'step_size'} & {*lists, *times} and not entry.get('convert_to_iter_based')
            still = still and times.get('end', self.epochs) - times.get('begin', 0) <= 1
            if (still or not whole) and not is_a(entry, 'ReduceOnPlateauParamScheduler', PARAM_SCHEDULERS):
                unit = self.length
                entry['by_epoch'] = False
                entry.pop('convert_to_iter_based', None)
        else:
            begin = self.warm_up.get(entry.get('begin'))
        stretch(entry, self.factor, unit, begin)
        if inside:  # a milestone that was in it stays in it
            end = entry.get('end', round(self.epochs * (1 if counts_epochs(entry) else self.length)))
            steps = zip(entry['milestones'], inside)
            entry['milestones'] = [min(step, max(1, end - 1)) if was_in else step for step, was_in in steps]
        if whole_length:
            entry['T_max'] = entry['end'] - entry.get('begin', 0)


def scale_validations(loop: dict, factor: float, ends: tuple[float, float] | None = None) -> None:
    """Let a ``train_cfg`` validate after ``factor`` times as many steps; ``ends`` as for :func:`whole_interval`."""
    if is_number(loop.get('val_interval')):
        loop['val_interval'] = whole_interval(loop['val_interval'], factor, ends)
    if is_number(loop.get('val_begin')):
        loop['val_begin'] = max(1, math.ceil(loop['val_begin'] * factor - 1e-6))
    if loop.get('dynamic_intervals'):
        loop['dynamic_intervals'] = [
            (max(1, round(start * factor)), whole_interval(interval, factor, ends))
            for start, interval in loop['dynamic_intervals']
        ]


def whole_interval(interval: float, factor: float, ends: tuple[float, float] | None = None) -> int:
    """``factor`` times an interval: the same for validations and for checkpoints, so that they still fall together.

    Rounded down, unless one more would come of it: just before the end, where there is one anyway.

    Args:
        ends: where the training ended and where it ends now.
    """
    new = max(1, math.floor(interval * factor + 1e-6))
    if ends and interval > 0:
        new = max(new, math.ceil(ends[1] / math.ceil(ends[0] / interval)))
    return new


def stretch(entry: dict, factor: float, unit: int = 1, begin: int | None = None) -> None:
    """Let a scheduler take ``factor`` times as many steps, which are counted in ``unit`` times smaller ones.

    Args:
        begin: where it begins then, if that is known otherwise.
    """
    times = {key: round(entry[key] * factor * unit) for key in _TIMES if is_number(entry.get(key))}
    times |= {} if begin is None else {'begin': begin}
    entry.update({key: max(int(key != 'begin'), value) for key, value in times.items()})
    lists = {
        key: [value * factor for value in entry[key]] for key in _LISTS if isinstance(entry.get(key), (list, tuple))
    }
    if 'periods' in lists:  # one after the other: what is rounded off one is the next one's
        ends = [0, *(round(end * unit) for end in itertools.accumulate(lists['periods']))]
        entry['periods'] = [max(1, after - before) for before, after in itertools.pairwise(ends)]
    if 'milestones' in lists:
        entry['milestones'] = [max(1, round(value * unit)) for value in lists['milestones']]
    if 'end' in times:
        entry['end'] = max(entry['end'], entry.get('begin', 0) + 1)
    if is_a(entry, 'ExponentialParamScheduler', PARAM_SCHEDULERS) and 'gamma' in entry:
        entry['gamma'] **= 1 / (factor * unit)  # the same in the end


def set_learning_rate(cfg: Config, lr: float) -> list[str]:
    """Let the schedule start from ``lr``; the lowest and highest rates that it names keep their relation to it."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not isinstance(optimizer, Mapping):
        raise UserError(
            f'--lr {lr}: the config has no optim_wrapper.optimizer, of which it is the learning rate; set that of each '
            'optimizer by --cfg-options'
        )
    old = learning_rate_of(optimizer)
    optimizer['lr'] = lr
    old = old if is_number(old) and old > 0 else None
    if old:
        scale_rates(cfg, lr, old)
    return [f'--lr {lr}: the learning rate' + (f' (the config has {old:g})' if old else '')]


def learning_rate_of(optimizer: Mapping) -> Any:
    """What an entry says, or the default of its class; None where there is neither."""
    return optimizer.get('lr', getattr(parameter_of(optimizer, 'lr', OPTIMIZERS), 'default', None))


def scale_rates(cfg: Config, new: float, old: float = 1) -> None:
    """Multiply the learning rates that schedulers name by ``new / old``."""
    for entry in schedulers(cfg.get('param_scheduler')):
        if 'Momentum' not in getattr(class_of(entry, PARAM_SCHEDULERS), '__name__', ''):
            entry.update({key: entry[key] * new / old for key in _RATES if is_number(entry.get(key))})


def issubclass_of_iter_loop(loop: Mapping) -> bool:
    """Whether a ``train_cfg`` counts iterations."""
    kind = class_of(loop, LOOPS)
    if kind is None:
        return loop.get('by_epoch') is False or ('max_iters' in loop and 'max_epochs' not in loop)
    return isinstance(kind, type) and issubclass(kind, IterBasedTrainLoop)


def require_once(option: str, options: Mapping, where: str, keys: tuple[str, ...]) -> None:
    """Raise if ``--cfg-options`` set the same."""
    for key in keys:
        inside = isinstance(options.get(where), Mapping) and key in options[where]
        if f'{where}.{key}' in options or inside:
            raise UserError(f'{option}: --cfg-options {where}.{key} says something else; give one of the two')


def schedulers(node: Any) -> list[dict]:
    """The entries of a ``param_scheduler``: one, several, or several for each optimizer."""
    if isinstance(node, (list, tuple)):
        return [entry for entry in node if isinstance(entry, dict)]
    if isinstance(node, dict) and node.get('type') is None:
        return [entry for part in node.values() for entry in schedulers(part)]
    return [node] if isinstance(node, dict) else []


def counts_epochs(entry: Mapping) -> bool:
    """Whether a scheduler does."""
    return bool(entry.get('by_epoch', True))


def _is_warm_up(entry: Mapping) -> bool:
    """Whether a scheduler leads up to the rate that the others start from."""
    name = getattr(class_of(entry, PARAM_SCHEDULERS), '__name__', '')
    if 'Warmup' in name:
        return True
    if name.startswith('Linear'):
        return entry.get('start_factor', 1 / 3) <= entry.get('end_factor', 1.0)
    return name.startswith('Constant') and entry.get('factor', 1 / 3) < 1


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-6 * max(1, abs(value))


def _described(entry: Mapping) -> str:
    unit = 'epochs' if counts_epochs(entry) else 'iterations'
    name = getattr(class_of(entry, PARAM_SCHEDULERS), '__name__', str(entry.get('type')))
    times = [f'{key} {entry[key]}' for key in (*_LISTS, 'step_size') if key in entry]
    end = f'{entry.get("begin", 0)} to {entry["end"]}' if 'end' in entry else ''
    return f'{name} {", ".join([*([end] if end else []), *times])} {unit}'


def epoch_length(cfg: Config, launcher: str) -> int:
    """Iterations of an epoch: the data set is built, since filters and wrappers decide how many images it has."""
    loader = cfg.train_dataloader
    scope = cfg.get('default_scope') or 'mmdet'
    with DefaultScope.overwrite_default_scope(scope), contextlib.redirect_stdout(io.StringIO()):
        dataset = DATASETS.build(copy.deepcopy(loader['dataset']))
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
    images = math.ceil(len(dataset) / number_of_processes(launcher))
    batches = images / (loader.get('batch_size') or 1)
    batches = math.floor(batches) if loader.get('drop_last') else math.ceil(batches)
    return max(1, min(batches, loader.get('num_batch_per_epoch') or batches))
