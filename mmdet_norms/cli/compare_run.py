"""``tools/compare.py run``: train norm x batch size x seed, and compare."""

import argparse
import ast
import copy
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmdet_norms import cores
from mmdet_norms.benchmark.measure import describe_machine, now
from mmdet_norms.commands import runnable, typed
from mmdet_norms.console import as_text, plain_console
from mmdet_norms.engine.results import read_json
from mmdet_norms.engine.threads import fixed_by
from mmdet_norms.entries import mappings
from mmdet_norms.experiments import executors, report, run
from mmdet_norms.experiments.comparison import FINISHED, WAITING, Comparison, Record, in_words, table
from mmdet_norms.experiments.grid import Cell, Outcome, command_of, finished
from mmdet_norms.experiments.progress import GridProgress
from mmdet_norms.experiments.runs import GRID
from mmdet_norms.files import require_writable
from mmdet_norms.placement import apply_norm

from . import batch_size, train
from .common import UserError, command, read_config, require_annotations
from .grids import data_by_cell, failures_named, require_at_least, require_different
from .options import add_option_arguments, given_options, merge_options

_KEPT_CHECKPOINTS = 'default_hooks.checkpoint.max_keep_ckpts'
# Of every training. No option of its cell, whose results are the same: a folder that was begun without it goes on.
_ALWAYS = ('--per-class',)
# Of train, what this command says itself.
_OURS = (
    *('--work-dir', '--resume', '--overwrite', '--norm', '--seed', '--batch-size', '--budget', '--launcher'),
    '--dry-run',
)
# Keys of the config, by what this command says them.
_KEYS = {'train_dataloader.batch_size': '--batch-sizes', 'randomness.seed': '--seeds'}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, then compare."""
    args = parse_args(argv)
    comparison = _comparison(args)
    cells = list(comparison.cells())
    if args.dry_run:
        _list(cells, args)
        return
    executor = executors.make(args.executor, args.gpus, args.jobs, args.slurm)
    require_writable(Path(args.out) / GRID, '--out')
    about = dict(command=f'{runnable("compare")} run {args.said}', date=now(), machine=_machine())
    threads = _threads(args)
    if threads is not None:
        about.update(threads=threads, at_a_time=args.jobs * comparison.processes)
    more = [*_ALWAYS, *([] if threads is None else ['--threads', str(threads)])]
    record = Record(args.out, about, comparison)
    progress = GridProgress(cells, args.out, args.jobs, in_words)

    def started(cell: Cell) -> None:
        try:
            record.started(cell)
        finally:
            progress.started(cell)

    def ended(outcome: Outcome) -> None:
        try:
            record.ended(outcome)
        finally:
            progress.ended(outcome)

    try:
        with progress:
            told = more, ended, read_config, started, progress.look
            outcomes = run(cells, args.out, args.jobs, *told, executor, data_by_cell())
    except (KeyboardInterrupt, SystemExit) as stopped:
        if executor.outlives:
            print('stopped; jobs that are queued or running go on, and the same command waits for them', flush=True)
        else:
            with suppress(OSError):
                record.stopped()
            print('stopped; what was written stays, and the same command goes on with it', flush=True)
        raise SystemExit(130 if isinstance(stopped, KeyboardInterrupt) else stopped.code) from None
    with failures_named(outcomes, args.out):
        console = plain_console()
        (console if console.is_terminal else plain_console(width=120)).print(table(outcomes))
        record.write()  # which may have failed on the way
        if any(outcome.result for outcome in outcomes):
            paths = report.write([args.out], Path(args.out) / 'report', images=args.images)
            print(''.join(f'{text}\n\n' for text in report.said(paths)), end='')
            print('written:', *map(str, paths))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; what stands behind ``--`` becomes ``for_train``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    before, behind = (argv[: argv.index('--')], argv[argv.index('--') + 1 :]) if '--' in argv else (argv, [])
    args = _parser().parse_args(before)
    args.said, args.for_train = shlex.join(argv), behind
    require_different(args, batch_sizes=1, seeds=0)
    require_at_least(args, jobs=1, threads=1, gpus=0, images=0)
    args.variants = _variants(args.variant)
    names = [*args.norms, *args.variants]
    if not names:
        raise UserError('--norms: names of norms to compare are missing, such as --norms bn bnet5')
    if len(set(names)) < len(names):
        raise UserError(f'--norms {" ".join(args.norms)}: must be different names, also from those of --variant')
    args.grid = _grid(args.grid)
    args.slurm = _parameters(args.slurm, args.executor)
    args.out = args.out or f'work_dirs/compare/{Path(args.config).stem}'
    args.processes = max(1, args.gpus or 1)
    _require_what_all_need(args)
    if args.jobs is None:
        args.jobs = len(list(_comparison(args).cells())) if args.executor == executors.SLURM else 1
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f'{typed("compare")} run',
        description='Train a config with each norm, batch size and seed, and compare. Each training is a run of '
        f'{typed("train")} in a work dir of its own. The same command goes on where it was stopped (docs/compare.md).',
        epilog=f'What stands behind -- goes to every training: ... -- --amp. All that it may be: {typed("train")} '
        '--help.',
    )
    parser.add_argument('config', help='as for train; the linear rule starts from its batch size')
    parser.add_argument('--norms', nargs='+', default=[], metavar='NAME', help='as --norm of train')
    parser.add_argument(
        '--variant',
        nargs='+',
        action='append',
        default=[],
        metavar=('NAME=NORM', 'KEY=VALUE'),
        help='one more beside --norms, by a name of yours: a norm with config options of its own, such as '
        'naive=cbn model.neck.norm_cfg.rho=0. As often as you like',
    )
    parser.add_argument(
        '--batch-sizes',
        nargs='+',
        type=int,
        metavar='B',
        help="images per iteration, of all processes together; default: the config's",
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], metavar='S', help='default 0')
    parser.add_argument(
        '--grid',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=V1,V2',
        help='any key of the config, to be varied as well; several keys: every combination',
    )
    parser.add_argument(
        '--budget',
        choices=[batch_size.ITERS, batch_size.IMAGES],
        default=batch_size.IMAGES,
        help='what is the same for all batch sizes: the images that are seen (default), or the iterations',
    )
    parser.add_argument('--no-scale-lr', action='store_true', help='the same learning rate for every batch size')
    parser.add_argument(
        '--out',
        metavar='DIR',
        help='for report/, grid.json and a work dir of each training; default work_dirs/compare/ and the name of the '
        'config',
    )
    parser.add_argument('--jobs', type=int, metavar='N', help='trainings at a time; default 1, under Slurm all')
    parser.add_argument(
        '--executor',
        choices=[executors.PROCESS, executors.LOCAL, executors.SLURM],
        default=executors.PROCESS,
        help="where trainings run: in processes of this command (default), or through submitit's executors, here "
        '(local) or as jobs of Slurm',
    )
    parser.add_argument(
        '--slurm',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help="parameters of submitit's executor for Slurm, such as partition=gpu timeout_min=600 cpus_per_task=8",
    )
    parser.add_argument(
        '--gpus',
        type=int,
        metavar='N',
        help='of each training, which is N processes started by torchrun (on the CPU, where there is no GPU); 0: none',
    )
    parser.add_argument('--threads', type=int, metavar='N', help='CPU threads of each process')
    parser.add_argument('--epochs', type=int, metavar='N', help="as for train, with the config's batch size")
    parser.add_argument('--lr', type=float, metavar='LR', help="as for train, for the config's batch size")
    parser.add_argument('--data-root', metavar='DIR', help='as for train')
    parser.add_argument('--val-fraction', type=float, metavar='F', help='as for train')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='as for train, for every training'
    )
    parser.add_argument(
        '--images',
        type=int,
        default=4,
        metavar='N',
        help='as for compare report, which ends the command; default 4',
    )
    parser.add_argument('--dry-run', action='store_true', help='list the trainings and their commands, and stop')
    return parser


def _comparison(args: argparse.Namespace) -> Comparison:
    options = []
    for option in ('epochs', 'lr', 'data-root', 'val-fraction'):
        value = getattr(args, option.replace('-', '_'))
        options += [] if value is None else [f'--{option}', str(value)]
    options += [*['--no-scale-lr'] * args.no_scale_lr, *args.for_train]
    return Comparison(
        args.config,
        args.norms,
        args.batch_sizes,
        args.seeds,
        args.grid,
        args.budget,
        options,
        args.cfg_options,
        args.processes,
        args.variants,
    )


def _require_what_all_need(args: argparse.Namespace) -> None:
    """One error instead of one for each training. What only some of them lack is found when they begin."""
    refused = [option for option in args.for_train if _is_ours(option.partition('=')[0])]
    if refused:
        raise UserError(f'-- {refused[0]}: is for this command to say, and differs from training to training')
    _require_one_place(args)
    cfg = read_config(args.config)
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    said = any(option.partition('=')[0] == _KEPT_CHECKPOINTS for option in args.cfg_options)
    if isinstance(hook, dict) and hook.get('max_keep_ckpts', -1) == -1 and not said:
        # two, since mmengine deletes one before it writes the next
        args.cfg_options = [f'{_KEPT_CHECKPOINTS}=2', *args.cfg_options]
    norms = {**{name: (name, ()) for name in args.norms}, **args.variants}
    first = next(iter(norms.values()))[0]
    shared = replace(_comparison(args), norms=[first], batch_sizes=args.batch_sizes or [1], variants={}, grid={})
    for_train = train.parse_args([args.config, *next(shared.cells()).options])
    lacking: dict[str, list[UserError]] = {}
    for name, (norm, own) in norms.items():
        cfg = read_config(args.config)
        try:
            cfg.model = apply_norm(cfg.model, norm)
        except ValueError as error:
            raise UserError(f'{"--norms " if name in args.norms else f"--variant {name}="}{norm}: {error}') from error
        merge_options(cfg, for_train)
        variant = f'--variant {name}={norm}'
        given = {variant: own} if own else {}
        given |= {key: [f'{key}={values[0]}'] for key, values in args.grid.items()}
        for said, error in _wrong(cfg, given).items():
            if said == variant:
                raise UserError(_said_by(error, variant))
            lacking.setdefault(said, []).append(error)
    for errors in lacking.values():
        if len(errors) == len(norms):
            raise UserError(_said_by(errors[0], '--grid'))
    args.batch_sizes = args.batch_sizes or [batch_size.reference_batch(cfg)]
    for batch in args.batch_sizes:
        if batch % args.processes:
            raise UserError(
                f'--batch-sizes {batch}: is of all processes together, and must be a multiple of --gpus {args.gpus}'
            )
    batch_size.begin(copy.deepcopy(cfg), for_train)
    _require_data(cfg, args.data_root)
    _require_weights_of_some(args)


def _is_ours(option: str) -> bool:
    """Also as argparse lets it be shortened; ``--norm-stats`` is another one."""
    return len(option) > 2 and option.startswith('--') and any(ours.startswith(option) for ours in _OURS)


def _require_one_place(args: argparse.Namespace) -> None:
    """What the command line says twice would be said in vain once, or be an error of each training."""
    keys, behind = dict(_KEYS), train.parse_args([args.config, *args.for_train])
    epochs, lr = (getattr(args if getattr(args, key) is not None else behind, key) for key in ('epochs', 'lr'))
    if epochs is not None:
        keys.update(dict.fromkeys(('train_cfg.max_epochs', 'train_cfg.max_iters'), f'--epochs {epochs}'))
    if lr is not None:
        keys['optim_wrapper.optimizer.lr'] = f'--lr {lr}'
    variants = {f'--variant {name}={norm}': _keys_in(_read(own)) for name, (norm, own) in args.variants.items()}
    grid = [f'{key}={value}' for key, values in args.grid.items() for value in values]
    given = {'--grid': grid, '--cfg-options': args.cfg_options}
    given = {said: [key for option in options for key in _keys_in(_read([option]))] for said, options in given.items()}
    given['-- --cfg-options'] = _keys_in(given_options(behind))
    for said, set_there in {**given, **variants}.items():
        for key in set_there:
            if key in keys:
                raise UserError(f'{said} {key}: {keys[key]} says it, or another value; leave {said} {key} out')
    for said, set_there in variants.items():
        both = [(key, varied) for key in set_there for varied in args.grid if f'{key}.'.startswith(f'{varied}.')]
        if both:
            key, varied = both[0]
            raise UserError(f'{said} {key}: --grid {varied} would replace it; leave one of the two out')


def _require_data(cfg: Config, data_root: str | None) -> None:
    if data_root is not None:
        if not Path(data_root).is_dir():
            raise UserError(f'--data-root: there is no folder {data_root}')
        return
    for loader in ('train_dataloader', 'val_dataloader'):
        require_annotations(cfg, loader)
        root = ((cfg.get(loader) or {}).get('dataset') or {}).get('data_root')
        if root and '://' not in root and not Path(root).is_dir():
            raise UserError(f'{loader}.dataset.data_root: there is no folder {root}; name another one by --data-root')


def _require_weights_of_some(args: argparse.Namespace) -> None:
    """Raise if every training lacks a file that it starts from. Where one has all, or has begun, others fail alone."""
    missing, seen = None, []
    for cell in _comparison(args).cells():
        folder, for_train = Path(args.out) / cell.name, train.parse_args([cell.config, *cell.options])
        if finished(folder) or any(folder.glob('*.pth')):
            return
        if (alike := (for_train.norm, given_options(for_train))) in seen:
            continue
        seen.append(alike)
        cfg = read_config(cell.config)
        cfg.model = apply_norm(cfg.model, for_train.norm)
        try:
            merge_options(cfg, for_train)
        except UserError:  # an option that this norm does not know
            continue
        cfg.resume = False
        try:
            train.require_weights(cfg, cfg.filename or cell.config)
        except UserError as error:
            missing = missing or error
        else:
            return
    if missing is not None:
        raise missing


def _wrong(cfg: Config, given: Mapping[str, Sequence[str]]) -> dict[str, UserError]:
    """Which options do not fit a config, of some that are given in several places, and why.

    One may need another one: the type of a norm, and an argument that only this type takes.
    """
    fitting: list[str] = []
    errors: dict[str, Any] = dict.fromkeys(given)
    while True:
        errors = {said: _refusal(cfg, [*fitting, *given[said]]) for said in errors}
        more = [said for said, error in errors.items() if error is None]
        if not more:
            return errors
        for said in more:
            fitting += given[said]
            del errors[said]


def _refusal(cfg: Config, options: Sequence[str]) -> UserError | None:
    try:
        merge_options(copy.deepcopy(cfg), argparse.Namespace(cfg_options=_read(options)))
    except UserError as error:
        return error
    return None


def _read(options: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE ...`` as ``--cfg-options`` reads it."""
    parser = argparse.ArgumentParser(prog=f'{typed("compare")} run', usage=argparse.SUPPRESS)
    add_option_arguments(parser)
    return given_options(parser.parse_args(['--cfg-options', *options]))


def _keys_in(options: Mapping[str, Any]) -> list[str]:
    """The keys that options set, also within a dict: ``randomness=dict(seed=3)`` sets two."""
    return [f'{path}.{key}' if path else key for path, node in mappings(options) for key in node]


def _said_by(error: UserError, option: str) -> str:
    """An error of ``--cfg-options`` as one of ``option``, which adds no keys."""
    text, found, _ = str(error).partition(' To add it nevertheless: ')
    return text.replace('--cfg-options', option) + ' To add it nevertheless, write it into the config' * bool(found)


def _variants(given: Sequence[Sequence[str]]) -> dict[str, tuple[str, list[str]]]:
    found: dict[str, tuple[str, list[str]]] = {}
    for first, *options in given:
        name, equals, norm = first.partition('=')
        if not equals or not name or not norm or not options:
            said = ' '.join([first, *options])
            raise UserError(
                f'--variant {said}: must be NAME=NORM KEY=VALUE, such as naive=cbn model.neck.norm_cfg.rho=0'
            )
        if name in found:
            raise UserError(f'--variant {name}: every name once')
        found[name] = norm, options
    return found


def _grid(given: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in given:
        key, equals, values = text.partition('=')
        split = _at_commas(values)
        if not equals or not all(key.split('.')) or not all(split):
            raise UserError(f'--grid {text}: must be KEY=V1,V2, such as optim_wrapper.optimizer.weight_decay=0.05,0.1')
        if key in found or len(set(split)) < len(split):
            raise UserError(f'--grid {text}: every key once, with different values')
        found[key] = split
    return found


def _at_commas(text: str) -> list[str]:
    """Parts between the commas that are in no brackets."""
    parts, depth = [''], 0
    for character in text:
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _parameters(given: Sequence[str], executor: str) -> dict[str, Any]:
    if given and executor != executors.SLURM:
        raise UserError(f'--slurm {" ".join(given)}: is for --executor {executors.SLURM}')
    found = {}
    for text in given:
        key, equals, value = text.partition('=')
        if not equals or not key:
            raise UserError(f'--slurm {text}: must be KEY=VALUE, such as timeout_min=600')
        try:
            found[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[key] = value
    return found


def _machine() -> str:
    found = describe_machine(_device())
    return f'{found["gpu"] or found["cpu"]}, {found["cores"]} cores, torch {found["torch"]}'


def _device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def _threads(args: argparse.Namespace) -> int | None:
    """As train chooses them, but once for all: with another number, last bits of results are others."""
    if args.threads is not None or args.executor == executors.SLURM:
        return args.threads
    if _device() != 'cpu' or fixed_by() is not None:
        return None
    at_a_time, before = args.jobs * args.processes, read_json(Path(args.out) / GRID)
    if before.get('at_a_time') == at_a_time and isinstance(before.get('threads'), int):
        return before['threads']
    return cores.threads_for(cores.load_since_begin(), at_a_time)


def _list(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    done = [cell.name for cell in cells if finished(Path(args.out) / cell.name)]
    print(f'{len(cells)} trainings, {len(done)} of them finished, in {args.out}:')
    width = max(len(cell.name) for cell in cells)
    for cell in cells:
        parts = command_of(cell, Path(args.out) / cell.name, _ALWAYS)
        shown = shlex.join(parts[parts.index('train') + 1 :])
        several = f'torchrun --standalone --nproc-per-node {cell.processes} -m mmdet_norms train'
        start = runnable('train') if cell.processes == 1 else several
        status = FINISHED if cell.name in done else WAITING
        print(as_text(f'{status:8}  {cell.name:{width}}  {start} {shown}'))


if __name__ == '__main__':
    main()
