"""What people call a command: ``tools/NAME.py`` in a checkout, ``mmdet-norms NAME`` where the package is installed.

Help texts and messages ask :func:`typed`, so that they name what the reader typed and can type.
"""

from mmdet_norms_start.commands import COMMANDS, runnable, several, typed

__all__ = ['COMMANDS', 'runnable', 'several', 'typed']
