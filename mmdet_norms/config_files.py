"""Reading a config file, whose own modules may be where Python does not look."""

import os
import re
from pathlib import Path

from mmengine.config import Config

from .errors import UserError


def read_config_file(path: str | os.PathLike) -> Config:
    """``Config.fromfile``.

    Raises:
        UserError: there is no module of a name in its ``custom_imports``. Says what to write.
    """
    try:
        return Config.fromfile(path)
    except ImportError as error:
        said = _module_not_found(path, error)
        if said is None:  # of the module's own code
            raise
        raise UserError(said) from error


def _module_not_found(config: str | os.PathLike, error: ImportError) -> str | None:
    """What to do where Python finds no module of the name that ``custom_imports`` has; None: that is not the reason."""
    failed = re.fullmatch(r'Failed to import (\S+)', str(error.__cause__))  # mmengine's words
    missing = getattr(error.__cause__, '__context__', None)
    if failed is None or not isinstance(missing, ModuleNotFoundError):
        return None
    if not f'{failed[1]}.'.startswith(f'{missing.name}.'):
        return None
    first = failed[1].split('.')[0]
    if missing.name != first:
        return f'config {config}: custom_imports: {first} is there, but has no module {missing.name}'
    folders = (Path(), Path(config).parent)
    near = [folder for folder in folders if (folder / f'{first}.py').is_file() or (folder / first).is_dir()]
    folder = near[0].resolve() if near else 'FOLDER'
    return (
        f'config {config}: custom_imports: there is no module {missing.name}; Python looks for it in PYTHONPATH: '
        f'write PYTHONPATH={folder} in front of the command{"" if near else ", the folder that it is in"}'
    )
