"""The configs that come with this package, and what mmengine is told about them.

For ``_base_ = 'mmdet_norms::bnet/...'`` and ``get_config('mmdet_norms::...')`` mmengine knows a closed table of
packages, and looks in ``PACKAGE/.mim/configs`` where a package is installed. A wheel has that folder; of a checkout,
installed or not, the folder ``configs`` itself is read: copies would age.
"""

import functools
import os
from pathlib import Path
from types import ModuleType

NAME = 'mmdet_norms'
_PACKAGE = Path(__file__).resolve().parents[1] / NAME


def folder() -> Path:
    """Where ``configs/`` and ``model-index.yml`` lie: inside the installed package, or in the checkout around it."""
    mim = _PACKAGE / '.mim'
    return mim if mim.is_dir() else _PACKAGE.parent


def serve(module: ModuleType) -> None:
    """Tell ``mmengine.config.utils``, ``mmengine.config.config`` or ``mmengine.hub.hub``. Safe to call again."""
    if hasattr(module, 'MODULE2PACKAGE'):
        module.MODULE2PACKAGE[NAME] = NAME
    for name, ours in _FUNCTIONS.items():
        original = getattr(module, name, None)
        if original is not None and not hasattr(original, 'knows_mmdet_norms'):
            setattr(module, name, _with(original, ours))


def _with(original, ours):
    @functools.wraps(original)
    def asked(package, *args):
        is_ours = package in (NAME, str(_PACKAGE))
        return ours(*args) if is_ours else original(package, *args)

    asked.knows_mmdet_norms = True
    return asked


def _installed_path() -> str:
    # mmengine's own does not find editable installs
    return str(_PACKAGE)


def _config_file(config: str) -> str:
    path = folder() / 'configs' / config
    if not path.is_file():
        raise FileNotFoundError(f'{NAME} has no config {config}: there is no file {path}')
    return str(path)


def _metadata(config: str) -> dict:
    from mmengine.fileio import load

    index = load(str(folder() / 'model-index.yml'))
    for path in index['Import']:
        for model in load(str(folder() / path))['Models']:
            if model.get('Config') == f'configs/{config}':
                return {**model, 'Config': os.path.join(str(folder()), model['Config'])}
    raise ValueError(f'no metafile of {NAME} lists {config}')


_FUNCTIONS = {
    'get_installed_path': _installed_path,
    '_get_external_cfg_base_path': _config_file,
    '_get_cfg_metainfo': _metadata,
}
