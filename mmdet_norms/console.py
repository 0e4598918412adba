"""What the tools print: tables and progress in which everything that a user named is text, never markup."""

from rich.console import Console
from rich.progress import TextColumn


def plain_console(**options) -> Console:
    """A rich console that takes ``[b]``, ``:car:`` and the like for what they are: parts of a name.

    Args:
        options: as for :class:`rich.console.Console`.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


def plain_column(text: str) -> TextColumn:
    """A column of a progress bar whose task descriptions are text."""
    return TextColumn(text, markup=False)


def as_text(name: object) -> str:
    """One printable line of a name: a line break or an escape sequence in it is shown as it is written in Python."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))
