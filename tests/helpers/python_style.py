"""Configs in mmengine's python style: they name classes where others have strings. mmdet's wheel ships none."""

import functools
import warnings
from pathlib import Path

import mmdet.registry as registries
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.registry import Registry
from mmengine.utils import get_installed_path
from torch import nn

from mmdet_norms import PLACEMENTS, apply_norm, layers, replace_norm_cfg
from mmdet_norms.entries import class_of, path_of

CONFIGS = Path(get_installed_path('mmdet'), '.mim', 'configs')

# What a config that imports its classes has for these names, which this package serves by classes of its own.
_TORCHS = {'GN': nn.GroupNorm, 'SyncBN': nn.SyncBatchNorm}
_REGISTRIES = [value for value in vars(registries).values() if isinstance(value, Registry)]


@functools.cache
def named_class(name: str) -> type | None:
    """The class that a plain name of a stock config means."""
    found = (class_of(name, registry) for registry in _REGISTRIES)
    return _TORCHS.get(name) or next((cls for cls in found if cls is not None), None)


def with_classes(node, make=None):
    """A copy whose types are classes, as a python-style config holds them before anybody reads them.

    Args:
        make: class -> what to write for it. Default: mmengine's lazy object.
    """
    make = make or (lambda cls: LazyObject(cls.__module__, cls.__name__))
    if isinstance(node, Config):
        return Config({key: with_classes(value, make) for key, value in node.items()}, filename=node.filename)
    if isinstance(node, dict):
        copied = {}
        for key, value in node.items():
            cls = named_class(value) if key == 'type' and isinstance(value, str) else None
            copied[key] = with_classes(value, make) if cls is None else make(cls)
        return type(node)(copied)
    if isinstance(node, (list, tuple)):
        return type(node)(with_classes(value, make) for value in node)
    return node


def resolved(node):
    """A plain copy whose types are classes, however they were spelled: what two spellings of a config share."""
    if isinstance(node, dict):
        return {key: _resolved(value) if key == 'type' else resolved(value) for key, value in node.items()}
    return [resolved(value) for value in node] if isinstance(node, (list, tuple)) else node


def _resolved(kind):
    return (named_class(kind) or kind) if isinstance(kind, str) else kind


class _Named:
    def __init__(self, cls: type, imports: set[str]):
        self.text = f'{cls.__module__}_{cls.__name__}'.replace('.', '_')
        imports.add(f'from {cls.__module__} import {cls.__name__} as {self.text}')

    def __repr__(self) -> str:
        return self.text


def write_python_style(cfg: Config, path: Path) -> Path:
    """Write ``cfg`` as a file that imports its classes."""
    imports = set()
    named = with_classes(cfg.to_dict(), lambda cls: _Named(cls, imports))
    lines = [f'{key} = {value!r}' for key, value in named.items()]
    path.write_text('\n'.join([*sorted(imports), *lines, '']))
    return path


def outcome(change, *arguments):
    """The config in classes, or the error; and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            result = resolved(change(*arguments))
        except ValueError as error:
            result = str(error)
    return result, [str(warning.message) for warning in caught if 'norm ' in str(warning.message)]


def assert_alike(model, names=tuple(PLACEMENTS), spellings=(None, path_of)):
    """Each name, and two norms in place of all, do to a model config of strings what they do to one of classes."""
    for spelling in spellings:
        in_classes = with_classes(model, spelling)
        for name in names:
            assert outcome(apply_norm, in_classes, name) == outcome(apply_norm, model, name)
        for norm_cfg in (dict(type='BNET'), dict(type=layers.MABN)):
            assert outcome(replace_norm_cfg, in_classes, norm_cfg) == outcome(replace_norm_cfg, model, norm_cfg)
