"""Weights by name and address, for mmengine's loader: ``torchvision://``, ``open-mmlab://``, ``mmcls://``, ``https://``.

What stands in the place of mmengine's own needs no torchvision package, runs no code of what it reads, checks what it
downloads, and says in one message what to do where there is no network.
"""

import difflib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import mmengine
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint

from .downloads import DownloadError, cached, note
from .reading import CheckpointError, load_from_local, read_file, with_state_dict

_TORCHVISION, _OPENMMLAB, _MMCLS = ('modelzoo://', 'torchvision://'), ('open-mmlab://', 'openmmlab://'), ('mmcls://',)
_V1 = '.imagenet1k_v1'  # torchvision's later name of the same weights
_UPLOADED_AGAIN = 'efficientnet_'  # under this later name only


def serve_schemes() -> None:
    """Let mmengine's loader, of whatever run, find and read files by this module. Idempotent."""
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        (_TORCHVISION, load_from_torchvision),
        (_OPENMMLAB, load_from_openmmlab),
        (_MMCLS, load_from_mmcls),
    ):
        mmengine_checkpoint.CheckpointLoader.register_scheme(prefixes, loader, force=True)


def address(name: str) -> str:
    """What a name of a list of models stands for: an ``https://`` address or, from a list of the user's, a file.

    Args:
        name: ``torchvision://NAME`` (torchvision's first weights of that name, as mmengine means it),
            ``open-mmlab://NAME`` or ``mmcls://NAME``. Any other is returned as it is.

    Raises:
        CheckpointError: the list has no such name.
    """
    scheme, separator, model = name.partition('://')
    scheme += separator
    if scheme in _TORCHVISION:
        return _torchvision_address(name, model)
    if scheme in _OPENMMLAB:
        urls = mmengine_checkpoint.get_external_models()
        model = mmengine_checkpoint.get_deprecated_model_names().get(model, model)
        found = _entry(urls, name, model, "of mmengine's list")
        return found if '://' in found else os.path.join(mmengine_checkpoint._get_mmengine_home(), found)
    if scheme in _MMCLS:
        return _entry(mmengine_checkpoint.get_mmcls_models(), name, model, "of mmengine's list")
    return name


def _torchvision_address(name: str, model: str) -> str:
    """By mmengine's copy of torchvision's list; only what is not in it needs the package."""
    urls = json.loads(Path(mmengine.__path__[0], 'hub', 'torchvision_0.12.json').read_text(encoding='utf-8'))
    urls = {key: url for key, url in urls.items() if url}
    urls |= {key + _V1: url for key, url in urls.items() if not key.startswith(_UPLOADED_AGAIN)}
    if model not in urls:
        try:
            urls = mmengine_checkpoint.get_torchvision_models()
        except Exception as error:  # a torchvision that does not fit torch fails in ways of its own
            raise CheckpointError(
                f'{name}: {model!r} is none of torchvision 0.12{_near(model, urls)}; names of later ones need the '
                f'package torchvision (pip install torchvision), which cannot be imported: {error}'
            ) from error
    return _entry(urls, name, model, "of torchvision's models")


def _entry(urls: Mapping, name: str, model: str, what: str) -> str:
    if not urls.get(model):
        raise CheckpointError(f'{name}: {model!r} is none {what}{_near(model, urls)}')
    return urls[model]


def _near(model: str, urls: Mapping) -> str:
    found = difflib.get_close_matches(model, list(urls), 3, 0.5)
    return f' (there is {", ".join(found)})' if found else ''


# mmengine's log says 'by torchvision backend' of a function named load_from_torchvision


def load_from_torchvision(filename: str, map_location: object = None) -> object:
    """Of ``torchvision://`` and ``modelzoo://``."""
    return _load(filename, map_location)


def load_from_openmmlab(filename: str, map_location: object = None) -> object:
    """Of ``open-mmlab://`` and ``openmmlab://``."""
    return _load(filename, map_location)


def load_from_mmcls(filename: str, map_location: object = None) -> object:
    """Of ``mmcls://``: of a classifier, the backbone."""
    return mmengine_checkpoint._process_mmcls_checkpoint(_load(filename, map_location))


def load_from_http(
    filename: str, map_location: object = None, model_dir: str | None = None, progress: bool = True
) -> object:
    """Of ``http://`` and ``https://``."""
    return load_url(filename, model_dir, map_location, progress)


def _load(name: str, map_location: object) -> object:
    where = address(name)
    try:
        return load_url(where, map_location=map_location) if '://' in where else load_from_local(where, map_location)
    except CheckpointError as error:
        raise type(error)(f'{name}: {error}') from error


def load_url(url: str, model_dir: str | None = None, map_location: object = None, progress: bool = True) -> object:
    """In place of torch's: what a file of the internet holds, read without running any code that is in it."""
    path = cached(url, model_dir, progress)
    first = os.environ.get('RANK', '0') == '0'
    other = note(url, path) if first else ''
    try:
        content = with_state_dict(read_file(path, map_location))
    except CheckpointError as error:
        also = f'; {other}' if other else ''
        raise type(error)(
            f'{error} ({path} is the cached file of {url}{also}; delete it to download it again)'
        ) from error
    if other:
        print_log(f'{path} is used as it is, but {other}', logger='current', level=logging.WARNING)
    return content


__all__ = ['DownloadError', 'address', 'load_from_local', 'load_url', 'serve_schemes']
