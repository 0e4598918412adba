"""Point a config at another COCO-format folder: paths, file layout and classes follow."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_norms.entries import class_of, is_a, mappings, name_of

from .annotations import DataError, class_order, other_order, read_annotations
from .checks import counted_classes
from .columns import is_id
from .layouts import ANNOTATIONS, images_folder, loose_files, other_format, split_names
from .parts import group_category, held_back, part_of, write_copy
from .sources import SPLITS, Source, datasets, evaluated_files, sources


class DataRootError(DataError):
    """A folder that holds no data set the config could read; the message says what was looked for."""


def use_data_root(
    cfg: Config,
    root: str,
    needed: tuple[str, ...] = SPLITS,
    val_fraction: float | None = None,
    copies: str | os.PathLike | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Make datasets and evaluators of ``cfg`` read the COCO-format folder ``root``; changes ``cfg`` in place.

    Strings that start with the config's old ``data_root`` move (a config has copied it to where it is needed, so
    setting ``data_root`` itself would change nothing), and so do absolute paths of other folders. Where the folder
    names its files in another common way, ``ann_file`` and ``data_prefix`` follow; the test split is the folder's own
    where it has a labelled one, else that of val. Where its annotations list other classes or another order, so do
    ``metainfo`` and the ``num_classes`` of the heads: the order of the training file.

    Args:
        needed: the splits that must be there.
        val_fraction: hold back that part of the training images to validate and test, for a folder with one file.
        copies: the folder for annotation files that have to be written for it; None: the file is read as it is, which
            is enough for the classes.
        options: keys of ``cfg`` that somebody has set, with their values: these stay.

    Returns:
        What was adapted besides the paths, one line each, for the log.

    Raises:
        DataRootError: the config has no ``data_root`` or a data set that does not read COCO's format, or the folder
            has no annotations of a split that is needed, or its splits list their classes in different orders.
    """
    return _Move(cfg, root, needed, val_fraction, copies, options or {}).run()


class _Move:
    """One call of :func:`use_data_root`."""

    def __init__(
        self, cfg: Config, root: str, needed: tuple, val_fraction: float | None, copies: Any, options: Mapping
    ) -> None:
        self.cfg, self.root, self.needed = cfg, Path(root).expanduser(), needed
        self.val_fraction, self.copies, self.options = val_fraction, copies, options
        self.notes: list[str] = []
        self.trained: dict[Path, str] = {}  # folder -> the file in it that is trained on

    def run(self) -> list[str]:
        cfg, root = self.cfg, self.root
        old = cfg.get('data_root')
        if not old and not sources(cfg):
            raise DataRootError(
                'the config has no data_root to replace; set train_dataloader.dataset.data_root and the '
                'like by --cfg-options'
            )
        _require_coco(cfg)
        if not root.is_dir():
            what = 'is a file; give the folder that holds annotations and images' if root.exists() else 'does not exist'
            raise DataRootError(f'the folder {root} {what}')
        for split in SPLITS:
            for key in (f'{split}_dataloader', f'{split}_evaluator'):
                if old and cfg.get(key) is not None:
                    cfg[key] = self._moved(cfg[key], old.rstrip('/'), key)
        cfg.data_root = f'{root}/'
        there, absent = self._find()
        if self.val_fraction is not None:
            self._hold_back(there)
        self._fit_classes(there, absent)
        for split in SPLITS:
            self.notes += self._fit_evaluators(split)
        return list(dict.fromkeys(self.notes))

    def _given(self, key: str) -> Any:
        """What an option says about a key of the config: about itself, or about a dict around it."""
        if key in self.options:
            return self.options[key]
        parts = key.split('.')
        for end in range(len(parts) - 1, 0, -1):
            value = self.options.get('.'.join(parts[:end]))
            for part in parts[end:]:
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None

    def _moved(self, node: object, old: str, key: str) -> object:
        if isinstance(node, str):
            inside = (node == old or node.startswith(f'{old}/')) and self._given(key) is None
            return str(self.root) + node[len(old) :] if inside else node
        if isinstance(node, dict):
            # the items() of a ConfigDict would import the classes that it names
            return type(node)({name: self._moved(value, old, f'{key}.{name}') for name, value in dict.items(node)})
        if isinstance(node, (list, tuple)):
            return type(node)(self._moved(value, old, f'{key}.{i}') for i, value in enumerate(node))
        return node

    # --------------------------------------------------------------------------------------------------------- files

    def _find(self) -> tuple[list[Source], list[tuple[Source, DataRootError]]]:
        """Let every data set read what the folder has; those that it can read, and those that it lacks with why."""
        there, absent = [], []
        for source in sources(self.cfg):
            try:
                self._fit_layout(source)
            except DataRootError as error:
                if source.split in self.needed:
                    raise
                self.notes.append(f'{source.split}: not there as a whole; nothing here reads it')
                if not os.path.isfile(source.ann_file):
                    absent.append((source, error))
                    continue
            there.append(source)
        return there, absent

    def _fit_layout(self, source: Source) -> None:
        """Find a split's annotations and images below the root, wherever the config has them."""
        dataset, split = source.entry, source.split
        if self._given(f'{source.key}.data_root') is not None:
            return  # another folder, for this data set alone
        ann_file, folder = dataset.get('ann_file') or '', (dataset.get('data_prefix') or {}).get('img')
        # a config may read several folders below its data_root
        below = _below(dataset.get('data_root') or self.root, self.root)
        base = self.root if below is None else self.root / below
        dataset['data_root'] = f'{base}/'
        given = self._given(f'{source.key}.ann_file')
        if given is not None:
            found, as_written = _named(f'{source.key}.ann_file', str(given), base), True
        else:
            own = _shortened(ann_file, base)
            found = self._annotations(base, split, own)
            as_written = found == own[0] and not (_below(ann_file, base) is None and os.path.isabs(ann_file))
        if found is None:  # nothing of an old folder stays, also where the split is not needed
            dataset['ann_file'] = own[0]
            if folder is not None:
                dataset['data_prefix'] = dict(dataset['data_prefix'], img=_shortened(folder, base)[0])
            raise DataRootError(_nothing_for(source, base, own))
        if not as_written:
            self.notes.append(f'{split}: annotations {found} (the config says {ann_file})')
        dataset['ann_file'] = found
        if split == 'train':
            self.trained.setdefault(base, found)
        if folder is None or self._given(f'{source.key}.data_prefix.img') is not None:
            return
        own = _shortened(folder, base)
        images, first, looked_in = images_folder(base, found, split if split == 'train' else 'val', own)
        if images is None and first:
            dataset['data_prefix'] = dict(dataset['data_prefix'], img=own[0])
            raise DataRootError(
                f'{base}: image {first} of {found} is in none of {", ".join(name or "./" for name in looked_in)}, '
                f'nor in another folder there; name its folder: --cfg-options {source.key}.data_prefix.img=FOLDER'
            )
        images = own[0] if images is None else images
        if images != folder and _below(folder, base) != images.rstrip('/'):
            self.notes.append(f'{split}: images {images or "./"} (the config says {folder})')
        dataset['data_prefix'] = dict(dataset['data_prefix'], img=images)

    def _annotations(self, base: Path, split: str, own: list[str]) -> str | None:
        """The annotation file of a split, relative to ``base``; None if there is none."""
        if split == 'test':
            labelled = (name for name in split_names('test') if (base / name).is_file())
            found = next((name for name in labelled if read_annotations(base / name).get('annotations')), None)
            if found is not None:
                return found
        split = 'train' if split == 'train' else 'val'
        names = [*own, *split_names(split)]
        found = next((name for name in names if (base / name).is_file()), None)
        if found is None:
            found = _only(loose_files(base, split))
        if found is None and split == 'val' and self.val_fraction is not None:
            found = self.trained.get(base) or self._annotations(base, 'train', [])
        return found

    def _hold_back(self, there: list[Source]) -> None:
        """``--val-fraction``: the images of the training file, divided."""
        trained = list(dict.fromkeys(source.ann_file for source in there if source.split == 'train'))
        if len(trained) != 1:
            raise DataRootError(
                f'--val-fraction divides the images of one training file, and there are {len(trained)}'
                f'{": " * bool(trained)}{", ".join(trained)}; leave it out'
            )
        (path,) = trained
        others = dict.fromkeys(s.ann_file for s in there if s.split == 'val' and s.ann_file != path)
        if others:
            raise DataRootError(
                f'--val-fraction {self.val_fraction}: there is a split to validate with, {next(iter(others))}; leave '
                'the option out'
            )
        content = read_annotations(path)
        try:
            val = held_back(content, self.val_fraction)
        except DataError as error:
            raise DataRootError(str(error)) from error
        if self.copies is None:
            return
        kept = {'train': set(range(len(content['images']))) - val, 'val': val}
        files = {part: write_copy(part_of(content, keep), path, self.copies, f'-{part}') for part, keep in kept.items()}
        for source in there:
            if source.ann_file == path:
                source.entry['ann_file'] = files['train' if source.split == 'train' else 'val']
        self.notes.append(
            f'{len(val)} of the {len(content["images"])} images of {os.path.basename(path)} are held back to validate, '
            f'the same ones every time (--val-fraction {self.val_fraction}); the run reads {files["train"]} and '
            f'{os.path.basename(files["val"])}'
        )

    # ------------------------------------------------------------------------------------------------------- classes

    def _fit_classes(self, there: list[Source], absent: list[tuple[Source, DataRootError]]) -> None:
        """The classes of the training file for all, in its order; the heads count them."""
        given = next(filter(None, (self._given(f'{s.key}.metainfo.classes') for s in sources(self.cfg))), None)
        given = tuple(given) if isinstance(given, (list, tuple)) else None
        contents = {source.ann_file: read_annotations(source.ann_file) for source in there}
        without = self._without_group(there, contents, given)
        order, first = None, None
        for source in there:
            content = without[source.ann_file]
            _require_names(content, source.ann_file)
            listed = class_order(content, by_id=source.sorts_by_id)
            if order is None:
                order, first = listed, source.ann_file
            self._fit_classes_of(source, order, given)
            difference = other_order(source.classes, [name for name in listed if name in source.classes])
            if difference and given is None:
                raise DataRootError(
                    f'{source.ann_file} {difference} as {first} has them; labels follow the order of the file, so list '
                    'the categories in one order in every file (their ids do not matter)'
                )
        for source, error in absent:
            if order is None:
                raise error
            self._fit_classes_of(source, order, given)

    def _fit_classes_of(self, source: Source, order: tuple[str, ...], given: tuple | None) -> None:
        if given is None:
            self.notes += _fit_classes(self.cfg, source, order)
            return
        if self._given(f'{source.key}.metainfo.classes') is None:
            source.entry['metainfo'] = dict(classes=given)
        counts = {count for _, count in counted_classes(self.cfg.get('model'))}
        if len(counts) == 1:
            set_num_classes(self.cfg.get('model'), counts.pop(), len(given))

    def _without_group(self, there: list[Source], contents: dict[str, dict], given: tuple | None) -> dict[str, dict]:
        """The files without Roboflow's name for the group of classes, which is no class.

        Where a class has the same name as the group, the data sets read a copy that lists it once: mmdet would number
        both.
        """
        group = group_category(list(contents.values()))
        if group is None:
            return contents
        names = [category.get('name') for category in next(iter(contents.values()))['categories']]
        alone = names.count(names[group]) == 1
        if given is not None and names[group] in given and alone:
            return contents
        self.notes.append(
            f'classes: without the first category, {names[group]}, which is the name of the group of the others and '
            'has no objects (Roboflow writes it)'
        )
        without = {path: part_of(content, drop=group) for path, content in contents.items()}
        if alone or self.copies is None:
            return without
        copies = {path: write_copy(content, path, self.copies) for path, content in without.items()}
        for source in there:
            source.entry['ann_file'] = copies[source.ann_file]
        return {copies[path]: content for path, content in without.items()}

    def _fit_evaluators(self, split: str) -> list[str]:
        """The COCO metrics of a split read the annotations that its data set reads."""
        found = sources(self.cfg, (split,))
        if len(found) != 1:
            return []
        notes, path = [], found[0].ann_file
        for key, metric, old in evaluated_files(self.cfg, split):
            if Path(old) != Path(path) and self._given(f'{key}.ann_file') is None:
                was_there = Path(old).is_file() and not self._given(f'{found[0].key}.ann_file')
                notes += [f'{split}: the evaluator reads {path} (the config says {old})'] if was_there else []
                metric['ann_file'] = path
        return notes


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


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _named(key: str, path: str, base: Path) -> str:
    """The file that an option names: in the folder, or from where the command runs."""
    if (base / path).is_file():
        return path
    if os.path.isfile(path):
        return os.path.abspath(path)
    raise DataRootError(f'--cfg-options {key}={path}: there is no such file, neither in {base} nor from here')


def _nothing_for(source: Source, base: Path, own: list[str]) -> str:
    """That a split is not there: what was looked for, and what may be done about it."""
    split = 'train' if source.split == 'train' else 'val'
    names = ', '.join(dict.fromkeys([*own, *(pattern.format(split=split) for pattern in ANNOTATIONS)]))
    also = {'train': '', 'val': ' (val may be called valid or validation)'}[split]
    message = f'{base} has no annotations for {split}, looked for {names}{also}'
    by_option = f'--cfg-options {source.key}.ann_file=FILE'
    loose = loose_files(base, split)
    if len(loose) > 1:
        listed = f'{", ".join(loose[:6])}{", ..." * (len(loose) > 6)}'
        return (
            f'{message}. It has {len(loose)} annotation files, {listed}, and no name says which; name it: {by_option}'
        )
    if split == 'train':
        message += ', and one *.json of all images here or in annotations/'
    trained = [*(name for name in split_names('train') if (base / name).is_file()), *loose_files(base, 'train')]
    if split == 'val' and trained:
        what = 'test' if source.split == 'test' else 'validate'
        return (
            f'{message}. To hold back a part of the images of {trained[0]}: --val-fraction 0.2, in training and in '
            f'tests alike. To {what} with another file: {by_option}'
        )
    found = other_format(base)
    return f'{message}. {found}' if found else f'{message}; give a folder in COCO format, or name the file: {by_option}'


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
    for _, part in mappings(node):
        if part.get('num_classes') == old:
            part['num_classes'] = new
