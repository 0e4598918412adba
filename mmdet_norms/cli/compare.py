"""``tools/compare.py``: compare runs; what is done with them is a word in front, and without one it is a table."""

import sys
from collections.abc import Sequence
from importlib import import_module

# Word -> the module in this folder whose ``main(argv)`` does it. A folder of that name is written ./WORD.
WORDS: dict[str, str] = {'run': 'compare_run', 'report': 'compare_report', 'diff': 'compare_diff'}


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the first word says, else print the table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in WORDS:
        module, argv = WORDS[argv[0]], argv[1:]
    else:
        module = 'compare_table'
    import_module(f'{__package__}.{module}').main(argv)


if __name__ == '__main__':
    main()
