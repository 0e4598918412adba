"""``tools/compare.py``: the results of one or several runs in one table."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmdet_norms.engine.results import COLUMNS, KINDS, format_ap

from .common import UserError, command


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog='tools/compare.py', description='Compare the results of runs.')
    parser.add_argument('runs', nargs='+', help='work dirs, or results.json files in them')
    args = parser.parse_args(argv)
    results = {name: read(name) for name in dict.fromkeys(args.runs)}
    console = Console()
    if not console.is_terminal:
        console = Console(width=80 + max(map(len, results)))
    for kind in KINDS:
        if any(f'{kind}_mAP' in result for result in results.values()):
            console.print(_table(kind, results))


def _table(kind: str, results: dict[str, dict]) -> Table:
    """One table a kind: both side by side would not fit a terminal."""
    table = Table(title=f'{kind} average precision', title_justify='left')
    table.add_column('run', no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify='right')
    for name, result in results.items():
        table.add_row(name, *(format_ap(result.get(f'{kind}_{key}')) for key in COLUMNS.values()))
    return table


def read(name: str) -> dict:
    """The results of a run: ``results.json``, or the work dir that holds it."""
    path = Path(name)
    path = path / 'results.json' if path.is_dir() else path
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f'there is no {path}; tools/train.py and tools/test.py write it into the work dir') from None
    except ValueError as error:
        raise UserError(f'{path} is not a results.json ({error})') from error


if __name__ == '__main__':
    main()
