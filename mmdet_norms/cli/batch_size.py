"""``--batch-size``: another number of images per iteration, and learning rate and schedule that fit it."""

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmdet.registry import HOOKS, PARAM_SCHEDULERS
from mmengine.config import Config
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop

from mmdet_norms.engine.dist import number_of_processes
from mmdet_norms.entries import class_of, is_a, name_of
from mmdet_norms.errors import UserError
from mmdet_norms.layers._args import is_number

from .options import given_options
from .schedule import (
    CHECKPOINTS,
    counts_epochs,
    end_warm_ups,
    epoch_length,
    issubclass_of_iter_loop,
    learning_rate_of,
    require_once,
    scale_rates,
    scale_validations,
    schedulers,
    stretch,
    whole_interval,
)

IMAGES, ITERS = 'images', 'iters'


def add_batch_size_arguments(parser: argparse.ArgumentParser) -> None:
    """``--batch-size``, ``--budget`` and ``--no-scale-lr``."""
    parser.add_argument(
        '--batch-size',
        type=int,
        metavar='B',
        help='images per iteration, of all processes together. The learning rate is multiplied with it, from the batch '
        "that the config's is for: auto_scale_lr.base_batch_size, else train_dataloader.batch_size",
    )
    parser.add_argument(
        '--budget',
        choices=[IMAGES, ITERS],
        default=IMAGES,
        help='with --batch-size, what stays as it is with the batch of the config: the images that are seen '
        f'({IMAGES}, the default), or the iterations ({ITERS})',
    )
    parser.add_argument('--no-scale-lr', action='store_true', help='with --batch-size, leave the learning rate')


def reference_batch(cfg: Config) -> int:
    """Images per iteration, of all processes together, that learning rate and schedule of a config are made for.

    Raises:
        UserError: it does not say so, or the batch is not that of the data loader.
    """
    loader = cfg.get('train_dataloader') or {}
    for part in ('sampler', 'batch_sampler'):
        if isinstance(loader.get(part), Mapping) and 'batch_size' in loader[part]:
            raise UserError(
                f'--batch-size: train_dataloader.{part} ({name_of(loader[part])}) has a batch_size of its own; set '
                'both by --cfg-options'
            )
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size') or loader.get('batch_size')
    if not isinstance(base, int) or base < 1:
        raise UserError(
            '--batch-size: the config does not say which batch its learning rate is for; write it, by --cfg-options '
            'auto_scale_lr.base_batch_size=16'
        )
    return base


def begin(cfg: Config, args: argparse.Namespace) -> None:
    """Check the options, and let the data loader have the batch that the schedule is made for, until :func:`apply`."""
    if args.batch_size is None:
        for option, given in (('--budget iters', args.budget != IMAGES), ('--no-scale-lr', args.no_scale_lr)):
            if given:
                raise UserError(f'{option}: says what to do with another --batch-size; give that, too')
        return
    said = f'--batch-size {args.batch_size}'
    if args.batch_size < 1:
        raise UserError(f'{said}: must be 1 or more')
    if args.auto_scale_lr:
        raise UserError(f'{said} scales the learning rate by itself: leave --auto-scale-lr out')
    require_once(said, given_options(args), 'train_dataloader', ('batch_size',))
    processes = number_of_processes(args.launcher)
    if args.batch_size % processes:
        raise UserError(f'{said}: is of all processes together, and must be a multiple of their number, {processes}')
    args.reference_batch = reference_batch(cfg)
    cfg.train_dataloader.batch_size = args.reference_batch / processes


def apply(cfg: Config, args: argparse.Namespace) -> list[str]:
    """Change ``cfg`` as the options say; it is the training with the batch of the config until now.

    Returns:
        What was done, one line each.
    """
    if args.batch_size is None:
        return []
    change = _Change(cfg, args.batch_size, args.reference_batch, args.launcher)
    change.scale_times(args.budget)
    if not args.no_scale_lr:
        change.scale_learning_rate()
    elif cfg.get('auto_scale_lr'):
        cfg.auto_scale_lr.enable = False
    cfg.train_dataloader.batch_size = args.batch_size // number_of_processes(args.launcher)
    if args.budget == IMAGES:
        end_warm_ups(cfg, lambda: epoch_length(cfg, args.launcher))
    given = [f'--batch-size {args.batch_size}', f'--budget {args.budget}', *['--no-scale-lr'] * args.no_scale_lr]
    args.schedule_options = [*args.schedule_options, ' '.join(given)]
    return [f'--batch-size {args.batch_size} in place of {change.reference}: {"; ".join(change.notes)}']


class _Change:
    def __init__(self, cfg: Config, batch: int, reference: int, launcher: str) -> None:
        self.cfg, self.batch, self.reference, self.launcher = cfg, batch, reference, launcher
        self.loop = cfg.get('train_cfg') or {}
        self.notes: list[str] = []

    def scale_times(self, budget: str) -> None:
        by_iter = issubclass_of_iter_loop(self.loop)
        if budget == ITERS:
            if not by_iter:
                self._count_iterations()
            self.notes.append(f'{self.loop.get("max_iters")} iterations, as there')
        elif by_iter:
            factor, ends = self.reference / self.batch, None
            if is_number(self.loop.get('max_iters')):
                ends = self.loop['max_iters'], max(1, round(self.loop['max_iters'] * factor))
                self.loop['max_iters'] = ends[1]
            scale_validations(self.loop, factor, ends)
            self._scale_iterations(factor, ends)
            self.notes.append(f'as many images: {self.loop["max_iters"]} iterations')
        else:
            if any(not counts_epochs(entry) for entry in schedulers(self.cfg.get('param_scheduler'))):
                reference = self._epoch_length()
                self.cfg.train_dataloader.batch_size = self.batch / number_of_processes(self.launcher)
                self._scale_iterations(self._epoch_length() / reference)
            else:
                self._scale_iterations(self.reference / self.batch)
            self.notes.append(f'as many images: {self.loop.get("max_epochs")} epochs')

    def scale_learning_rate(self) -> None:
        """By the linear rule, all rates that the config names."""
        factor = self.batch / self.reference
        if self.cfg.get('auto_scale_lr'):
            self.cfg.auto_scale_lr.enable = False  # mmengine would do it once more
        found = list(_optimizers(self.cfg.get('optim_wrapper')))
        for optimizer in found:
            old = learning_rate_of(optimizer)
            if not is_number(old):
                found = []
                break
            optimizer['lr'] = old * factor
        if not found:
            raise UserError(
                f'--batch-size {self.batch}: the config has no optim_wrapper.optimizer.lr to scale; leave it as it is '
                'by --no-scale-lr'
            )
        scale_rates(self.cfg, factor)
        rates = ' and '.join(dict.fromkeys(f'{optimizer["lr"]:g}' for optimizer in found))
        self.notes.append(f'learning rate {rates} by the linear rule')

    def _count_iterations(self) -> None:
        """Let a training in epochs take the iterations that it has with the batch of the config."""
        loop, kind = self.loop, class_of(self.loop, LOOPS)
        if kind not in (None, EpochBasedTrainLoop) or not isinstance(loop.get('max_epochs'), int):
            raise UserError(
                f'--budget {ITERS}: train_cfg must be an EpochBasedTrainLoop with max_epochs, or count iterations; '
                f'give --budget {IMAGES}'
            )
        for hook in self.cfg.get('custom_hooks') or ():
            epochs = [key for key, value in hook.items() if 'epoch' in key and type(value) is int and value > 0]
            if epochs:
                raise UserError(
                    f'--budget {ITERS}: {name_of(hook, HOOKS)} acts at an epoch ({epochs[0]}={hook[epochs[0]]}), and '
                    f'so many iterations have none in common; give --budget {IMAGES}'
                )
        length = self._epoch_length()
        total = loop.max_epochs * length
        loop.setdefault('val_interval', 1)
        scale_validations(loop, length)
        for key in ('type', 'by_epoch', 'max_epochs'):
            loop.pop(key, None)
        loop.update(type='IterBasedTrainLoop', max_iters=total)
        for entry in schedulers(self.cfg.get('param_scheduler')):
            if counts_epochs(entry) and not is_a(entry, 'ReduceOnPlateauParamScheduler', PARAM_SCHEDULERS):
                stretch(entry, length)
                entry['by_epoch'] = False
                entry.pop('convert_to_iter_based', None)
        hooks = self.cfg.get('default_hooks') or {}
        checkpoint = hooks.get('checkpoint')
        if isinstance(checkpoint, Mapping) and checkpoint.get('by_epoch', True):
            interval = checkpoint.get('interval', -1)
            checkpoint.by_epoch = False
            if isinstance(interval, int) and interval > 0:
                checkpoint.interval = min(interval * length, math.ceil(total / CHECKPOINTS))
        if isinstance(hooks.get('logger'), Mapping):
            hooks.logger.log_metric_by_epoch = False
        self.cfg.log_processor = dict(self.cfg.get('log_processor') or {}, by_epoch=False)

    def _scale_iterations(self, factor: float, ends: tuple[float, float] | None = None) -> None:
        """What counts iterations beside the loop: schedules, and the interval of checkpoints."""
        for entry in schedulers(self.cfg.get('param_scheduler')):
            if not counts_epochs(entry):
                stretch(entry, factor)
        checkpoint = (self.cfg.get('default_hooks') or {}).get('checkpoint') or {}
        interval = checkpoint.get('interval')
        if checkpoint.get('by_epoch') is False and isinstance(interval, int) and interval > 0:
            checkpoint['interval'] = whole_interval(interval, factor, ends)

    def _epoch_length(self) -> int:
        return epoch_length(self.cfg, self.launcher)


def _optimizers(wrapper: Any) -> Iterator[dict]:
    """That of an ``optim_wrapper``, or those of several."""
    if not isinstance(wrapper, Mapping):
        return
    if isinstance(wrapper.get('optimizer'), dict):
        yield wrapper['optimizer']
        return
    for part in wrapper.values():
        if isinstance(part, Mapping):
            yield from _optimizers(part)
