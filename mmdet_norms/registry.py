"""Names of norm layers: where ``norm_cfg=dict(type=...)`` is resolved, and what a wrong name is told."""

import inspect
from contextlib import contextmanager

import mmcv.cnn.bricks.norm as mmcv_norm
from mmcv.cnn.bricks.wrappers import Conv2d
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from . import layers
from .compat.patches import put
from .errors import closest
from .layers._args import ConfigError
from .layers._contract import STOCK, is_norm_class
from .layers._conv_in_front import PLAIN_CONVS

NORM_LAYERS = MODELS
"""The registry in which mmcv's ``build_norm_layer`` resolves names.

mmcv 1.x called it ``NORM_LAYERS``; since mmcv 2 it is mmengine's root ``MODELS``, which every scope falls back to.
"""

PLAIN_CONVS.add(Conv2d)  # mmcv's own only adds empty inputs for old versions of torch

# mmcv registers torch's classes under these names; ours take the same arguments and more situations.
_REPLACED = ('GN', 'SyncBN')


def is_not_torchs(layer: nn.Module) -> bool:
    """Whether it is a norm that the class tests of mmcv and mmengine do not find."""
    return isinstance(layer, tuple(layers.NORMS.values())) and not isinstance(layer, tuple(STOCK))


class _IsNorm(type):
    """What ``isinstance`` and ``issubclass`` answer about the stand-in for ``_InstanceNorm``."""

    def __instancecheck__(cls, layer) -> bool:
        return isinstance(layer, _InstanceNorm) or is_not_torchs(layer)

    def __subclasscheck__(cls, layer) -> bool:
        return issubclass(layer, _InstanceNorm)


class _InstanceNormOrOurs(metaclass=_IsNorm):
    """Stands in for ``_InstanceNorm`` in mmcv's and mmengine's norm modules.

    Their ``is_norm`` asks ``isinstance`` of it, and finds our norms. ``infer_abbr`` asks ``issubclass``, and is to find
    torch's only: it would call any other class without ``_abbr_`` ``in``, a keyword, which no traced code can name.
    """


class UnknownNormError(ConfigError, KeyError):
    """``norm_cfg.type`` names no norm layer. A ``KeyError``, as mmcv raises, but with a message one can act on."""

    def __str__(self) -> str:
        return self.args[0]


def norm_names() -> list[str]:
    """Names that ``norm_cfg=dict(type=...)`` accepts, sorted."""
    return sorted(name for name, cls in NORM_LAYERS.module_dict.items() if inspect.isclass(cls) and is_norm_class(cls))


def explain_unknown(name: str) -> UnknownNormError:
    """The error for a ``norm_cfg.type`` that nobody registered, with the closest name and all names."""
    names = norm_names()
    close = closest(name, names)
    hint = '' if close is None else f'did you mean {close!r}? '
    return UnknownNormError(
        f'norm_cfg.type={name!r} is not a registered norm layer; {hint}choose one of: {", ".join(names)}'
    )


class _BatchNorm2dOrGhost:
    """What ``type='BN'`` is to mmcv's builder: ``nn.BatchNorm2d``, or with a ``norm_batch`` the norm of groups."""

    _abbr_ = 'bn'

    def __new__(cls, num_features: int, *args, norm_batch: int | None = None, **kwargs) -> nn.Module:
        if norm_batch is None:
            return nn.BatchNorm2d(num_features, *args, **kwargs)
        return layers.GhostBN(num_features, norm_batch, *args, **kwargs)


class _NormLookup:
    """Stands in for ``MODELS`` inside mmcv's norm builder.

    There, an unknown name ends as "Cannot find None in registry under scope name mmengine". Hosts import
    ``build_norm_layer`` by value, so the one place to say it better for all of them is the registry it asks.
    """

    def __init__(self, registry):
        self._registry = registry

    def __getattr__(self, name):
        return getattr(self._registry, name)

    @contextmanager
    def switch_scope_and_registry(self, scope):
        with self._registry.switch_scope_and_registry(scope) as registry:
            yield _NormLookup(registry)

    def get(self, name):
        # Ours first: in its own scope, mmdet has a FrozenBN that would hide the root's.
        layer = layers.NORMS.get(name) if isinstance(name, str) else None
        layer = layer or self._registry.get(name)
        if layer is None:
            raise explain_unknown(name)
        return _BatchNorm2dOrGhost if layer is nn.BatchNorm2d else layer


def register_norm_layers() -> None:
    """Register every layer of the package under its class name. Safe to call again."""
    for name, layer in layers.NORMS.items():
        if NORM_LAYERS.module_dict.get(name) is not layer:
            NORM_LAYERS.register_module(name=name, module=layer, force=name in _REPLACED)
    if 'CenConv' not in NORM_LAYERS.module_dict:
        NORM_LAYERS.register_module(name='CenConv', module=layers.CenConv2d)
    if not isinstance(mmcv_norm.MODELS, _NormLookup):
        put('mmcv.cnn.bricks.norm.MODELS', _NormLookup(mmcv_norm.MODELS))
    put('mmcv.cnn.bricks.norm._InstanceNorm', _InstanceNormOrOurs)
    put('mmengine.utils.dl_utils.misc._InstanceNorm', _InstanceNormOrOurs)
