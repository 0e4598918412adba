"""One dict of a config that describes layers: which norm it has, what it takes, and another norm in its place."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.registry import MODELS

from ..entries import class_of, name_of, parameter_of
from .norms import has_keys_of_batch_norm, keys_of_batch_norm, needs_conv

CENTRED = dict(type='CenConv')
STANDARDIZED = dict(type='ConvWS')

# Convolutions that belong to a norm: MABN's and, of the name gn-ws, group norm's.
_OF_NORMS = {'CenConv': "MABN's centred convolutions", 'ConvWS': 'weight-standardized convolutions'}

# Convolutions that another of the same shape may replace; a deformable or transposed one is something else.
_PLAIN_CONVS = ('Conv', 'Conv2d', 'ConvWS', 'ConvAWS', 'Conv2dAdaptivePadding', 'CenConv')

# What parts have in front of their norms where that is no ordinary convolution: by these keys, or by themselves.
_DEFORMABLE = ('dcn', 'use_dcn', 'dcn_on_last_conv', 'dcn_cfg', 'num_dcn')
_OTHER_THAN_CONV = {'TOODHead': 'a product of matrices', 'NASFCOSHead': 'deformable convolutions'}

# Classes that have the argument norm_cfg and do nothing with it.
_DEAF = ('HRFPN',)

# What holds no layers.
_NOT_SEARCHED = ('norm_cfg', 'norm_at', 'init_cfg', 'train_cfg', 'test_cfg', 'data_preprocessor')


class Part:
    """A dict that describes layers. What is not written in it is what its class has by default.

    The class may be named by a string, with or without a scope, or be there itself; ``name`` is the same for all.

    Args:
        cfg: the dict. :meth:`set` and :meth:`rename` change it.
        path: where it is in the model, for messages.
    """

    def __init__(self, cfg: dict, path: str = ''):
        self.cfg = cfg
        self.path = path

    @property
    def name(self) -> str:
        return name_of(self.cfg)

    @property
    def norm(self) -> Mapping | None:
        """The ``norm_cfg`` that it has; None where it has none."""
        if self.name in _DEAF:
            return None
        norm = self.norms_by_name.get(self.cfg.get('norm')) or self.get('norm_cfg')
        return norm if isinstance(norm, Mapping) and 'type' in norm else None

    @property
    def norms_by_name(self) -> Mapping[str, Mapping]:
        """What the names mean that the class takes as its ``norm``; most take none."""
        return getattr(class_of(self.cfg), 'norms_by_name', {})

    def get(self, key: str) -> Any:
        return self.cfg[key] if key in self.cfg else self.default(key)

    def default(self, key: str) -> Any:
        """The default that the class has for a key; None where it has no such argument, or one without a default."""
        parameter = parameter_of(self.cfg, key) if 'type' in self.cfg else None
        return None if parameter is None or parameter.default is parameter.empty else parameter.default

    def takes(self, key: str) -> bool:
        """Whether it may have ``key``. A dict without a type (arguments of an inner module) has what it needs."""
        if key == 'norm_cfg' and self.name in _DEAF:
            return False
        return key in self.cfg or 'type' not in self.cfg or parameter_of(self.cfg, key) is not None

    def why_not(self, keys: Mapping) -> str | None:
        """Why it cannot have the ``norm_cfg`` and ``conv_cfg`` of ``keys``; None if it can."""
        if not self.takes('norm_cfg'):
            return 'takes no norm_cfg'
        if 'conv_cfg' in keys and not self.takes('conv_cfg'):
            kind = keys['conv_cfg']['type']
            return f'takes no conv_cfg, which {_OF_NORMS.get(kind, kind)} need'
        norm_cfg = keys['norm_cfg']
        if needs_conv(norm_cfg) and (instead := self._instead_of_conv()):
            return f'normalizes the output of {instead}, and {norm_cfg["type"]} needs an ordinary convolution'
        return None

    def set(self, keys: Mapping) -> None:
        """Set those of ``keys`` that it takes; a centred convolution goes with its norm, a deformable one stays."""
        if name_of(self.cfg.get('conv_cfg')) == CENTRED['type']:
            del self.cfg['conv_cfg']
        if 'norm_cfg' in keys and self.cfg.get('norm') in self.norms_by_name:
            del self.cfg['norm']
        for key, value in copy.deepcopy(dict(keys)).items():
            if self.takes(key) and (key != 'conv_cfg' or self._conv_is_plain()):
                self.cfg[key] = value

    def place(self, keys: Mapping) -> None:
        """:meth:`set` those of a named choice. What another name put there goes, its convolution included."""
        self.drop_conv_of_norm()
        self.set(keys)

    def place_like_batch_norm(self, keys: Mapping) -> None:
        """:meth:`place`, with ``eps`` and ``momentum`` of the batch norm that was there, where they mean the same."""
        self.place(dict(keys, norm_cfg=self.like_batch_norm(keys['norm_cfg'])))

    def like_batch_norm(self, norm_cfg: Mapping) -> dict:
        """A copy of ``norm_cfg`` with ``eps`` and ``momentum`` of the part's batch norm, where they mean the same.

        An ``eps`` of 0, as NAS-FCOS has it for caffe's weights, is left out: the other norms refuse it.
        """
        before = (norm for norm in (self.norm, self.default('norm_cfg')) if isinstance(norm, Mapping))
        old = next((norm for norm in before if has_keys_of_batch_norm(norm)), {})
        kept = {key: old[key] for key in keys_of_batch_norm(norm_cfg) if old.get(key) and key not in norm_cfg}
        return copy.deepcopy(dict(norm_cfg, **kept))

    def drop_conv_of_norm(self) -> None:
        if name_of(self.cfg.get('conv_cfg')) in _OF_NORMS:
            del self.cfg['conv_cfg']

    def rename(self, name: str) -> None:
        """Another class. A config of classes may set no scope; our names are found without one, mmdet's are not."""
        plain = isinstance(self.cfg['type'], str) and '.' not in self.cfg['type']
        self.cfg['type'] = name if plain or name in MODELS.module_dict else f'mmdet.{name}'

    def _conv_is_plain(self) -> bool:
        """Whether another ``conv_cfg`` would change nothing but the weights' use."""
        conv = self.get('conv_cfg')
        return not isinstance(conv, Mapping) or name_of(conv) in _PLAIN_CONVS

    def _instead_of_conv(self) -> str | None:
        """What it has in front of a norm, if that is no ordinary convolution."""
        if not self._conv_is_plain():
            conv = self.get('conv_cfg')
            return f'conv_cfg={dict(conv, type=name_of(conv))}'
        switched_on = next((key for key in _DEFORMABLE if self.get(key)), None)
        return f'deformable convolutions ({switched_on})' if switched_on else _OTHER_THAN_CONV.get(self.name)


def parts_of(node: Any, path: str = '') -> Iterator[Part]:
    """One part of a detector, or each of several: a chain of necks, the heads of a cascade."""
    cfgs = node if isinstance(node, (list, tuple)) else [node]
    return (Part(cfg, path) for cfg in cfgs if isinstance(cfg, Mapping))


def all_parts(node: Any) -> Iterator[Part]:
    """Every dict in ``node`` that may describe layers, the outer ones first."""
    if isinstance(node, (list, tuple)):
        for entry in node:
            yield from all_parts(entry)
    elif isinstance(node, Mapping):
        yield Part(node)
        for key, value in list(node.items()):
            if key not in _NOT_SEARCHED:
                yield from all_parts(value)
