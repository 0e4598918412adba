"""Point a config at another COCO-format folder: paths, file layout and classes follow."""

import json
from collections.abc import Iterator
from pathlib import Path

from mmdet.registry import DATASETS
from mmengine.config import Config

from ..entries import class_of, is_a, name_of

# Where COCO and common exports of it keep a split's files, relative to the root.
_ANNOTATIONS = (
    'annotations/instances_{split}2017.json',
    'annotations/instances_{split}.json',
    'annotations/{split}.json',
    '{split}.json',
)
_IMAGES = ('{split}2017/', '{split}/', 'images/{split}2017/', 'images/{split}/', 'images/', '')


class DataRootError(ValueError):
    """A folder that holds no data set the config could read; the message says what was looked for."""


def use_data_root(cfg: Config, root: str) -> list[str]:
    """Make datasets and evaluators of ``cfg`` read the COCO-format folder ``root``; changes ``cfg`` in place.

    Strings that start with the config's old ``data_root`` move (a config has copied it to where it is needed, so
    setting ``data_root`` itself would change nothing). Where the folder names its files in another common way,
    ``ann_file`` and ``data_prefix`` follow, and where its annotations list other classes, so do ``metainfo`` and the
    ``num_classes`` of the heads.

    Returns:
        What was adapted besides the paths, one line each, for the log.

    Raises:
        DataRootError: the config has no ``data_root`` or a data set that does not read COCO's format, or the folder
            has no annotations of a split.
    """
    old = cfg.get('data_root')
    if not old:
        raise DataRootError(
            'the config has no data_root to replace; set train_dataloader.dataset.data_root and the '
            'like by --cfg-options'
        )
    _require_coco(cfg)
    root = Path(root)
    for split in ('train', 'val', 'test'):
        for key in (f'{split}_dataloader', f'{split}_evaluator'):
            if cfg.get(key) is not None:
                cfg[key] = _moved(cfg[key], old.rstrip('/'), str(root))
    cfg.data_root = f'{root}/'

    notes, classes = [], None
    for split in ('train', 'val', 'test'):
        for dataset in datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset')):
            notes += _fit_layout(dataset, root, 'train' if split == 'train' else 'val')
            classes = classes or _class_names(root / dataset['ann_file'])
            notes += _fit_classes(cfg, dataset, classes)
        _fit_evaluators(cfg, split, root)
    return list(dict.fromkeys(notes))


def datasets(node: object) -> Iterator[dict]:
    """The dataset configs within wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(node, (list, tuple)):
        for entry in node:
            yield from datasets(entry)
    elif isinstance(node, dict):
        if 'ann_file' in node:
            yield node
        yield from datasets(node.get('dataset'))
        yield from datasets(node.get('datasets'))


def _require_coco(cfg: Config) -> None:
    for split in ('train', 'val', 'test'):
        entry = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
        found = list(datasets(entry))
        others = [dataset for dataset in found if not is_a(dataset, 'CocoDataset', DATASETS)]
        if others or (entry and not found):
            wrong = others[0] if others else entry
            name = name_of(wrong, DATASETS)
            if class_of(wrong, DATASETS) is None:
                raise DataRootError(
                    f'{split}_dataloader reads a {name}, which nobody registered; name its module in custom_imports'
                )
            raise DataRootError(
                f'{split}_dataloader reads a {name}, which is no CocoDataset: its folders are laid out in another way '
                'and have no annotation file in COCO format. Take a config whose data sets are of type CocoDataset, or '
                f'set the data_root of its data sets by --cfg-options'
            )


def _moved(node: object, old: str, new: str) -> object:
    if isinstance(node, str):
        return new + node[len(old) :] if node == old or node.startswith(f'{old}/') else node
    if isinstance(node, dict):
        # the items() of a ConfigDict would import the classes that it names
        return type(node)({key: _moved(value, old, new) for key, value in dict.items(node)})
    if isinstance(node, (list, tuple)):
        return type(node)(_moved(value, old, new) for value in node)
    return node


def _fit_layout(dataset: dict, root: Path, split: str) -> list[str]:
    notes = []
    if not (root / dataset['ann_file']).is_file():
        names = [pattern.format(split=split) for pattern in _ANNOTATIONS]
        found = next((name for name in names if (root / name).is_file()), None)
        if found is None:
            looked_for = ', '.join(dict.fromkeys([dataset['ann_file'], *names]))
            raise DataRootError(
                f'{root} has no annotations for {split}, looked for {looked_for}; give a folder in '
                'COCO format, or set ann_file by --cfg-options'
            )
        notes.append(f'{split}: annotations {found} (the config says {dataset["ann_file"]})')
        dataset['ann_file'] = found
    prefix = dataset.get('data_prefix') or {}
    first = next(iter(_read(root / dataset['ann_file'])['images']), None)
    if first is not None and 'img' in prefix and not (root / prefix['img'] / first['file_name']).is_file():
        names = [pattern.format(split=split) for pattern in _IMAGES]
        found = next((name for name in names if (root / name / first['file_name']).is_file()), None)
        if found is None:
            raise DataRootError(
                f'{root}: image {first["file_name"]} of {dataset["ann_file"]} is in none of '
                f'{prefix["img"]}, {", ".join(name or "./" for name in names)}'
            )
        notes.append(f'{split}: images {found or "./"} (the config says {prefix["img"]})')
        dataset['data_prefix'] = dict(prefix, img=found)
    return notes


def _class_names(annotations: Path) -> tuple[str, ...]:
    return tuple(category['name'] for category in sorted(_read(annotations)['categories'], key=lambda c: c['id']))


def _fit_classes(cfg: Config, dataset: dict, classes: tuple[str, ...]) -> list[str]:
    metainfo = dataset.get('metainfo') or {}
    known = metainfo.get('classes') or class_of(dataset, DATASETS).METAINFO.get('classes', ())
    if set(known) <= set(classes):
        return []
    if is_a(dataset, 'CocoPanopticDataset', DATASETS):
        raise DataRootError(
            f'{dataset["ann_file"]} lists other classes than the config, and which of them are things and which are '
            'stuff is not known; set metainfo of the data sets and the numbers of classes in the config'
        )
    dataset['metainfo'] = dict(classes=classes)
    _set_num_classes(cfg.model, len(known), len(classes))
    return [f'classes: {len(classes)} of the annotations (the config has {len(known)})']


def _set_num_classes(node: object, old: int, new: int) -> None:
    """In every head that counted the old classes; an RPN counts none."""
    if isinstance(node, dict):
        if node.get('num_classes') == old:
            node['num_classes'] = new
        for value in node.values():
            _set_num_classes(value, old, new)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _set_num_classes(value, old, new)


def _fit_evaluators(cfg: Config, split: str, root: Path) -> None:
    """The evaluator reads the annotations of its own split's dataset."""
    dataset = next(datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset')), None)
    evaluators = cfg.get(f'{split}_evaluator')
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        stale = evaluator and evaluator.get('ann_file') and not Path(evaluator['ann_file']).is_file()
        if dataset is not None and stale:
            evaluator['ann_file'] = str(root / dataset['ann_file'])


def _read(path: Path) -> dict:
    with path.open(encoding='utf-8') as file:
        return json.load(file)
