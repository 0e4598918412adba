"""``tools/compare.py RUN ...``: the results of one or several runs in one table."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from mmdet_norms.commands import typed
from mmdet_norms.console import as_text, plain_console
from mmdet_norms.engine.results import (
    COLUMNS,
    accuracies,
    coco_kinds,
    describe,
    format_ap,
    kept_results,
    other_keys,
    read_json,
)
from mmdet_norms.engine.work_dir import RESULTS
from mmdet_norms.experiments.runs import is_report

from .common import UserError, command

_MOST = 10**300  # a larger whole number is no float
_PARTIAL = ('started_anew', 'weights')


class Row(NamedTuple):
    """The results in one file: of which run, and of which evaluation of it."""

    run: str
    of: str
    result: dict


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and name every run that is in none."""
    parser = argparse.ArgumentParser(
        prog=typed('compare'),
        description='Compare the results of runs: of each, the latest evaluation and those of other checkpoints.',
        epilog=f'{typed("compare")} run trains a grid of norms, batch sizes and seeds, report makes one page of runs, '
        'diff sets two side by side, image by image: each has a --help of its own (docs/compare.md).',
    )
    parser.add_argument('runs', nargs='+', help='work dirs, folders of work dirs, or results.json files in them')
    args = parser.parse_args(argv)
    rows = [row for name in dict.fromkeys(args.runs) for row in _rows(name)]
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=90 + max(len(row.run) + len(row.of) for row in rows))
    classifiers = [row for row in rows if accuracies(row.result)]
    detectors = [row for row in rows if row not in classifiers or coco_kinds(row.result)]
    for kind in dict.fromkeys(kind for row in detectors for kind in coco_kinds(row.result)):
        columns = {column: f'{kind}_{key}' for column, key in COLUMNS.items()}
        console.print(_table(f'{kind} average precision', columns, detectors))
    if classifiers:
        columns = {column: key for row in classifiers for column, key in accuracies(row.result).items()}
        columns = {f'top-{k}': columns[f'top-{k}'] for k in sorted(int(c.removeprefix('top-')) for c in columns)}
        console.print(_table('accuracy of classifiers', columns, classifiers))
    others = dict.fromkeys(key for row in rows for key in _others(row.result))
    if others:
        console.print(_other_table(others, rows))
    for name, of, result in rows:
        if not coco_kinds(result) and not accuracies(result) and not _others(result):
            console.print(as_text(f'{name}: the evaluation gave no results{f" ({of})" if of else ""}'))
        precise = result.get('precise_bn')
        if precise:
            images = precise.get('images', '?') if isinstance(precise, dict) else '?'
            console.print(as_text(f'{name}: --precise-bn, running statistics over {images} images ({of})'))
        partial = result.get('partial_checkpoint')
        if partial:
            anew, weights = (partial.get(key, '?') if isinstance(partial, dict) else '?' for key in _PARTIAL)
            console.print(as_text(f'{name}: --allow-partial, {anew} of {weights} weights are not of the checkpoint'))


def _rows(name: str) -> Iterator[Row]:
    """Of a work dir, the latest results and those that were kept; of a folder of work dirs, those of each."""
    path = Path(name)
    inside = []
    if path.is_dir() and not (path / RESULTS).exists():
        found = sorted(path.rglob(RESULTS))
        inside = [str(results.parent) for results in found if not is_report(read_json(results))]
    for run in inside or [name]:
        result = read(run)
        yield Row(run, describe(result), result)
        for kept in kept_results(Path(run)) if Path(run).is_dir() else ():
            result = read(str(kept))
            yield Row(run, describe(result), result)


def _table(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> Table:
    """One table a kind: several side by side would not fit a terminal.

    Args:
        columns: what is above a column, and the key of its values.
    """
    table = Table(title=as_text(title), title_justify='left')
    table.add_column('run', no_wrap=True)
    table.add_column('of', overflow='fold')
    for column in columns:
        table.add_column(column, justify='right')
    for name, of, result in rows:
        table.add_row(as_text(name), as_text(of), *(format_ap(result.get(key)) for key in columns.values()))
    return table


def _other_table(keys: Sequence[str], rows: Sequence[Row]) -> Table:
    """What is no COCO precision and no accuracy (VOC's mAP, recalls of proposals): a row each."""
    table = Table(title='other results', title_justify='left')
    table.add_column('run', no_wrap=True)
    table.add_column('of', overflow='fold')
    table.add_column('metric', overflow='fold')
    table.add_column('value', justify='right')
    for name, of, result in rows:
        for key in keys:
            if key in _others(result):
                value = '-' if result[key] is None else f'{result[key]:.4g}'
                table.add_row(as_text(name), as_text(of), as_text(key), value)
    return table


def _others(result: dict) -> list[str]:
    """The numbers that no other table shows."""
    return [key for key in other_keys(result) if result[key] is None or isinstance(result[key], Real)]


def read(name: str) -> dict:
    """The results of a run: ``results.json``, or the work dir that holds it."""
    path = Path(name)
    path = path / RESULTS if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding='utf-8-sig'))
    except FileNotFoundError:
        below = ', nor in a folder below it' if Path(name).is_dir() else ''
        raise UserError(
            f'there is no {path}{below}; {typed("train")} and {typed("test")} write it into the work dir'
        ) from None
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not a results.json ({error})') from error
    if not isinstance(result, dict):
        raise UserError(f'{path} is not a results.json (it holds a {type(result).__name__}, not an object)')
    huge = next((key for key, value in result.items() if type(value) is int and abs(value) > _MOST), None)
    if huge is not None:
        raise UserError(f'{path} is not a results.json (in {huge}, a number of {len(str(result[huge]))} digits)')
    shown = [f'{kind}_{key}' for kind in coco_kinds(result) for key in COLUMNS.values()]
    for key in [*shown, *accuracies(result).values()]:
        value = result.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise UserError(f'{path} is not a results.json ({key} is {value!r}, not a number)')
    return result


if __name__ == '__main__':
    main()
