"""``tools/convert_checkpoint.py``: a checkpoint of the authors becomes one that mmdet 3.x loads."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from mmdet_norms.checkpoints import LAYOUTS, Report, UntrustedCheckpointError, check_destination, convert
from mmdet_norms.checkpoints.report import pattern
from mmdet_norms.commands import typed
from mmdet_norms.console import plain_console
from mmdet_norms.files import refuse_overwriting

from .common import UserError, command, read_config


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Convert, say what was done, write."""
    args = parse_args(argv)
    try:
        check_destination(args.dst, args.src, args.force)  # before the work, not after
        refuse_overwriting(args.dst, 'DST', {'the config': args.config})
        config = None if args.config is None else read_config(args.config)
        converted = convert(args.src, args.source, config, trust_pickle=args.trust_pickle)
        converted.save(args.dst, overwrite=args.force)
    except UntrustedCheckpointError as error:
        raise UserError(str(error)) from error
    except (ValueError, OSError) as error:
        raise UserError(f'{error}\nnothing was written') from error
    print_report(converted.report, args)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    layouts = '\n'.join(f'  {name:8}{layout.title}' for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        prog=typed('convert'),
        description='Convert a checkpoint that the authors of a norm published to mmdet 3.x.\n'
        f'A detector becomes the CHECKPOINT of {typed("test")}, a backbone pretrained on ImageNet what\n'
        "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=DST) loads; with the --config of an image\n"
        'classifier, the CHECKPOINT of that.',
        epilog=f'layouts:\n{layouts}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('src', metavar='SRC', help='the published file')
    parser.add_argument('dst', metavar='DST', help='the file to write')
    parser.add_argument('--from', dest='source', required=True, choices=list(LAYOUTS), help='layout of SRC')
    parser.add_argument(
        '--config',
        metavar='CFG',
        help='the config that DST is for: the result must have its keys and shapes, no more and no less. Without it '
        'nothing is compared',
    )
    parser.add_argument('--force', action='store_true', help='replace DST if it is there')
    parser.add_argument(
        '--trust-pickle',
        action='store_true',
        help='read SRC even if it holds more than tensors and plain data. Such a file can run any code on this machine '
        'with your rights while it is read; use it only for a file that you would run as a program',
    )
    return parser.parse_args(argv)


def print_report(report: Report, args: argparse.Namespace) -> None:
    """A table of the steps, then what to heed."""
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=140)
    table = Table(title=f'{args.src}: {report.kind}, layout {report.source!r}', title_justify='left')
    table.add_column('step', no_wrap=True)
    table.add_column('tensors', justify='right')
    table.add_column('what', overflow='fold')
    for row in _rows(report):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for kind, messages in (('warning', report.warnings), ('note', report.notes)):
        for message in dict.fromkeys(messages):
            console.print(Text(f'{kind}: {message}'))
    part = 'model.backbone' if report.kind == 'backbone' else 'model'
    compared = f'compared with {part} of {args.config}: 0 missing, 0 left over, all shapes right'
    console.print(Text(compared if report.verified else 'no --config: names and shapes were not compared with a model'))
    use = f'{typed("test")} {args.config or "CONFIG"} {args.dst}'
    if report.geometry is not None:
        use += f' --geometry {report.geometry}'
    if report.kind == 'backbone':
        use = f"model.backbone.init_cfg=dict(type='Pretrained', checkpoint={args.dst!r})"
    console.print(Text(f'wrote {args.dst}; use: {use}'))


def _rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """Step, number of tensors, what; tensors that look alike share a row."""
    if report.unwrapped:
        yield 'unwrapped', '', ', '.join(report.unwrapped)
    yield 'unchanged', str(report.unchanged), ''
    for olds, arrow in _grouped(report.renamed, lambda old, new: f'{pattern(old)} -> {pattern(new)}'):
        yield 'renamed', str(len(olds)), arrow if len(olds) > 1 else f'{olds[0]} -> {report.renamed[olds[0]]}'
    for keys, kinds in _grouped(report.cast, lambda key, kinds: kinds):
        yield 'cast', str(len(keys)), kinds
    for step in ('dropped', 'reordered', 'folded', 'reshaped', 'initialised'):
        for keys, (where, what) in _grouped(getattr(report, step), lambda key, what: (pattern(key), what)):
            names = ', '.join(dict.fromkeys(key.rpartition('.')[2] for key in keys))
            yield step, str(len(keys)), f'{where}.{{{names}}}: {what}' if len(keys) > 1 else f'{keys[0]}: {what}'


def _grouped(done: dict[str, str], by: Callable[[str, str], object]) -> Iterator[tuple[list[str], object]]:
    groups = defaultdict(list)
    for key, what in done.items():
        groups[by(key, what)].append(key)
    return ((keys, group) for group, keys in groups.items())


if __name__ == '__main__':
    main()
