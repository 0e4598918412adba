"""``tools/compare.py diff RUN_A RUN_B``: which images and classes gained or lost, and how sure that is."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdet_norms.commands import typed
from mmdet_norms.console import as_text
from mmdet_norms.engine.results import read_json
from mmdet_norms.experiments.bootstrap import SAMPLES
from mmdet_norms.experiments.detections import open_run
from mmdet_norms.experiments.diff import compare
from mmdet_norms.experiments.diff_page import JSON, MARKDOWN, PAGE, sentences, write
from mmdet_norms.files import remove_unfinished, require_writable

from .common import UserError, add_seed_argument, add_threads_argument, command, use_threads


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    args = parse_args(argv)
    if not args.out.strip():
        raise UserError("--out '' names no folder")
    out = Path(args.out)
    _check_out(out)
    threads = use_threads(args)
    if threads is not None:
        print(threads)
    runs = [open_run(args.a), open_run(args.b)]
    content = compare(*runs, args.samples, args.seed, args.score_thr, say=lambda text: print(text, flush=True))
    write(content, runs, out, args.num)
    for line in sentences(content):
        print(line)
    print(as_text(f'written: {out / PAGE}, {out / MARKDOWN}, {out / JSON}'))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=f'{typed("compare")} diff',
        description='Compare two runs image by image on the validation set of both: what B has more, or less, than A.',
    )
    parser.add_argument('a', metavar='RUN_A', help='work dir, or a checkpoint in one; of a work dir the newest counts')
    parser.add_argument('b', metavar='RUN_B', help='the same of what it is compared with')
    parser.add_argument('--out', metavar='DIR', default='work_dirs/diff', help='default: %(default)s')
    parser.add_argument(
        '--num',
        type=int,
        default=8,
        metavar='N',
        help='images to show of the better and of the worse ones (default: 8)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        metavar='P',
        help='least score of a detection, where images are compared; default: for each run, where its F1 is best',
    )
    parser.add_argument(
        '--samples', type=int, default=SAMPLES, metavar='N', help='resampled sets of images (default: %(default)s)'
    )
    add_seed_argument(parser, 0, 'seed of the resampling (default: 0)')
    add_threads_argument(parser)
    args = parser.parse_args(argv)
    if args.num < 0:
        raise UserError(f'--num {args.num}: must be at least 0')
    if args.samples < 100:
        raise UserError(f'--samples {args.samples}: must be at least 100, for the ends of an interval')
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        raise UserError(f'--score-thr {args.score_thr}: must be between 0 and 1')
    return args


def _check_out(out: Path) -> None:
    """Raise, before anything is computed, where something that is not of this command would be lost."""
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out}: is a file; name a folder')
    there = [name for name in (PAGE, MARKDOWN, JSON) if (out / name).exists()]
    if there and not str(read_json(out / JSON).get('made_by', '')).startswith('mmdet_norms '):
        raise UserError(f'--out {out}: holds a {there[0]} that this command did not write; name another folder')
    require_writable(out / PAGE, '--out')
    remove_unfinished(out)


if __name__ == '__main__':
    main()
