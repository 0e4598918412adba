"""Which data a config reads: the files, classes and needs of its data sets and evaluators."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.fileio import list_from_file

from mmdet_norms.entries import class_of, is_a, name_of

SPLITS = ('train', 'val', 'test')
# mmcv reads a photo as its EXIF orientation says, except by these.
_STORED_FLAGS = ('unchanged', 'color_ignore_orientation', 'grayscale_ignore_orientation')
_STORED_BACKENDS = ('turbojpeg', 'tifffile')


def datasets(node: object) -> Iterator[dict]:
    """The dataset configs within wrappers such as RepeatDataset and ConcatDataset."""
    for _, entry in located(node, ''):
        yield entry


def located(node: object, key: str) -> Iterator[tuple[str, dict]]:
    """The same with the key of each in the config."""
    if isinstance(node, (list, tuple)):
        for i, entry in enumerate(node):
            yield from located(entry, f'{key}.{i}')
    elif isinstance(node, Mapping):
        if 'ann_file' in node or is_a(node, 'CocoDataset', DATASETS):
            yield key, node
        for name in ('dataset', 'datasets'):
            yield from located(node.get(name), f'{key}.{name}')


def metainfo_of(dataset: Mapping) -> dict:
    """What a dataset config says of its classes and their colours, itself or by its class."""
    return {**(getattr(class_of(dataset, DATASETS), 'METAINFO', None) or {}), **(dataset.get('metainfo') or {})}


def metrics(cfg: Mapping, split: str) -> list[tuple[str, dict]]:
    """Key and config of every metric of a split's evaluator."""
    evaluator = cfg.get(f'{split}_evaluator')
    if isinstance(evaluator, Mapping) and isinstance(evaluator.get('metrics'), (list, tuple)):
        return [
            (f'{split}_evaluator.metrics.{i}', m) for i, m in enumerate(evaluator['metrics']) if isinstance(m, Mapping)
        ]
    if isinstance(evaluator, (list, tuple)):
        return [(f'{split}_evaluator.{i}', m) for i, m in enumerate(evaluator) if isinstance(m, Mapping)]
    return [(f'{split}_evaluator', evaluator)] if isinstance(evaluator, Mapping) else []


@dataclass
class Source:
    """One data set of a config: what it reads and how.

    Args:
        split: train, val or test.
        key: where the config has it, such as ``train_dataloader.dataset``.
        entry: its config.
    """

    split: str
    key: str
    entry: dict

    @property
    def skipped(self) -> str | None:
        """Why the data cannot be checked; None if they can."""
        cls, coco = class_of(self.entry, DATASETS), class_of('CocoDataset', DATASETS)
        if not is_a(self.entry, 'CocoDataset', DATASETS):
            return f'{name_of(self.entry, DATASETS)} reads another format than COCO instances'
        own = [
            name
            for name in ('load_data_list', 'parse_data_info', 'COCOAPI')
            if getattr(cls, name, None) is not getattr(coco, name)
        ]
        if own and not self.sorts_by_id:
            return f'{name_of(self.entry, DATASETS)} reads its files in a way of its own ({", ".join(own)})'
        if self.classes is None:
            return f'{name_of(self.entry, DATASETS)} names its classes only when it is built'
        backend = self.entry.get('backend_args') or {}
        if '://' in str(self.ann_file) or backend.get('backend', 'local') != 'local':
            return f'{self.ann_file} is not a local file'
        return None

    @property
    def sorts_by_id(self) -> bool:
        """Objects365 v1 sorts its categories before it numbers them; all others take them as the file lists them."""
        return name_of(self.entry, DATASETS) == 'Objects365V1Dataset'

    @property
    def ann_file(self) -> str:
        """The path that the data set opens; empty if it has none."""
        return self._joined(self.entry['ann_file']) if self.entry.get('ann_file') else ''

    @property
    def images(self) -> str:
        """The folder of its images."""
        return self._joined((self.entry.get('data_prefix') or {}).get('img') or '')

    def _joined(self, path: Any) -> str:
        path, root = str(path), self.entry.get('data_root') or ''
        return path if not root or '://' in path else os.path.join(root, path)

    @property
    def classes(self) -> Any:
        """What the data set takes as its classes: a list of names, unless the config is wrong."""
        given = (self.entry.get('metainfo') or {}).get('classes')
        if given is None:
            given = getattr(class_of(self.entry, DATASETS), 'METAINFO', {}).get('classes')
        if isinstance(given, str) and Path(given).is_file():  # mmengine reads it line by line
            return list_from_file(given)
        return given

    @property
    def own_classes(self) -> bool:
        """Whether the config names the classes, rather than the data set's class."""
        return (self.entry.get('metainfo') or {}).get('classes') is not None

    @property
    def is_test(self) -> bool:
        """Whether every image is used, with or without objects."""
        return bool(self.entry.get('test_mode', False))

    @property
    def filter_cfg(self) -> Mapping:
        """Which images are left out in training."""
        return {} if self.is_test else (self.entry.get('filter_cfg') or {})

    @property
    def mask_key(self) -> str | None:
        """The key of the transform that loads masks, if one does."""
        found = (i for i, step in enumerate(self._pipeline) if step.get('with_mask'))
        return next((f'{self.key}.pipeline.{i}' for i in found), None)

    @property
    def loader(self) -> tuple[str, dict] | None:
        """Key and config of the transform that reads the image."""
        found = (
            (f'{self.key}.pipeline.{i}', step)
            for i, step in enumerate(self._pipeline)
            if 'ImageFrom' in str(getattr(step.get('type'), '__name__', step.get('type')))
        )
        return next(found, None)

    @property
    def turns_photos(self) -> bool:
        """Whether the image is turned as its EXIF orientation says."""
        step = self.loader[1] if self.loader else {}
        flag, backend = step.get('color_type', 'color'), step.get('imdecode_backend', 'cv2')
        return flag not in _STORED_FLAGS and backend not in _STORED_BACKENDS

    @property
    def _pipeline(self) -> list[dict]:
        pipeline = self.entry.get('pipeline') or []
        return [step if isinstance(step, Mapping) else {} for step in pipeline]


def sources(cfg: Config, splits: tuple[str, ...] = SPLITS) -> list[Source]:
    """The data sets that the given splits of a config read."""
    return [
        Source(split, key, entry)
        for split in splits
        for key, entry in located((cfg.get(f'{split}_dataloader') or {}).get('dataset'), f'{split}_dataloader.dataset')
    ]


def evaluated_files(cfg: Config, split: str) -> list[tuple[str, dict, str]]:
    """Key, config and annotation file of the COCO metrics of a split that read one of their own."""
    return [
        (key, metric, str(metric['ann_file']))
        for key, metric in metrics(cfg, split)
        if is_a(metric, 'CocoMetric', METRICS) and not is_a(metric, 'LVISMetric', METRICS) and metric.get('ann_file')
    ]


def wants_masks(metric: Mapping) -> bool:
    """Whether a COCO metric compares masks."""
    kinds = metric.get('metric') or 'bbox'
    return 'segm' in ([kinds] if isinstance(kinds, str) else kinds)
