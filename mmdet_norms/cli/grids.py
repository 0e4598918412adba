"""What the commands that train a grid have in common: checks of numbers, and the end."""

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from mmdet_norms.console import as_text
from mmdet_norms.datasets.annotations import forget
from mmdet_norms.experiments import Cell, Outcome
from mmdet_norms.experiments.data import fingerprint
from mmdet_norms.experiments.grid import LOG

from . import train
from .common import UserError, is_of_data, move_and_merge, read_config

_DIGITS = 2**32


def require_different(args: argparse.Namespace, **least: int) -> None:
    """Raise unless the values of each option are different whole numbers of at least so much, or not given."""
    for name, low in least.items():
        values = getattr(args, name) or [low]
        if min(values) < low or max(values) >= _DIGITS or len(set(values)) < len(values):
            said = ' '.join(map(str, values))
            raise UserError(f'{_typed(name)} {said}: must be different whole numbers of at least {low}')


def require_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raise unless each of these options is so much or more, or not given."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f'{_typed(name)} {value}: must be at least {low}')


def data_by_cell() -> Callable[[Cell], dict[str, str]]:
    """What :func:`mmdet_norms.experiments.run` asks for the data of a cell; the same data are read once."""
    known: dict[str, dict[str, str]] = {}

    def data_of(cell: Cell) -> dict[str, str]:
        args = train.parse_args([cell.config, *cell.options])
        for name in ('cfg_options', 'cfg_options_new'):
            options = getattr(args, name) or {}
            setattr(args, name, {key: value for key, value in options.items() if is_of_data(key)})
        args.copies = None
        key = repr((cell.config, args.data_root, args.val_fraction, args.cfg_options, args.cfg_options_new))
        if key not in known:
            known[key] = _fingerprint(args)
        return known[key]

    return data_of


def _fingerprint(args: argparse.Namespace) -> dict[str, str]:
    try:
        with redirect_stdout(io.StringIO()):  # each training says what --data-root has changed
            cfg = read_config(args.config)
            move_and_merge(cfg, args)
            return fingerprint(cfg)
    except (OSError, TypeError, UserError):  # each training says it; a TypeError is of keys that a class has not
        return {}
    finally:
        forget()


@contextmanager
def failures_named(outcomes: Sequence[Outcome], folder: str) -> Iterator[None]:
    """At the end of the block name the trainings that failed, and end with status 1 if some did.

    Also where the block ends in an error, as on a disk that is full; that one comes behind them.
    """
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    try:
        yield
    finally:
        for outcome in failed:
            print(as_text(f'failed: {outcome.cell.name}: {outcome.error} ({Path(folder) / outcome.cell.name / LOG})'))
        if failed:
            print(f'{len(failed)} of {len(outcomes)} trainings failed; the same command tries them again', flush=True)
    if failed:
        sys.exit(1)


def _typed(name: str) -> str:
    return f'--{name.replace("_", "-")}'
