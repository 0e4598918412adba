#!/usr/bin/env python
"""Pretrain and fine-tune with several norms, against the same detectors from scratch, and print the table.

    python tools/pretrain_table.py --work-dir work_dirs/pretrain_table

For every norm: a classifier on ``shapes-cls``, the demo's detector from its backbone in half the demo's iterations, and
the same half from scratch. Runs that are there are kept, one that was killed goes on where it was; the commands are
printed, and are those of a user. With several seeds, the table has mean and standard deviation.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_norms.experiments.grid import finished

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER = 'configs/demo/resnet50_bnet5_shapes-cls.py'
DETECTOR = 'configs/demo/mask-rcnn_r50_fpn_bnet5_shapes_pretrained.py'
INIT_CFG = 'model.backbone.init_cfg'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', default='work_dirs/pretrain_table', metavar='DIR')
    parser.add_argument('--norms', nargs='+', default=['bn', 'bnet5', 'an', 'mabn'], metavar='NAME')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], metavar='N')
    parser.add_argument('--threads', type=int, metavar='N', help='of each run; default: as tools/train.py chooses')
    parser.add_argument('--classifier-options', nargs='+', default=[], metavar='KEY=VALUE', help='of its config')
    parser.add_argument('--detector-options', nargs='+', default=[], metavar='KEY=VALUE', help='of its config')
    args = parser.parse_args(argv)
    python('tools/make_shapes.py')
    python('tools/make_shapes.py', '--classification')
    rows = {norm: [] for norm in args.norms}
    for seed in args.seeds:
        for norm in args.norms:
            options = ['--norm', norm, '--seed', seed, *([] if args.threads is None else ['--threads', args.threads])]
            folder = Path(args.work_dir).resolve() / f'{norm}_seed{seed}'
            first = train(CLASSIFIER, folder / 'pretrain', options, args.classifier_options)
            weights = (folder / 'pretrain' / 'last_checkpoint').read_text(encoding='utf-8')
            scratch = train(DETECTOR, folder / 'scratch', options, [f'{INIT_CFG}=None', *args.detector_options])
            start = [f'{INIT_CFG}.checkpoint={weights}', *args.detector_options]
            tuned = train(DETECTOR, folder / 'pretrained', options, start)
            aps = [result[f'{kind}_mAP'] for kind in ('bbox', 'segm') for result in (scratch, tuned)]
            rows[norm].append([first['accuracy/top1'], *aps])
    print('\n' + '\n'.join(table(rows)))


def train(config: str, work_dir: Path, options: list, config_options: list[str]) -> dict:
    """The results of a run, which is made, or gone on with, unless it is there."""
    if finished(work_dir) is None:
        more = ['--cfg-options', *config_options] if config_options else []
        python('tools/train.py', config, '--work-dir', work_dir, '--resume', *options, *more)
    return finished(work_dir)


def python(*command: object) -> None:
    command = [str(part) for part in command]
    print('+ python', *command, flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT)
    if done.returncode:  # it has said why
        sys.exit(done.returncode)


def table(rows: dict[str, list[list[float]]]) -> list[str]:
    """Markdown: a line per norm; of several seeds, mean and standard deviation."""
    head = ['`--norm`', 'top-1', 'box AP from scratch', 'pretrained', 'mask AP from scratch', 'pretrained']
    lines = [' | '.join(head), ' | '.join(['---'] * len(head))]
    for norm, runs in rows.items():
        numbers = [
            f'{statistics.mean(column):.3f}' + (f' ± {statistics.stdev(column):.3f}' if len(column) > 1 else '')
            for column in zip(*runs)
        ]
        lines.append(' | '.join([f'`{norm}`', *numbers]))
    return [f'| {line} |' for line in lines]


if __name__ == '__main__':
    main()
