"""Which of many combinations ``make test`` runs: MMDET_NORMS_TESTS=all runs all of them (CONTRIBUTING.md)."""

import pytest


def full(*values, **options):
    """A case for ``MMDET_NORMS_TESTS=all`` only."""
    return pytest.param(*values, marks=pytest.mark.full, **options)


def in_turn(rows, columns, each=1):
    """Every row with every column; ``each`` columns of a row in every run, in turn, so that no column is left out."""
    columns = list(columns)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            always = (j - i * each) % len(columns) < each
            yield pytest.param(row, column, id=f'{row}-{column}', marks=() if always else pytest.mark.full)
