"""``tools/compare.py report DIR ...``: the comparison of runs as one page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdet_norms.commands import typed
from mmdet_norms.experiments import report
from mmdet_norms.files import require_writable

from .common import UserError, command


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write the report, and say what it says."""
    parser = argparse.ArgumentParser(
        prog=f'{typed("compare")} report',
        description='Compare runs over norms, batch sizes and seeds: a page to look at (index.html), the same as text '
        '(report.md) and as numbers (results.csv, results.json).',
    )
    parser.add_argument('folders', nargs='+', metavar='DIR', help='work dirs of train, or folders of work dirs')
    parser.add_argument('--out', default='report', metavar='DIR', help='folder of the files; default report')
    parser.add_argument(
        '--metric',
        metavar='KEY',
        help='what to compare by, a key of results.json; default bbox_mAP or what most have',
    )
    parser.add_argument(
        '--baseline', metavar='NORM', help='what the others are compared with: a norm, or KEY=VALUE; default bn'
    )
    parser.add_argument(
        '--images', type=int, default=4, metavar='N', help='validation images shown as each norm sees them; default 4'
    )
    args = parser.parse_args(argv)
    if args.images < 0:
        raise UserError(f'--images {args.images}: must be at least 0')

    def ready() -> None:
        for name in report.FILES:
            require_writable(Path(args.out) / name, '--out')

    paths = report.write(args.folders, args.out, args.metric, args.baseline, args.images, ready)
    print(''.join(f'{text}\n\n' for text in report.said(paths)), end='')
    print('written:', *map(str, paths))


if __name__ == '__main__':
    main()
