"""``tools/compare.py``: the results of one or several runs in one table."""

import argparse
import json
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from mmdet_norms.commands import typed
from mmdet_norms.console import as_text, plain_console
from mmdet_norms.engine.results import COLUMNS, coco_kinds, describe, format_ap, kept_results
from mmdet_norms.engine.work_dir import RESULTS

from .common import UserError, command

_MOST = 10**300  # a larger whole number is no float
_PARTIAL = ('started_anew', 'weights')
_ORIGIN = ('split', 'config', 'checkpoint', 'epoch', 'iter')  # in results.json beside the numbers


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
    )
    parser.add_argument('runs', nargs='+', help='work dirs, folders of work dirs, or results.json files in them')
    args = parser.parse_args(argv)
    rows = [row for name in dict.fromkeys(args.runs) for row in _rows(name)]
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=90 + max(len(row.run) + len(row.of) for row in rows))
    for kind in dict.fromkeys(kind for row in rows for kind in coco_kinds(row.result)):
        console.print(_table(kind, rows))
    others = dict.fromkeys(key for row in rows for key in _others(row.result))
    if others:
        console.print(_other_table(others, rows))
    for name, of, result in rows:
        if not coco_kinds(result) and not _others(result):
            console.print(as_text(f'{name}: the evaluation gave no results{f" ({of})" if of else ""}'))
        partial = result.get('partial_checkpoint')
        if partial:
            anew, weights = (partial.get(key, '?') if isinstance(partial, dict) else '?' for key in _PARTIAL)
            console.print(as_text(f'{name}: --allow-partial, {anew} of {weights} weights are not of the checkpoint'))


def _rows(name: str) -> Iterator[Row]:
    """Of a work dir, the latest results and those that were kept; of a folder of work dirs, those of each."""
    path = Path(name)
    inside = []
    if path.is_dir() and not (path / RESULTS).exists():
        inside = sorted(str(found.parent) for found in path.rglob(RESULTS))
    for run in inside or [name]:
        result = read(run)
        yield Row(run, describe(result), result)
        for kept in kept_results(Path(run)) if Path(run).is_dir() else ():
            result = read(str(kept))
            yield Row(run, describe(result), result)


def _table(kind: str, rows: Sequence[Row]) -> Table:
    """One table a kind: both side by side would not fit a terminal."""
    table = Table(title=as_text(f'{kind} average precision'), title_justify='left')
    table.add_column('run', no_wrap=True)
    table.add_column('of', overflow='fold')
    for column in COLUMNS:
        table.add_column(column, justify='right')
    for name, of, result in rows:
        table.add_row(as_text(name), as_text(of), *(format_ap(result.get(f'{kind}_{key}')) for key in COLUMNS.values()))
    return table


def _other_table(keys: Sequence[str], rows: Sequence[Row]) -> Table:
    """What is no COCO precision (VOC's mAP, recalls of proposals, accuracies): a row each."""
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
    """The numbers that no table of COCO precisions shows."""
    of_coco = tuple(f'{kind}_' for kind in coco_kinds(result))
    shown = {f'{kind}_{key}' for kind in coco_kinds(result) for key in COLUMNS.values()}
    return [
        key
        for key, value in result.items()
        if (value is None or isinstance(value, Real))
        and key not in _ORIGIN
        and key not in shown
        and not (key.startswith(of_coco) and key.endswith(('_precision', '_copypaste')))
    ]


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
    for kind in coco_kinds(result):
        for key in COLUMNS.values():
            value = result.get(f'{kind}_{key}')
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise UserError(f'{path} is not a results.json ({kind}_{key} is {value!r}, not a number)')
    return result


if __name__ == '__main__':
    main()
