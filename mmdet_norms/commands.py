"""What people call a command: ``tools/NAME.py`` in a checkout, ``mmdet-norms NAME`` where the package is installed.

Help texts and messages ask :func:`typed`, so that they name what the reader typed and can type.
"""

# Of the console script, and the file in tools/ that does the same.
COMMANDS = {
    'train': 'train.py',
    'test': 'test.py',
    'infer': 'infer.py',
    'compare': 'compare.py',
    'export': 'export.py',
    'fuse': 'fuse.py',
    'benchmark': 'benchmark.py',
    'convert': 'convert_checkpoint.py',
    'shapes': 'make_shapes.py',
    'browse': 'browse.py',
    'check': 'check.py',
    'doctor': 'doctor.py',
    'replay': 'replay.py',
    'pictures': 'picture_sheet.py',
}
_CONSOLE_SCRIPT = 'mmdet-norms'
_called_by_console_script = False


def use_console_script(yes: bool = True) -> None:
    """Let :func:`typed` name the console script from now on; its entry point says so before anything else."""
    global _called_by_console_script
    _called_by_console_script = yes


def typed(name: str) -> str:
    """``'tools/train.py'`` or ``'mmdet-norms train'``, whichever way this process was started, for ``name='train'``."""
    return f'{_CONSOLE_SCRIPT} {name}' if _called_by_console_script else f'tools/{COMMANDS[name]}'


def runnable(name: str) -> str:
    """The same, to be pasted into a shell: ``'python tools/train.py'`` or ``'mmdet-norms train'``."""
    return typed(name) if _called_by_console_script else f'python {typed(name)}'
