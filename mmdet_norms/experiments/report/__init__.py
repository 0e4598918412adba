"""The comparison of runs as one page: ``index.html``, ``report.md``, ``results.csv`` and ``results.json``."""

from .files import FILES, said, write

__all__ = ['FILES', 'said', 'write']
