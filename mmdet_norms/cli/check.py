"""``tools/check.py``: find what is wrong with the data of a config before anything is built."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence

from mmengine.config import Config

from mmdet_norms.classification.image_folder import image_folders
from mmdet_norms.commands import typed
from mmdet_norms.datasets.annotations import forget, read_annotations
from mmdet_norms.datasets.checks import Finding, Report, check_config
from mmdet_norms.datasets.parts import write_copy
from mmdet_norms.datasets.sources import SPLITS, evaluated_files, sources
from mmdet_norms.placement import PLACEMENTS

from .class_folders import class_folder_findings, folder_of
from .common import (
    UserError,
    add_data_arguments,
    add_geometry_argument,
    command,
    copies_folder,
    load_config,
    without_folder,
)
from .config_checks import training_problems
from .options import add_option_arguments
from .weights import check_test, check_training

_RANKS = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Check as the command line says; the status is 2 if there are errors."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:  # nothing is left of a check
        args.copies = folder
        errors = _check(args)
    if errors:
        sys.exit(2)


def _check(args: argparse.Namespace) -> int:
    """Print what is found; returns the number of errors."""

    def show(text: str) -> None:
        print(without_folder(text, args.copies))

    cfg = load_config(args)
    problems = [*training_problems(cfg), *_weights_problems(cfg, args)]
    for problem in problems:
        show(f'{"error":<8} {problem}')
    report = check_config(cfg, full=args.full)
    report.findings += class_folder_findings(cfg, full=args.full)
    for finding in report.findings:
        show(f'{finding.level:<8} {finding}')
    for path, notes in report.completed.items():
        for note in notes:
            show(f'filled   {path}: {note} (in a copy, when a run starts)')
    errors, warnings = len(problems) + len(report.of('error')), len(report.of('warning'))
    files = [source.ann_file for source in sources(cfg) if source.skipped is None]
    files += [folder_of(entry) for _, _, entry in image_folders(cfg, *SPLITS)]
    files = ', '.join(dict.fromkeys(files)) or 'no file in COCO format'
    show(f'{args.config}: {errors} errors, {warnings} warnings in {files}')
    return errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=typed('check'),
        description='Find what is wrong with the data, classes, keys and weights of a config.',
    )
    parser.add_argument('config', help='config file, or PACKAGE::path, e.g. mmdet::retinanet/...')
    parser.add_argument('checkpoint', nargs='?', help='one to test, instead of what training starts from')
    parser.add_argument('--full', action='store_true', help='decode every image, not only the headers of some')
    parser.add_argument('--norm', metavar='NAME', help=f'as {typed("train")}: {", ".join(PLACEMENTS)}')
    add_geometry_argument(parser)
    add_data_arguments(parser)
    add_option_arguments(parser)
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0, allow_partial=False)
    return parser.parse_args(argv)


def _weights_problems(cfg: Config, args: argparse.Namespace) -> list[str]:
    try:
        (check_test if args.checkpoint else check_training)(cfg, args)
    except UserError as error:
        return [str(error)]
    return []


def check_data(
    cfg: Config, splits: tuple[str, ...], allow_faults: bool | None = None, folder: str | None = None
) -> None:
    """Raise, before a run, if the data of ``splits`` are not what they say; complete what exporters leave out.

    Every process checks; the first one speaks. A file that had to be completed is read from a copy.

    Args:
        cfg: read, and changed where it has to read a copy.
        splits: those that the run reads.
        allow_faults: say them as warnings, but those that would end the run; None where there is no such option.
        folder: where copies go; ``annotations`` in the work dir by default.
    """
    report = check_config(cfg, splits)
    report.findings += class_folder_findings(cfg, splits)
    errors = report.of('error')
    fatal = [finding for finding in errors if finding.fatal]
    if fatal and allow_faults:
        raise UserError(_refusal(fatal, '; --allow-data-faults cannot help, the run would end in an error'))
    if errors and not allow_faults:
        allowable = allow_faults is not None and not fatal
        raise UserError(_refusal(errors, '; --allow-data-faults goes on nevertheless' if allowable else ''))
    speaks = all(os.environ.get(name, '0') == '0' for name in _RANKS)
    for finding in [*errors, *report.of('warning')] if speaks else []:
        print(f'warning: {finding}', file=sys.stderr)
    _read_completed(cfg, report, speaks, folder)
    forget()


def _refusal(errors: list[Finding], option: str) -> str:
    if len(errors) == 1:
        return f'{errors[0]}{option}'
    listed = '\n'.join(f'  {finding}' for finding in errors)
    return f'the data cannot be used as they are ({typed("check")} lists all that it finds{option}):\n{listed}'


def _read_completed(cfg: Config, report: Report, speaks: bool, folder: str | None) -> None:
    """Write what was filled in, and let data sets and evaluators read it."""
    for path, notes in report.completed.items():
        copy = write_copy(read_annotations(path), path, folder or copies_folder(cfg.work_dir))
        if speaks:
            print(without_folder(f'{path}: filled in {"; ".join(notes)}; the run reads {copy}', folder))
        for split in SPLITS:
            for _, metric, file in evaluated_files(cfg, split):
                if os.path.realpath(file) == os.path.realpath(path):
                    metric['ann_file'] = copy
        for source in sources(cfg):
            if source.ann_file and os.path.realpath(source.ann_file) == os.path.realpath(path):
                source.entry['ann_file'] = copy


if __name__ == '__main__':
    main()
