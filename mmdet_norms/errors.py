"""The one error that is an answer to the user."""

import difflib
import re
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something the caller can put right: the tools show it as one message, without a traceback, and exit with 2."""

    def __str__(self) -> str:
        # torch raises the error of a data loader's worker again, with the worker's traceback in place of the message.
        text = super().__str__()
        if re.match(r'Caught \w+ in DataLoader worker process \d+\.\n', text):
            text = re.split(rf'\n[\w.]*\b{type(self).__name__}: ', text)[-1].rstrip()
        return text


def some(names: Sequence[str], count: int = 4) -> str:
    """The first few, and how many more there are."""
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + more


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """`` (did you mean 'mish'?)``, or nothing where no valid name is close."""
    close = closest(name, valid)
    return '' if close is None else f' (did you mean {close!r}?)'


def closest(name: object, valid: Iterable[str]) -> str | None:
    """The valid name that is meant, perhaps; None where none is close."""
    by_lower = {key.lower(): key for key in valid}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None
