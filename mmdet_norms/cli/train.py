"""``tools/train.py``: train a detector from a config."""

import argparse
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from mmdet.registry import OPTIM_WRAPPERS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner

from mmdet_norms.commands import typed
from mmdet_norms.deploy import is_fused
from mmdet_norms.engine import CPUAmpOptimWrapper
from mmdet_norms.engine.optim import is_second_order
from mmdet_norms.engine.safe_checkpoints import LAST, CheckpointFolder
from mmdet_norms.engine.shared_memory import require_shared_memory
from mmdet_norms.engine.trackers import start_trackers
from mmdet_norms.engine.work_dir import (
    Begins,
    claimed,
    is_finished,
    left_alone_when_refused,
    mark_finished,
    require_fresh,
    require_replaceable,
    tidy,
)
from mmdet_norms.entries import class_of, name_of
from mmdet_norms.files import require_room

from . import batch_size
from .check import check_data
from .common import (
    UserError,
    add_check_argument,
    add_common_arguments,
    add_hook,
    add_seed_argument,
    build_runner,
    command,
    is_first_process,
    load_config,
    require_annotations,
    require_checkpoint,
    run_with_checkpoint,
    set_on_hook,
    use_threads,
)
from .config_checks import require_none, training_problems
from .dry_run import add_dry_run_arguments, dry_run, nothing_kept
from .options import given_options
from .per_class import validate_per_class
from .precise_bn import add_precise_bn_argument, use_precise_bn
from .schedule import add_schedule_arguments, apply_schedule_options, require_order
from .trackers import add_tracker_arguments, use_trackers
from .weights import add_partial_argument, check_training, fused_refusal, pretrained_files, weights_left_out


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(argv)
    with nothing_kept(args):
        cfg = train_config(args)
        if args.finished:
            print(f'nothing to do: {args.finished}')
            return
        check_training(cfg, args)
        if args.dry_run:
            guard_work_dir(cfg, args)
            return dry_run(cfg, args)
    first = is_first_process(args)
    with claimed(cfg.work_dir) if first else nullcontext():
        if first:
            guard_work_dir(cfg, args)
        with left_alone_when_refused(cfg.work_dir, cfg.filename) if first else nullcontext(threading.Event()) as begun:
            runner = build_runner(cfg, *args.notes, use_threads(args, cfg.get('train_dataloader')))
            if runner.optim_wrapper is not None:  # now, so that a wrong one is answered before a run is deleted
                runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            start_trackers(runner)
            if first:
                clear_work_dir(runner, cfg)
            runner.register_hook(Begins(begun, CheckpointFolder.of(cfg) if args.overwrite else None))
            run_with_checkpoint(runner.train, args)
        if first:
            mark_finished(cfg.work_dir, runner.epoch, runner.iter, _end(cfg))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=typed('train'), description='Train a detector.')
    parser.add_argument('config', help='config file, or PACKAGE::path, e.g. mmdet::retinanet/...')
    parser.add_argument('--amp', action='store_true', help='mixed precision (bfloat16 on a CPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's auto_scale_lr.base_batch_size to the real one",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='go on from CKPT or, without a value, from the latest checkpoint in the work dir',
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='start anew in a work dir that holds an earlier run: its checkpoints and results.json are deleted when '
        'training begins',
    )
    parser.add_argument(
        '--tune-mode',
        action='store_true',
        help='compute norms with fixed statistics (norm_eval, frozen_stages, FrozenBN) as part of their convolutions',
    )
    parser.add_argument(
        '--on-nonfinite',
        choices=['stop', 'skip'],
        help='at a loss, gradient or running statistic that is NaN or infinite: stop (default), or skip the step',
    )
    parser.add_argument(
        '--norm-stats',
        type=int,
        metavar='N',
        help='record what norm layers see every N iterations: batch statistics, those of the backward pass, and a '
        "method's own (docs/analyze.md)",
    )
    parser.add_argument(
        '--norm-stats-layers',
        nargs='+',
        metavar='NAME',
        help="with --norm-stats: of these layers, such as 'backbone.layer?.0.bn1'; default: eight, evenly spread",
    )
    parser.add_argument(
        '--per-class',
        action='store_true',
        help='AP, or accuracy, of every class as well, of each validation; results.json has them',
    )
    add_seed_argument(parser, None, 'seed of the run')
    parser.add_argument('--deterministic', action='store_true', help='deterministic algorithms, slower')
    add_schedule_arguments(parser)
    batch_size.add_batch_size_arguments(parser)
    add_precise_bn_argument(parser, 'every evaluation and checkpoint')
    add_tracker_arguments(parser)
    add_partial_argument(parser, 'start')
    add_common_arguments(parser)
    add_check_argument(parser)
    add_dry_run_arguments(parser)
    parser.set_defaults(reads=('train', 'val'))
    return parser.parse_args(argv)


def train_config(args: argparse.Namespace) -> Config:
    """The config that the arguments of a training run lead to."""
    if args.overwrite and args.resume is not None:
        raise UserError('--overwrite starts anew and --resume goes on: give one of them')
    cfg = load_config(args)
    _record_norms(cfg, args)
    require_none(training_problems(cfg, ('val',)))
    for dataloader in ('train_dataloader', 'val_dataloader'):
        require_annotations(cfg, dataloader)
    check_data(cfg, ('train', 'val'), args.allow_data_faults, folder=getattr(args, 'copies', None))
    if args.amp:
        _use_mixed_precision(cfg)
    if args.auto_scale_lr:
        _scale_learning_rate(cfg)
    batch_size.begin(cfg, args)
    said = apply_schedule_options(cfg, args)
    said += batch_size.apply(cfg, args)
    require_order(cfg)
    set_on_hook(cfg, 'ScheduleHook', options=args.schedule_options)
    _resume(cfg, args)
    require_weights(cfg, cfg.filename or args.config)
    require_shared_memory(cfg, ('train_dataloader', 'val_dataloader'))
    if args.per_class:
        said += validate_per_class(cfg)
    args.notes = [*said, *args.notes]
    _watch_for_nonfinite(cfg, args.on_nonfinite)
    add_hook(cfg, 'RandomStateHook')
    add_hook(cfg, 'PendingValidationHook')
    add_hook(cfg, 'CostHook')
    use_precise_bn(cfg, args.precise_bn)
    use_trackers(cfg, args)
    if args.tune_mode:
        add_hook(cfg, 'TuneModeHook')
    _use_seed(cfg, args)
    if args.launcher != 'none':
        # processes see different images, so their running statistics differ; without this the
        # validation mixes all of them while the checkpoint holds those of the first process
        add_hook(cfg, 'SyncBuffersHook')
    return cfg


def _use_seed(cfg: Config, args: argparse.Namespace) -> None:
    options = given_options(args)
    inside = options.get('randomness')
    inside = dict(inside) if isinstance(inside, dict) else {}
    seed = options.get('randomness.seed', inside.get('seed'))
    if args.seed is not None and seed not in (None, args.seed):
        raise UserError(
            f'--seed {args.seed}: --cfg-options randomness.seed={seed} says something else; give one of the two'
        )
    asked = {
        **({} if args.seed is None else dict(seed=args.seed)),
        **({'deterministic': True} if args.deterministic else {}),
    }
    if asked:
        cfg.randomness = dict(cfg.get('randomness') or {}, **asked)


def _use_mixed_precision(cfg: Config) -> None:
    if not isinstance(cfg.get('optim_wrapper'), dict):
        raise UserError(
            '--amp replaces OptimWrapper, but the config has no optim_wrapper; write one, or leave --amp out'
        )
    if is_second_order(cfg.optim_wrapper):
        cfg.optim_wrapper.update(type='SecondOrderOptimWrapper', dtype='bfloat16')
        return
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if class_of(wrapper, OPTIM_WRAPPERS) not in (OptimWrapper, AmpOptimWrapper, CPUAmpOptimWrapper):
        raise UserError(
            f'--amp replaces OptimWrapper, but the config has optim_wrapper.type={name_of(wrapper, OPTIM_WRAPPERS)!r}; '
            "leave --amp out, or set optim_wrapper.type='OptimWrapper'"
        )
    if get_device() == 'cpu':
        cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
        for key in ('loss_scale', 'dtype'):  # bfloat16 is all a CPU has, and it needs no scaling
            cfg.optim_wrapper.pop(key, None)
    else:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _watch_for_nonfinite(cfg: Config, asked: str | None) -> None:
    add_hook(cfg, 'NonFiniteHook')
    if asked is not None:
        set_on_hook(cfg, 'NonFiniteHook', on_nonfinite=asked)


def _record_norms(cfg: Config, args: argparse.Namespace) -> None:
    if args.norm_stats is not None:
        if args.norm_stats < 1:
            raise UserError(f'--norm-stats {args.norm_stats}: must be a number of iterations, at least 1')
        set_on_hook(cfg, 'NormStatsHook', interval=args.norm_stats)
        if args.norm_stats_layers:
            set_on_hook(cfg, 'NormStatsHook', layers=args.norm_stats_layers)
    elif args.norm_stats_layers:
        raise UserError('--norm-stats-layers says of which layers, and --norm-stats N how often: give that, too')


def _scale_learning_rate(cfg: Config) -> None:
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise UserError(
            '--auto-scale-lr needs auto_scale_lr.base_batch_size, the batch size the learning rate was '
            'chosen for; add --cfg-options auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def _resume(cfg: Config, args: argparse.Namespace) -> None:
    """--resume, or ``resume = True`` of the config: find what to go on from. While there is nothing, start as usual."""
    args.notes, args.finished, args.named = [], None, False
    source = args.resume
    if source is None and cfg.get('resume'):
        source = cfg.get('load_from') or 'auto'
    if source is None:
        return
    cfg.resume = True
    if source != 'auto':
        args.named = True
        require_checkpoint(source, '--resume')
        cfg.load_from = source
        return
    newest = CheckpointFolder.of(cfg).newest()
    args.notes = [f'--resume: {note}' for note in newest.notes]
    if newest.path is None:
        cfg.resume = False
        start = f'load_from={cfg.load_from}' if cfg.get('load_from') else 'the beginning'
        args.notes.append(f'--resume: no checkpoint in {cfg.work_dir} yet, starting from {start}')
        return
    cfg.load_from = str(newest.path)
    if is_finished(cfg.work_dir, newest.iter, _end(cfg)):
        longer = 'raise ' + ' or '.join(f'train_cfg.{key}={value}' for key, value in _end(cfg).items())
        if args.epochs is not None:
            longer = f'start anew with more than --epochs {args.epochs}: the schedule of this run has come to its end'
        args.finished = (
            f'the run in {cfg.work_dir} was finished (epoch {newest.epoch}, iteration {newest.iter}); to train longer, '
            f'{longer}'
        )


def _end(cfg: Config) -> dict:
    """What says when training is over."""
    loop = cfg.get('train_cfg') or {}
    return {key: loop[key] for key in ('max_epochs', 'max_iters') if loop.get(key) is not None}


def guard_work_dir(cfg: Config, args: argparse.Namespace) -> None:
    """Raise if the work dir holds an earlier run that nobody spoke of."""
    folder = CheckpointFolder.of(cfg)
    if args.overwrite:
        start = {'load_from': cfg.load_from} if cfg.get('load_from') else {}
        require_replaceable(folder, {**start, **dict(pretrained_files(cfg.model))})
    elif not (cfg.get('resume') or args.resume) or (args.named and not folder.has(cfg.load_from)):
        require_fresh(folder)


def clear_work_dir(runner: Runner, cfg: Config) -> None:
    """When all is ready to train: nothing half-written, and room for a checkpoint."""
    folder = CheckpointFolder.of(cfg)
    for path in tidy(folder):
        runner.logger.info(f'{path} was left half-written by a run that was killed, and is deleted')
    weights = sum(value.numel() * value.element_size() for value in runner.model.state_dict().values())
    require_room(folder.folder / LAST, weights, 'training')


def require_weights(cfg: Config, config: str) -> None:
    """Raise if a local file that the run starts from is not there, or holds a fused model."""
    option = '--resume' if cfg.get('resume') else 'load_from'
    start = cfg.get('load_from')
    pretrained = [(key, path) for key, path in pretrained_files(cfg.model) if '://' not in path]
    for key, path in pretrained:
        if not Path(path).expanduser().is_file():
            raise UserError(_missing_weights(key, path, config, option if start else None))
    if start is not None:
        require_checkpoint(start, option)
    for key, path in [*pretrained, (option, start)]:
        if path is not None and is_fused(Path(path).expanduser()):
            raise UserError(fused_refusal(key, path))


def _missing_weights(key: str, path: str, config: str, replaced_by: str | None) -> str:
    """What to do about a file of pretrained weights that is not there.

    Args:
        replaced_by: the option whose checkpoint replaces the weights; mmengine reads them nevertheless.
    """
    message = f'{key}: there is no file {path}'
    folder = '/'.join(Path(path).parts[:-1])
    readme = Path(config).parent / 'README.md'
    if folder and readme.is_file() and f'{folder}/' in readme.read_text(encoding='utf-8'):
        message += f'; {readme} says where these weights are to be had and how to convert them'
    message += f'. Name another file with --cfg-options {key}=FILE'
    if replaced_by is not None:
        without = weights_left_out(key)
        message += f'; or leave them out, since the checkpoint of {replaced_by} replaces them: {without}'
    return message


if __name__ == '__main__':
    main()
