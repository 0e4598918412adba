"""Point a config at another COCO-format folder: paths, file layout and classes follow."""

import os
from collections import Counter
from pathlib import Path

from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_norms.entries import class_of, is_a, name_of

from .annotations import DataError, class_order, other_order, read_annotations
from .columns import is_id
from .sources import SPLITS, Source, datasets, evaluated_files, sources

# Where COCO and common exports of it keep a split's files, relative to the root.
_ANNOTATIONS = (
    'annotations/instances_{split}2017.json',
    'annotations/instances_{split}.json',
    'annotations/{split}.json',
    '{split}.json',
    '{split}/_annotations.coco.json',  # Roboflow's exports, which call val valid
    'valid/_annotations.coco.json',
)
_IMAGES = ('{split}2017/', '{split}/', 'images/{split}2017/', 'images/{split}/', 'images/', 'valid/', '')


class DataRootError(DataError):
    """A folder that holds no data set the config could read; the message says what was looked for."""


def use_data_root(cfg: Config, root: str, needed: tuple[str, ...] = SPLITS) -> list[str]:
    """Make datasets and evaluators of ``cfg`` read the COCO-format folder ``root``; changes ``cfg`` in place.

    Strings that start with the config's old ``data_root`` move (a config has copied it to where it is needed, so
    setting ``data_root`` itself would change nothing), and so do absolute paths of other folders. Where the folder
    names its files in another common way, ``ann_file`` and ``data_prefix`` follow. Where its annotations list other
    classes or another order, so do ``metainfo`` and the ``num_classes`` of the heads: the order of the training file.

    Returns:
        What was adapted besides the paths, one line each, for the log.

    Raises:
        DataRootError: the config has no ``data_root`` or a data set that does not read COCO's format, or the folder
            has no annotations of a split that is needed, or its splits list their classes in different orders.
    """
    old = cfg.get('data_root')
    if not old and not sources(cfg):
        raise DataRootError(
            'the config has no data_root to replace; set train_dataloader.dataset.data_root and the '
            'like by --cfg-options'
        )
    _require_coco(cfg)
    root = Path(root).expanduser()
    if not root.is_dir():
        what = 'is a file; give the folder that holds annotations and images' if root.exists() else 'does not exist'
        raise DataRootError(f'the folder {root} {what}')
    for split in SPLITS:
        for key in (f'{split}_dataloader', f'{split}_evaluator'):
            if old and cfg.get(key) is not None:
                cfg[key] = _moved(cfg[key], old.rstrip('/'), str(root))
    cfg.data_root = f'{root}/'

    notes, order, first, absent = [], None, None, []
    for source in sources(cfg):
        try:
            notes += _fit_layout(source, root)
        except DataRootError as error:
            if source.split in needed:
                raise
            notes.append(f'{source.split}: not there as a whole; nothing here reads it')
            if not os.path.isfile(source.ann_file):
                absent.append((source, error))
                continue
        content = read_annotations(source.ann_file)
        _require_names(content, source.ann_file)
        listed = class_order(content, by_id=source.sorts_by_id)
        if order is None:
            order, first = listed, source.ann_file
        notes += _fit_classes(cfg, source, order)
        difference = other_order(source.classes, [name for name in listed if name in source.classes])
        if difference:
            raise DataRootError(
                f'{source.ann_file} {difference} as {first} has them; labels follow the order of the file, so list the '
                'categories in one order in every file (their ids do not matter)'
            )
    for source, error in absent:
        if order is None:
            raise error
        notes += _fit_classes(cfg, source, order)
    for split in SPLITS:
        notes += _fit_evaluators(cfg, split)
    return list(dict.fromkeys(notes))


def _require_coco(cfg: Config) -> None:
    for split in SPLITS:
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


def _fit_layout(source: Source, root: Path) -> list[str]:
    """Find a split's annotations and images below ``root``, wherever the config has them."""
    dataset, split = source.entry, 'train' if source.split == 'train' else 'val'
    ann_file, folder = dataset.get('ann_file') or '', (dataset.get('data_prefix') or {}).get('img')
    below = _below(dataset.get('data_root') or root, root)  # a config may read several folders below its data_root
    base = root if below is None else root / below
    dataset['data_root'] = f'{base}/'

    notes = []
    names = [*_shortened(ann_file, base), *_common(_ANNOTATIONS, split)]
    found = next((name for name in names if (base / name).is_file()), None)
    if found is None:  # nothing of an old folder stays, also where the split is not needed
        dataset['ann_file'] = names[0]
        if folder is not None:
            dataset['data_prefix'] = dict(dataset['data_prefix'], img=_shortened(folder, base)[0])
        raise DataRootError(
            f'{base} has no annotations for {split}, looked for {", ".join(dict.fromkeys(names))}; give a folder in '
            'COCO format, or name the file: --cfg-options ' + f'{source.key}.ann_file=FILE'
        )
    if found != names[0] or (_below(ann_file, base) is None and os.path.isabs(ann_file)):
        notes.append(f'{split}: annotations {found} (the config says {ann_file})')
    dataset['ann_file'] = found
    first = next(iter(read_annotations(base / found)['images']), {}).get('file_name')
    if folder is not None and isinstance(first, str):
        names = [*_shortened(folder, base), *_common(_IMAGES, split)]
        images = next((name for name in names if (base / name / first).is_file()), None)
        if images is None:
            dataset['data_prefix'] = dict(dataset['data_prefix'], img=names[0])
            raise DataRootError(
                f'{base}: image {first} of {found} is in none of {", ".join(name or "./" for name in names)}; name its '
                f'folder: --cfg-options {source.key}.data_prefix.img=FOLDER'
            )
        if images != folder and _below(folder, base) != images.rstrip('/'):
            notes.append(f'{split}: images {images or "./"} (the config says {folder})')
        dataset['data_prefix'] = dict(dataset['data_prefix'], img=images)
    return notes


def _common(patterns: tuple[str, ...], split: str) -> list[str]:
    return [pattern.format(split=split) for pattern in patterns if split == 'val' or not pattern.startswith('valid/')]


def _require_names(content: dict, path: str) -> None:
    if not content['categories']:
        raise DataRootError(f'{path} has no categories; list every class as dict(id=1, name=...)')
    names = [category.get('name') for category in content['categories']]
    bad = next((i for i, name in enumerate(names) if not is_id(name)), None)
    if bad is not None:
        raise DataRootError(f'{path}: category {bad} of the list has no name, but {names[bad]!r:.60}; write a text')
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice is not None:
        raise DataRootError(f'{path} has two categories of the name {twice}; every category needs one of its own')


def _shortened(path: str, base: Path) -> list[str]:
    """A path relative to ``base``; of an absolute one elsewhere, its last parts."""
    if not os.path.isabs(path) and _below(path, base) is None:
        return [path]
    inside = _below(path, base)
    if inside is not None:
        return [inside]
    parts = Path(path).parts[1:]
    return ['/'.join(parts[-n:]) for n in (2, 1) if len(parts) >= n]


def _below(path: str | os.PathLike, base: Path) -> str | None:
    """``path`` relative to ``base``, if it is written as one below it."""
    try:
        return Path(path).relative_to(base).as_posix()
    except ValueError:
        return None


def _fit_classes(cfg: Config, source: Source, order: tuple[str, ...]) -> list[str]:
    """The config's classes if the training file has all of them, else the file's; in the file's order."""
    dataset, known = source.entry, source.classes
    known = (known,) if isinstance(known, str) else tuple(known or ())
    own = known and set(known) <= set(order)
    classes = tuple(name for name in order if name in known) if own else order
    if classes == known and not isinstance(source.classes, str):
        return []
    if is_a(dataset, 'CocoPanopticDataset', DATASETS):
        raise DataRootError(
            f'{dataset["ann_file"]} lists other classes than the config, and which of them are things and which are '
            'stuff is not known; set metainfo of the data sets and the numbers of classes in the config'
        )
    dataset['metainfo'] = dict(classes=classes)
    if own:
        return [f'classes: in the order of the annotations, {", ".join(classes[:6])}{", ..." * (len(classes) > 6)}']
    set_num_classes(cfg.get('model'), len(known), len(classes))
    return [f'classes: {len(classes)} of the annotations (the config has {len(known)})']


def set_num_classes(node: object, old: int, new: int) -> None:
    """In every head that counted the old classes; an RPN counts none."""
    if isinstance(node, dict):
        if node.get('num_classes') == old:
            node['num_classes'] = new
        for value in node.values():
            set_num_classes(value, old, new)
    elif isinstance(node, (list, tuple)):
        for value in node:
            set_num_classes(value, old, new)


def _fit_evaluators(cfg: Config, split: str) -> list[str]:
    """The COCO metrics of a split read the annotations that its data set reads."""
    found = sources(cfg, (split,))
    if len(found) != 1:
        return []
    notes, path = [], found[0].ann_file
    for _, metric, old in evaluated_files(cfg, split):
        if Path(old) != Path(path):
            notes += [f'{split}: the evaluator reads {path} (the config says {old})'] if Path(old).is_file() else []
            metric['ann_file'] = path
    return notes
