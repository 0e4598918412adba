"""``tools/analyze.py``: look inside the norms of runs: statistics, kernels, mixture weights, curves."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdet_norms.commands import typed
from mmdet_norms.console import as_text
from mmdet_norms.files import require_writable

from .common import UserError, add_threads_argument, command, use_threads

OUT = 'work_dirs/analysis'
# What is drawn -> what it is, for the help.
WORDS = {
    'stats': 'statistics that norms saw in training, which train --norm-stats N recorded, of several runs beside each '
    "other: those of the batch, those of the backward pass, and a method's own",
    'kernels': "mean |kernel| of BNET's taps by stage; with --image, maps before and after BNET",
    'attention': "histograms of AN's mixture weights by class, on images of the run's validation set",
    'curves': 'loss and results over iterations',
}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    args = parse_args(argv)
    out = Path(args.out)
    require_writable(out / 'figure.svg', f'--out {args.out}')
    paths = {'stats': _stats, 'kernels': _kernels, 'attention': _attention, 'curves': _curves}[args.what](args, out)
    for path in paths:
        print(as_text(path))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=typed('analyze'), description='Draw what is inside the norms of runs, as svg and png (docs/analyze.md).'
    )
    words = parser.add_subparsers(dest='what', required=True, metavar='{' + ','.join(WORDS) + '}')
    for name, help in WORDS.items():
        word = words.add_parser(name, help=help, description=f'Draw {help}.')
        word.add_argument('runs', nargs='+', metavar='WORK_DIR', help=_RUNS[name])
        word.add_argument('--out', default=OUT, metavar='DIR', help='folder of the figures; default: %(default)s')
        if name != 'curves':
            word.add_argument(
                '--layers', nargs='+', metavar='NAME', help="layers to draw, such as 'backbone.layer?.0.bn1'"
            )
        if name == 'stats':
            word.add_argument('--channel', type=int, metavar='N', help='of which channel; default: the first recorded')
        if name == 'kernels':
            word.add_argument('--image', metavar='FILE', help='draw maps of this image before and after BNET, too')
        if name == 'attention':
            word.add_argument('--images', type=int, default=200, metavar='N', help='how many; default: %(default)s')
        if name in ('kernels', 'attention'):
            add_threads_argument(word)
        if name == 'curves':
            word.add_argument('--keys', nargs='+', metavar='KEY', help="what to draw, such as loss 'bbox_mAP*'")
    return parser.parse_args(argv)


_RUNS = {
    'stats': 'work dirs of train --norm-stats N, or folders of work dirs',
    'kernels': 'work dirs of train, or checkpoints in them',
    'attention': 'work dirs of train, or checkpoints in them',
    'curves': 'work dirs of train, or folders of work dirs',
}


def _stats(args: argparse.Namespace, out: Path) -> list[Path]:
    from mmdet_norms.analysis import stats
    from mmdet_norms.analysis.runs import names_of, with_looks
    from mmdet_norms.experiments.runs import find

    recorded, others = with_looks(find(args.runs)[0])
    for run in others:
        print(
            f'warning: {as_text(run.folder)} is left out: nothing of its norms was recorded (train --norm-stats N)',
            file=sys.stderr,
        )
    names = names_of([run for run, _ in recorded])
    looks = dict(_named(names, [looks for _, looks in recorded]))
    return stats.draw(looks, out, args.layers, args.channel)


def _kernels(args: argparse.Namespace, out: Path) -> list[Path]:
    from mmdet_norms.analysis import kernels

    runs = dict(_named(args.runs, _opened(args.runs)))
    if args.image is not None and not Path(args.image).is_file():
        raise UserError(f'--image {args.image}: there is no such file')
    if args.layers and args.image is None:
        raise UserError('--layers says of which layers --image draws maps: give that, too')
    if args.image is None:
        return kernels.draw(runs, out)
    if len(runs) > 1:
        raise UserError(f'--image draws the maps of one run, and there are {len(runs)}: name one')
    use_threads(args)
    maps = kernels.draw_responses(next(iter(runs.values())), args.image, out, args.layers)
    return [*kernels.draw(runs, out), *maps]


def _attention(args: argparse.Namespace, out: Path) -> list[Path]:
    from mmdet_norms.analysis import attention

    if args.images < 1:
        raise UserError(f'--images {args.images}: must be at least 1')
    runs = _opened(args.runs)
    use_threads(args)
    paths = []
    for number, run in enumerate(runs, 1):
        stem = 'attention' if len(runs) == 1 else f'attention-{number}'
        paths += attention.draw(attention.collect(run, args.images, args.layers), out, stem)
    return paths


def _curves(args: argparse.Namespace, out: Path) -> list[Path]:
    from mmdet_norms.analysis import curves
    from mmdet_norms.experiments.runs import find

    return curves.draw(find(args.runs)[0], out, args.keys)


def _opened(names: Sequence[str]) -> list:
    from mmdet_norms.experiments.detections import open_run

    return [open_run(name) for name in dict.fromkeys(names)]


def _named(names: Sequence[str], runs: Sequence) -> list[tuple]:
    """Each with a name of its own."""
    shown = [Path(name).name if '/' in name else name for name in names]
    shown = shown if len(set(shown)) == len(shown) else [as_text(name) for name in names]
    return [
        (name if shown.count(name) == 1 else f'{name} ({i})', run) for i, (name, run) in enumerate(zip(shown, runs), 1)
    ]


if __name__ == '__main__':
    main()
