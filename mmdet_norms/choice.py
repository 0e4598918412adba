"""Some of many: evenly spread, or those whose names fit a pattern."""

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import TypeVar

import numpy as np

from .errors import UserError

T = TypeVar('T')


def sample(total: int, limit: int) -> list[int]:
    """``limit`` of ``total`` positions, evenly spread, the first and the last among them."""
    if total <= limit:
        return list(range(total))
    return np.unique(np.linspace(0, total - 1, limit).round().astype(int)).tolist()


def evenly(items: Sequence[T], limit: int) -> list[T]:
    """So many of the items, see :func:`sample`."""
    return [items[i] for i in sample(len(items), limit)]


def fitting(names: Sequence[str], patterns: Sequence[str], refusal: Callable[[str, list[str]], str]) -> list[str]:
    """The names that fit one of the patterns, which have ``*`` and ``?``.

    Args:
        refusal: what to say of a pattern that fits none, given it and the names that it may mean.

    Raises:
        UserError: a pattern fits none.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise UserError(refusal(pattern, close or list(names)))
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
