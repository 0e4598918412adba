"""What can be said about a config before anything is built: unknown keys and names, metrics that cannot be had.

Each check gives its findings as sentences; the tools stop at them, and ``tools/check.py`` lists them all.
"""

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from mmdet.registry import METRICS
from mmengine.config import Config

from mmdet_norms.engine.optim import is_second_order, optimizer_problems
from mmdet_norms.entries import class_of, is_a, is_classifier, mappings, name_of
from mmdet_norms.errors import UserError
from mmdet_norms.layers import NORMS
from mmdet_norms.layers._args import NOT_GROUPED

KINDS = ('bbox', 'segm', 'proposal', 'proposal_fast')
"""What ``CocoMetric`` evaluates."""

_MASK_TYPES = ('MaskFormer', 'Mask2Former', 'RTMDetIns')  # masks without anything called a mask head
_NOT_BY_CLASS = " (torch's class does not take it: write type='BN', or the class mmdet_norms.layers.GhostBN)"
_CHANNELS = ('num_features', 'num_channels', 'normalized_shape')  # what the host gives, by any name


def config_problems(cfg: Config, splits: tuple[str, ...] = ('val', 'test')) -> list[str]:
    """Everything that the checks of this module find, one sentence each.

    Args:
        splits: whose evaluators count.
    """
    problems = list(norm_problems(cfg.get('model'), 'model'))
    for split in splits:
        problems += metric_problems(cfg, split)
    return problems


def training_problems(cfg: Config, splits: tuple[str, ...] = ('val', 'test')) -> list[str]:
    """:func:`config_problems`, and what only a training would meet."""
    wrapper = cfg.get('optim_wrapper')
    wrapper = wrapper if isinstance(wrapper, Mapping) else {}
    problems = [*config_problems(cfg, splits), *optimizer_problems(wrapper.get('optimizer'))]
    if cfg.get('compile') and is_second_order(wrapper):  # torch would say so itself, after minutes of compiling
        problems.append(
            f'compile={cfg.compile!r}: compiled code is differentiable once, and AdaHessian (optim_wrapper.optimizer) '
            'differentiates twice; write compile=False'
        )
    return problems


def require_none(problems: list[str]) -> None:
    """Raise a :class:`UserError` if there are problems: the first, and how many more there are."""
    if problems:
        more = f' (and {len(problems) - 1} more of this kind)' if len(problems) > 1 else ''
        raise UserError(f'{problems[0]}{more}')


def norm_problems(node: Any, path: str) -> Iterator[str]:
    """Each ``norm_cfg`` with a key that its norm does not take, most often one inherited from the base config."""
    if isinstance(node, (list, tuple)):
        for i, entry in enumerate(node):
            yield from norm_problems(entry, f'{path}.{i}')
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if key == 'norm_cfg' or path.endswith('.norm_at'):
                for i, norm_cfg in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                    where = f'{path}.{key}.{i}' if isinstance(value, (list, tuple)) else f'{path}.{key}'
                    yield from _unknown_keys(norm_cfg, where)
            else:
                yield from norm_problems(value, f'{path}.{key}')


def _unknown_keys(norm_cfg: Any, path: str) -> Iterator[str]:
    if not isinstance(norm_cfg, Mapping) or norm_cfg.get('type') is None:
        return
    name = name_of(norm_cfg)
    # A class is called as it is; the name is batch norm's, or with a norm_batch that of groups: see registry.py.
    grouped = name == 'BN' and 'norm_batch' in norm_cfg and isinstance(norm_cfg['type'], str)
    valid = _keys_of(NORMS['GhostBN'] if grouped else NORMS.get(name) or class_of(norm_cfg))
    unknown = [] if valid is None else [key for key in norm_cfg if key not in (*valid, 'type', '_scope_')]
    if unknown:
        key = unknown[0]
        close = difflib.get_close_matches(key, valid, n=1)
        hint = _NOT_BY_CLASS if key == 'norm_batch' and name == 'BN' else NOT_GROUPED if key == 'norm_batch' else ''
        hint = hint or (f' (did you mean {close[0]!r}?)' if close else '')
        kept = ', '.join(f'{k}={v!r}' for k, v in norm_cfg.items() if k not in (*unknown, 'type'))
        yield (
            f'{path} of type {name!r} has an unknown key {key}={norm_cfg[key]!r}{hint}; valid keys: {", ".join(valid)}'
            '. If the key comes from the base config, with whose dict yours is merged, write '
            f'{path.rpartition(".")[2]}=dict(_delete_=True, type={name!r}{", " if kept else ""}{kept})'
        )


def _keys_of(cls: Any) -> list[str] | None:
    """Keys of a norm_cfg beside the type; None where a class takes whatever it is given, or is not known."""
    keys = []
    for base in cls.__mro__ if inspect.isclass(cls) else ():
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        keys += [key for key in named if key not in ('self', *_CHANNELS, *keys)]
        if cls in NORMS.values() or not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return [*keys, *(key for key in ('requires_grad', 'eps') if key not in keys)]  # mmcv gives an eps itself
    return None


def metric_problems(cfg: Config, split: str) -> Iterator[str]:
    """Each metric of ``{split}_evaluator`` that would fail after the epoch that it is to judge."""
    evaluator, model = cfg.get(f'{split}_evaluator') or [], cfg.get('model') or {}
    several = isinstance(evaluator, (list, tuple))
    for i, entry in enumerate(evaluator if several else [evaluator]):
        where = f'{split}_evaluator.{i}' if several else f'{split}_evaluator'
        coco = is_a(entry, 'CocoMetric', METRICS)
        if is_classifier(model) and coco:
            yield (
                f'{where}.type={name_of(entry, METRICS)!r} compares boxes, and the model is an image classifier; '
                f"write {where}=dict(type='Accuracy')"
            )
        elif is_a(entry, 'Accuracy', METRICS) and _is_stock(model) and not is_classifier(model):
            yield f"{where}.type='Accuracy' is for image classifiers, and the model is {name_of(model)}"
        if is_classifier(model) or not coco:
            continue
        where = f'{where}.metric'
        given = entry.get('metric', 'bbox')
        kinds = [given] if isinstance(given, str) else list(given or [])
        good = [kind for kind in kinds if kind in KINDS and (kind != 'segm' or predicts_masks(model))] or ['bbox']
        write = f'write {where}={good[0] if len(good) == 1 else good}'
        for kind in kinds:
            if kind not in KINDS:
                yield f'{where}={given!r}: {kind!r} is no metric, choose from {", ".join(KINDS)}; {write}'
            elif kind == 'segm' and _is_stock(model) and not predicts_masks(model):
                yield f'{where}={given!r}: the model predicts boxes only, it has no mask head; {write}'


def predicts_masks(model_cfg: Mapping) -> bool:
    """Whether a model config describes an instance segmentor: has a mask head, or a head that is one."""
    return any(
        value is not None
        if 'mask' in key and 'head' in key
        else key == 'type' and any(word in name for name in _names(value) for word in _MASK_TYPES)
        for key, value in _items(model_cfg)
    )


def _is_stock(model_cfg: Mapping) -> bool:
    """Whether detector and heads are mmdet's or ours: what those of others predict is not known."""
    kinds = [class_of(model_cfg)]
    kinds += [class_of(value) for key, value in _items(model_cfg) if key.endswith('head') and isinstance(value, dict)]
    return all((getattr(kind, '__module__', None) or '').startswith(('mmdet.', 'mmdet_norms.')) for kind in kinds)


def _names(kind: object) -> list[str]:
    """Of the class that a type names, and of those that it is a subclass of."""
    return [name_of(kind), *(cls.__name__ for cls in getattr(class_of(kind), '__mro__', ()))]


def _items(node: object) -> Iterator[tuple]:
    """All (key, value) pairs of a nested config."""
    return (item for _, entry in mappings(node) for item in entry.items())
