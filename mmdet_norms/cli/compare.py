"""``tools/compare.py``: the results of one or several runs in one table."""

import argparse
import json
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

from rich.table import Table

from mmdet_norms.commands import typed
from mmdet_norms.console import as_text, plain_console
from mmdet_norms.engine.results import COLUMNS, coco_kinds, format_ap

from .common import UserError, command

_MOST = 10**300  # a larger whole number is no float
_PARTIAL = ('started_anew', 'weights')
_ORIGIN = ('split', 'config', 'checkpoint', 'epoch', 'iter')  # in results.json beside the numbers


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and name every run that is in none."""
    parser = argparse.ArgumentParser(prog=typed('compare'), description='Compare the results of runs.')
    parser.add_argument('runs', nargs='+', help='work dirs, or results.json files in them')
    args = parser.parse_args(argv)
    results = {name: read(name) for name in dict.fromkeys(args.runs)}
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=80 + max(map(len, results)))
    for kind in dict.fromkeys(kind for result in results.values() for kind in coco_kinds(result)):
        console.print(_table(kind, results))
    others = dict.fromkeys(key for result in results.values() for key in _others(result))
    if others:
        console.print(_other_table(others, results))
    for name, result in results.items():
        if not coco_kinds(result) and not _others(result):
            console.print(f'{as_text(name)}: the evaluation gave no results')
        partial = result.get('partial_checkpoint')
        if partial:
            anew, weights = (partial.get(key, '?') if isinstance(partial, dict) else '?' for key in _PARTIAL)
            console.print(as_text(f'{name}: --allow-partial, {anew} of {weights} weights are not of the checkpoint'))


def _table(kind: str, results: dict[str, dict]) -> Table:
    """One table a kind: both side by side would not fit a terminal."""
    table = Table(title=as_text(f'{kind} average precision'), title_justify='left')
    table.add_column('run', no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify='right')
    for name, result in results.items():
        table.add_row(as_text(name), *(format_ap(result.get(f'{kind}_{key}')) for key in COLUMNS.values()))
    return table


def _other_table(keys: Sequence[str], results: dict[str, dict]) -> Table:
    """What is no COCO precision (VOC's mAP, recalls of proposals, accuracies): a row each."""
    table = Table(title='other results', title_justify='left')
    table.add_column('run', no_wrap=True)
    table.add_column('metric', overflow='fold')
    table.add_column('value', justify='right')
    for name, result in results.items():
        for key in keys:
            if key in _others(result):
                table.add_row(as_text(name), as_text(key), '-' if result[key] is None else f'{result[key]:.4g}')
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
    path = path / 'results.json' if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding='utf-8-sig'))
    except FileNotFoundError:
        raise UserError(
            f'there is no {path}; {typed("train")} and {typed("test")} write it into the work dir'
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
