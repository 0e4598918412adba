"""What the commands that train a grid have in common: checks of numbers, and the end."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmdet_norms.console import as_text
from mmdet_norms.experiments import Outcome
from mmdet_norms.experiments.grid import LOG

from .common import UserError

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
