"""Point a classifier's config at another folder of classes: paths, names of splits and classes follow."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..datasets.annotations import DataError
from ..datasets.locate import DataRootError
from ..datasets.parts import held_back
from ..datasets.sources import SPLITS
from ..files import replacing
from .image_folder import ImageFolder, classes_of_entry, folders_in, image_folders, problems_of

# What folders of splits are called: the first that is there.
_NAMES = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'test'),
    'test': ('test', 'val', 'valid', 'validation'),
}


def use_class_folders(
    cfg: Config,
    root: str,
    needed: tuple[str, ...] = SPLITS,
    val_fraction: float | None = None,
    copies: str | os.PathLike | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Make every :class:`ImageFolder` of ``cfg`` read ``root``; changes ``cfg`` in place.

    ``root`` holds a folder for each split, with a folder for each class, or (with ``val_fraction``) folders of classes.
    The test split is the folder's own where it has one with classes, else that of val. The classes are those of the
    training folder, and the head and the preprocessor count them.

    Args:
        needed: the splits that must be there.
        val_fraction: hold back that part of the training images of each class to validate and test, where there is no
            such folder; the same images every time.
        copies: the folder for the lists of images that this writes; None: all images are read, which is enough for the
            classes.
        options: keys of ``cfg`` that somebody has set: these stay.

    Returns:
        What was adapted besides the paths, one line each, for the log.

    Raises:
        DataRootError: there is no such folder, or it has not the folders that were looked for.
    """
    return _Move(cfg, root, needed, val_fraction, copies, options or {}).run()


class _Move:
    """One call of :func:`use_class_folders`."""

    def __init__(
        self, cfg: Config, root: str, needed: tuple, val_fraction: float | None, copies: Any, options: Mapping
    ) -> None:
        self.cfg, self.root, self.needed = cfg, Path(root).expanduser(), needed
        self.val_fraction, self.copies, self.options = val_fraction, copies, options
        self.notes: list[str] = []

    def run(self) -> list[str]:
        root = self.root
        if not root.is_dir():
            what = 'is a file; give the folder that holds train/ and val/' if root.exists() else 'does not exist'
            raise DataRootError(f'the folder {root} {what}')
        entries = list(image_folders(self.cfg, *SPLITS))
        before = next((len(names) for _, _, entry in entries if (names := _classes_of(entry))), None)
        train = self._split('train', 'train')
        val = self._split('val', 'val')
        if self.val_fraction is not None and val is not None:
            raise DataRootError(
                f'--val-fraction {self.val_fraction}: there is a split to validate with, {root / val}; leave the '
                'option out'
            )
        lists = self._hold_back(train) if self.val_fraction is not None else {}
        for split, key, entry in entries:
            if self._is_given(f'{key}.data_root'):
                continue  # another folder, for this data set alone
            self._move(split, key, entry, train, lists)
        self.cfg.data_root = f'{root}/'
        self._fit_classes([(key, entry) for _, key, entry in entries], before)
        return list(dict.fromkeys(self.notes))

    def _is_given(self, key: str) -> bool:
        """Whether an option has set a key of the config, or a dict around it."""
        parts = key.split('.')
        return any('.'.join(parts[:end]) in self.options for end in range(1, len(parts) + 1))

    def _split(self, split: str, written: str) -> str | None:
        """The folder of a split: as the config calls it, or as others do; '' where the root holds the classes."""
        names = ('test', written, *_NAMES['test']) if split == 'test' else (written, *_NAMES[split])
        found = next((name for name in names if folders_in(self.root / name)), None)
        return '' if found is None and split == 'train' and self._is_flat() else found

    def _is_flat(self) -> bool:
        """Whether the root holds folders of classes, and none of splits."""
        names, splits = folders_in(self.root), {name for names in _NAMES.values() for name in names}
        return bool(names) and not splits & set(names)

    def _move(self, split: str, key: str, entry: dict, train: str | None, lists: Mapping[str, str]) -> None:
        given = self._is_given(f'{key}.split')
        written = entry.get('split', 'train')
        entry['data_root'] = f'{self.root}/'
        if lists:
            entry.update(split=train, classes_from=train, ann_file=lists['train' if split == 'train' else 'val'])
            return
        if given or (entry.get('ann_file') and os.path.exists(self.root / entry['ann_file'])):
            return
        found = self._split(split, written)
        if not found:
            if split not in self.needed:
                self.notes.append(f'{split}: not there; nothing here reads it')
                return
            raise DataRootError(self._nothing_for(split, written))
        if found != written:
            self.notes.append(f'{split}: the folder {found}/ (the config says {written}/)')
        entry.pop('ann_file', None)  # of a flat folder, which this is not
        entry['split'] = found
        if train:
            entry['classes_from'] = train

    def _nothing_for(self, split: str, written: str) -> str:
        divide = '--val-fraction 0.2 holds back a fifth of its images to validate'
        if self._is_flat():
            return f'{self.root} holds folders of classes ({self._names()}), and none of splits; {divide}'
        looked = ', '.join(f'{name}/' for name in dict.fromkeys((written, *_NAMES[split])))
        divide = f'; where there is train/, {divide}' if split != 'train' else ''
        flat = next((name for name in (written, *_NAMES[split]) if (self.root / name).is_dir()), None)
        if flat and any(entry.is_file() and entry.name[0] != '.' for entry in (self.root / flat).iterdir()):
            option = f'--cfg-options {split}_dataloader.dataset.ann_file=FILE'
            divide = f'; for a flat {flat}/ give its list of lines NAME LABEL: {option}'
        return f'{split}: none of {looked} in {self.root} holds folders of classes; it has {self._names()}{divide}'

    def _names(self) -> str:
        names = folders_in(self.root)
        return ', '.join(names[:6]) + (', ...' if names[6:] else '') if names else 'no folders'

    # ------------------------------------------------------------------------------------------------- --val-fraction

    def _hold_back(self, train: str | None) -> dict[str, str]:
        """``--val-fraction``: the files that list the images of each part."""
        if train is None:
            raise DataRootError(self._nothing_for('train', 'train'))
        entry = dict(data_root=str(self.root), split=train, classes_from=train)
        problems = problems_of(dict(entry, type=ImageFolder), 'train')
        if problems:
            raise DataRootError(problems[0])
        data = ImageFolder(**entry, lazy_init=True)
        images, classes = data.load_data_list(), data.metainfo['classes']
        parts: dict[str, list[str]] = {'train': [], 'val': []}
        labels = classes if not any(any(map(str.isspace, name)) for name in classes) else tuple(range(len(classes)))
        for label in range(len(classes)):
            paths = [image['img_path'] for image in images if image['gt_label'] == label]
            names = [os.path.relpath(path, self.root / train) for path in paths]
            try:
                val = held_back(dict(images=[dict(file_name=name) for name in names]), self.val_fraction)
            except DataError as error:
                if not 0 < self.val_fraction < 1:
                    raise DataRootError(str(error)) from error
                raise DataRootError(f'{error} (class {classes[label]!r})') from error
            for i, name in enumerate(names):
                parts['val' if i in val else 'train'].append(f'{name} {labels[label]}\n')
        self.notes.append(
            f'{len(parts["val"])} of the {len(images)} images of {self.root / train} are held back to validate, the '
            f'same part of every class and the same ones every time (--val-fraction {self.val_fraction})'
        )
        if self.copies is None:
            return {'train': '', 'val': ''}
        return {part: self._write(''.join(lines), part) for part, lines in parts.items()}

    def _write(self, text: str, part: str) -> str:
        """Named after its content, so that processes of one run agree."""
        digest = hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:12]
        name = f'images-{part}-{digest}.txt'
        path = os.path.abspath(os.path.join(self.copies, name))
        if not os.path.isfile(path):
            try:
                with replacing(path) as unfinished:
                    unfinished.write_text(text, encoding='utf-8', errors='surrogateescape')  # as names of files are
            except OSError as error:
                raise DataRootError(f'a list of images is needed, but {path} cannot be written ({error})') from error
        return path

    # ------------------------------------------------------------------------------------------------------- classes

    def _fit_classes(self, entries: list[tuple[str, dict]], before: int | None) -> None:
        """The classes of the training folder for all, and whatever counts them."""
        for key, entry in entries:
            named = (entry.get('metainfo') or {}).get('classes')
            there = {*folders_in(Path(entry.get('data_root') or '', entry.get('split', 'train')))}
            if named and not set(named) <= there and not self._is_given(f'{key}.metainfo.classes'):
                entry['metainfo'] = {name: value for name, value in entry['metainfo'].items() if name != 'classes'}
        classes = next((names for _, entry in entries if (names := _classes_of(entry))), ())
        model = self.cfg.get('model') or {}
        counted = [part for key in ('head', 'data_preprocessor') if 'num_classes' in (part := model.get(key) or {})]
        old = {part['num_classes'] for part in counted} | ({before} if before else set())
        for part in counted if len(classes) > 1 else ():
            part['num_classes'] = len(classes)
        if old - {len(classes)} and classes:
            shown = ', '.join(classes[:6]) + (', ...' if classes[6:] else '')
            self.notes.append(f'classes: {len(classes)} ({shown})')


def _classes_of(entry: Mapping) -> tuple[str, ...]:
    return classes_of_entry(entry) if entry.get('data_root') else ()
