"""The rows of the matrix: each is an ordinary test of every norm, by a decorator that knows the exceptions."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from .harness import raises
from .norms import NORMS

SITUATIONS: dict[str, Callable[[str], None]] = {}
"""The check of each row, by the row's name in docs/matrix.md."""


@dataclass(frozen=True)
class Otherwise:
    """A cell that is answered otherwise than by the situation's own check.

    Exactly one of:
        error: type and pattern of the error that the situation must end in.
        check: what holds instead.
        Neither: the situation does not exist for the norm.
    """

    reason: str
    error: tuple[type[Exception], str] | None = None
    check: object = None


def situation(name: str) -> Callable:
    """Make a check of a norm the test of all norms, and a row of the matrix. ``test.check`` is the check itself."""

    def add(check):
        SITUATIONS[name] = check

        @pytest.mark.parametrize('norm', NORMS)
        @functools.wraps(check)
        def test(norm):
            run_cell(norm, name)

        test.check = check
        return test

    return add


def run_cell(norm: str, name: str) -> None:
    """Raise unless the cell is what the matrix says it is."""
    from .exceptions import EXCEPTIONS  # which are made of the checks

    function, other = SITUATIONS[name], EXCEPTIONS.get((norm, name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other on such small maps
    try:
        if other is None:
            function(norm)
        elif other.error:
            raises(*other.error, function, norm)
        elif other.check:
            other.check(norm)
    finally:
        torch.set_num_threads(threads)
