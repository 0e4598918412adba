"""``tools/norm_batch.py``: top-1 error against the number of images that a norm takes its statistics over."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdet_norms.benchmark.measure import describe_machine, now
from mmdet_norms.commands import runnable, typed
from mmdet_norms.engine.results import write_json
from mmdet_norms.entries import name_of
from mmdet_norms.experiments import Outcome, norm_batch, run
from mmdet_norms.experiments.progress import GridProgress
from mmdet_norms.files import require_writable, write_text

from .common import UserError, command, read_config
from .grids import data_by_cell, failures_named, require_at_least, require_different
from .options import add_option_arguments, merge_options

CONFIG = 'mmdet_norms::demo/resnet18_{}_norm-batch_shapes-cls.py'
STEM, SUFFIXES = 'norm-batch', ('.json', '.md', '.svg')
NORMS = ('bn', 'brn', 'mabn')
BATCHES = (2, 4, 8, 16, 32)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, then write table, figure and numbers."""
    args = parse_args(argv)
    cells = list(norm_batch.cells(args.configs, args.batches, args.seeds, args.cfg_options, args.data_root))
    more = ('--threads', str(args.threads))
    with GridProgress(cells, args.out, args.jobs, _in_words) as progress:
        told = more, progress.ended, read_config, progress.started, progress.look
        outcomes = run(cells, args.out, args.jobs, *told, data=data_by_cell())
    with failures_named(outcomes, args.out):
        paths = write(outcomes, args.out, f'{runnable("norm-batch")} {args.said}')
        print(paths[1].read_text(encoding='utf-8'))
        print('written:', *map(str, paths))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``configs`` becomes name of the norm -> config."""
    parser = argparse.ArgumentParser(
        prog=typed('norm-batch'),
        description='Train classifiers whose norms take their statistics over groups of images inside the same batch, '
        'and write top-1 error against the size of the groups: table, figure, numbers. The same command goes on where '
        'it was stopped (docs/norm-batch.md).',
    )
    parser.add_argument(
        '--norms',
        nargs='+',
        choices=NORMS,
        default=list(NORMS),
        help=f'default: {" ".join(NORMS)}, on data/shapes-cls-hard',
    )
    parser.add_argument(
        '--configs',
        nargs='+',
        metavar='CONFIG',
        help='instead of --norms, configs of classifiers whose backbone has a norm_cfg that takes norm_batch',
    )
    parser.add_argument(
        '--batches',
        nargs='+',
        type=int,
        default=list(BATCHES),
        metavar='B',
        help=f'images per group; default {" ".join(map(str, BATCHES))}',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='S', help='default 0 1 2')
    parser.add_argument(
        '--out',
        default='work_dirs/norm-batch',
        metavar='DIR',
        help='for norm-batch.json, .md and .svg, and a work dir of each training; default work_dirs/norm-batch',
    )
    parser.add_argument('--data-root', metavar='DIR', help='as for train')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='as for train, for every training'
    )
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='trainings at a time; default 1')
    parser.add_argument('--threads', type=int, default=1, metavar='N', help='CPU threads of each; default 1')
    args = parser.parse_args(argv)
    args.said = shlex.join(sys.argv[1:] if argv is None else argv)
    require_at_least(args, jobs=1, threads=1)
    require_different(args, batches=1, seeds=0)
    args.configs = _by_norm(args.configs or [CONFIG.format(norm) for norm in dict.fromkeys(args.norms)])
    for suffix in SUFFIXES:
        require_writable(Path(args.out) / f'{STEM}{suffix}', '--out')
    _require_options_and_data(args)
    return args


def _by_norm(configs: Sequence[str]) -> dict[str, str]:
    """Name in table and figure -> config: the type of its norm, or of several with the same one the file's name."""
    types = {}
    for config in dict.fromkeys(configs):
        norm_cfg = ((read_config(config).get('model') or {}).get('backbone') or {}).get('norm_cfg')
        if not isinstance(norm_cfg, dict) or 'norm_batch' not in norm_cfg:
            raise UserError(
                f'--configs {config}: {norm_batch.KEY} is varied, so the config must have it; write for example '
                "model=dict(backbone=dict(norm_cfg=dict(type='BN', norm_batch=32)))"
            )
        types[config] = name_of(norm_cfg)
    alike = [name for name in types.values() if list(types.values()).count(name) > 1]
    named = [(Path(config).stem if name in alike else name, config) for config, name in types.items()]
    if len(dict(named)) < len(named):
        raise UserError(f'--configs {" ".join(configs)}: two files have the same name; give one of them another')
    return dict(named)


def _require_options_and_data(args: argparse.Namespace) -> None:
    """One error instead of one for each training."""
    parser = argparse.ArgumentParser(prog=typed('norm-batch'), usage=argparse.SUPPRESS)
    add_option_arguments(parser)
    options = parser.parse_args(['--cfg-options', *args.cfg_options] if args.cfg_options else [])
    for config in args.configs.values():
        cfg = read_config(config)
        merge_options(cfg, options)
        for loader in ('train_dataloader', 'val_dataloader'):
            root = args.data_root or cfg[loader].dataset.get('data_root')
            if root and not Path(root).is_dir():
                raise UserError(
                    f'{loader}.dataset.data_root: there is no folder {root}; '
                    f'{runnable("shapes")} --classification --hard generates data/shapes-cls-hard'
                )


def write(outcomes: Sequence[Outcome], folder: str, said: str) -> list[Path]:
    """norm-batch.json, .md and .svg in ``folder``; returns their paths."""
    paths = [Path(folder) / f'{STEM}{suffix}' for suffix in SUFFIXES]
    machine, table = describe_machine('cpu'), norm_batch.errors(outcomes)
    about = (f'{now()}; {machine["cpu"]}; torch {machine["torch"]}',)
    write_json(
        paths[0],
        dict(
            command=said,
            date=now(),
            machine=machine,
            cells=[
                dict(
                    outcome.cell.labels,
                    name=outcome.cell.name,
                    config=outcome.cell.config,
                    options=list(outcome.cell.options),
                    error_percent=norm_batch.error_of(outcome),
                    failed=outcome.error,
                )
                for outcome in outcomes
            ],
        ),
    )
    write_text(paths[1], norm_batch.markdown(table, said, about))
    norm_batch.draw(table, paths[2])
    return paths


def _in_words(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f'failed: {outcome.error}'
    return f'error {norm_batch.error_of(outcome):.1f} %'


if __name__ == '__main__':
    main()
