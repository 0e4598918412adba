"""What an entry of a config is, however it names its class.

``'CocoDataset'``, ``'mmdet.CocoDataset'``, ``'mmdet.datasets.coco.CocoDataset'``, the class itself (python-style
configs), and a subclass of it are all a CocoDataset. Every tool asks here instead of comparing strings.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmdet import registry as mmdets
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

# What mmcv calls torch's norms. This package registers classes of its own under two of the names.
_NORMS_OF_TORCH = {'GroupNorm': 'GN', 'SyncBatchNorm': 'SyncBN'}

# What mmengine says of a name that it cannot build.
_UNREGISTERED = re.compile(r'(\S+) is not in the \S+::(.+?) registry')

# Under which a config may name a class.
_CLASS_KEYS = ('type', 'runner_type', 'constructor')


def class_of(entry: Any, registry: Registry = MODELS) -> Callable | None:
    """The class (or function) that an entry names, or None where nobody registered it.

    Args:
        entry: a dict with a ``type``, or the type itself.
        registry: of what kind of things, such as :data:`mmdet.registry.DATASETS`. A name is looked up as mmdet's
            configs mean it: in mmdet, then in mmengine.
    """
    kind = _kind(entry)
    if kind is None or callable(kind):
        return kind
    if '.' in str(kind):
        try:
            found = _mmdets(registry).get(str(kind))
        except Exception:  # a scope whose package is not installed, or fails to import
            found = None
    else:  # Registry.get would try to import a module of that name
        found = next((module[kind] for module in _tables(registry) if kind in module), None)
    return found if callable(found) else None


def name_of(entry: Any, registry: Registry = MODELS) -> str:
    """The plain name of an entry's class: the first one that it is registered under, such as 'ResNet' or 'BN'.

    ``str(None)`` for an entry without a type; for a class that nobody registered, what the entry calls it.
    """
    kind = _kind(entry)
    found = class_of(kind, registry)
    names = (name for table in _tables(registry) for name, cls in table.items() if cls is found)
    registered = next(names, None) if found is not None else None
    if registered is not None:
        return registered
    written = getattr(kind, '__name__', None) or str(kind).rsplit('.', 1)[-1]
    is_torchs = (getattr(found, '__module__', None) or '').startswith('torch.')
    return _NORMS_OF_TORCH.get(written, written) if is_torchs else written


def is_a(entry: Any, base: str | type | tuple[str | type, ...], registry: Registry = MODELS) -> bool:
    """Whether an entry's class is ``base``, one of them, or a subclass; of names that nobody registered, the same."""
    bases = base if isinstance(base, tuple) else (base,)
    kind = _kind(entry)
    if kind is None:
        return False
    found = class_of(kind, registry)
    if not inspect.isclass(found):
        return name_of(kind, registry) in [name_of(base, registry) for base in bases]
    for base in bases:
        known = class_of(base, registry)
        if inspect.isclass(known) and issubclass(found, known):
            return True
        # A class that somebody registered in the place of another one: neither is a subclass of the other.
        if isinstance(base, str) and any(cls.__name__ == base for cls in found.__mro__):
            return True
    return False


def parameter_of(entry: Any, key: str, registry: Registry = MODELS) -> inspect.Parameter | None:
    """The argument ``key`` of an entry's class, or of the base that its ``**kwargs`` go to."""
    found = class_of(entry, registry)
    if found is not None and not inspect.isclass(found):
        return inspect.signature(found).parameters.get(key)
    for cls in found.__mro__ if found else ():
        if '__init__' not in vars(cls):
            continue
        parameters = inspect.signature(cls.__init__).parameters
        if key in parameters:
            return parameters[key]
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return None


def is_classifier(model_cfg: Any) -> bool:
    """Whether a model config is that of an image classifier, this package's or mmpretrain's."""
    return is_a(model_cfg, 'ImageClassifier')


def mappings(node: Any, key: str = '') -> Iterator[tuple[str, Mapping]]:
    """Every dict in a part of a config, the outer ones first, with its key such as ``'model.roi_head.bbox_head.0'``.

    Args:
        node: a dict or list of the config; in anything else there is none.
        key: its own.
    """
    if isinstance(node, (list, tuple)):
        inner = enumerate(node)
    elif isinstance(node, Mapping):
        yield key, node
        inner = node.items()
    else:
        return
    for name, value in inner:
        yield from mappings(value, f'{key}.{name}' if key else str(name))


def explain_unregistered(error: KeyError) -> str | None:
    """What to write in place of a ``type`` that nobody registered, of mmengine's error about it; None of other errors.

    Args:
        error: from building a model, an optimizer, a data set, ...
    """
    found = _UNREGISTERED.search(str(error.args[0])) if error.args else None
    registries = (value for value in vars(mmdets).values() if isinstance(value, Registry))
    registry = next((value for value in registries if found and value.name == found[2]), None)
    if registry is None:
        return None
    name = found[1].rsplit('.', 1)[-1]
    by_lower = {valid.lower(): valid for table in _tables(registry) for valid in table}
    close = [by_lower[key] for key in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    hint = f' (did you mean {" or ".join(map(repr, close))}?)' if close else ''
    kind = registry.name.replace('_', ' ')
    return (
        f'type={found[1]!r} names no {kind} that is registered{hint}; a class of your own is one once '
        "the config's custom_imports names its module"
    )


def spell_out(node: Any) -> None:
    """Name the classes of a config by their full paths, as mmengine writes those of python-style configs; in place.

    mmengine itself does so for classes that nobody has looked at yet, but by paths that it does not always find again.
    One that was read out of the config and put back is a class, and its text (``<class 'mmdet...'>``) would be no
    config.
    """
    if isinstance(node, (list, tuple, Config)):
        for entry in node.values() if isinstance(node, Config) else node:
            spell_out(entry)
    elif isinstance(node, dict):
        for key, value in dict.items(node):  # the items() of a ConfigDict would import the classes
            cls = value.build() if isinstance(value, (LazyObject, LazyAttr)) else value
            if key in _CLASS_KEYS and (inspect.isclass(cls) or inspect.isfunction(cls)):
                node[key] = path_of(cls)
            else:
                spell_out(value)


def path_of(cls: Callable) -> str:
    """A path by which mmengine finds a class: where it is defined, or an outer package that exports it.

    mmengine takes ``smooth_l1_loss`` in ``mmdet.models.losses.smooth_l1_loss.L1Loss`` for the function of that name.
    """
    modules = cls.__module__.split('.')
    paths = ['.'.join([*modules[:end], cls.__qualname__]) for end in range(len(modules), 0, -1)]
    return next((path for path in paths if get_object_from_string(path) is cls), paths[0])


def _mmdets(registry: Registry) -> Registry:
    return registry.children.get('mmdet', registry)


def _tables(registry: Registry) -> Iterator[dict]:
    """Name -> class, of mmdet's registry and those above it."""
    where = _mmdets(registry)
    where.import_from_location()
    while where is not None:
        yield where.module_dict
        where = where.parent


def _kind(entry: Any) -> Any:
    kind = entry.get('type') if isinstance(entry, Mapping) else entry
    return kind.build() if isinstance(kind, (LazyObject, LazyAttr)) else kind
