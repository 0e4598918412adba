"""Images in folders that are named after their classes: the layout of ImageNet and Imagenette."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmdet.registry import DATASETS as MMDETS
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from ..commands import runnable
from ..console import as_text
from ..datasets.images import decode, missing_files
from ..entries import class_of, is_a, mappings
from ..errors import UserError, some

_GENERATED = {
    os.path.join('data', 'shapes-cls'): '--classification',
    os.path.join('data', 'shapes-cls-hard'): '--classification --hard',
}
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """``data_root/split/CLASS/*.JPEG``; labels are the places of the classes in their sorted names.

    Every split has the classes of ``train`` where there is that folder, so that a class without images in ``val`` moves
    no label. They are ``metainfo['classes']``, which mmengine writes into checkpoints. Folders within those of classes
    are read, too; hidden ones and hidden files are not.

    Args:
        data_root: the folder that holds ``train`` and ``val``.
        split: which of its folders to read.
        ann_file: for a folder without those of classes, as ImageNet's ``val``: a file below ``data_root`` of lines
            ``NAME LABEL``, with names below ``data_root/split``. Labels are names of classes, or else their places
            from 0 on, as in mmpretrain's ``meta/val.txt``.
        classes_from: of which folder the names of the classes are. Default 'train'.
        extensions: of files that count as images, in lower case.
        metainfo: ``dict(classes=[...])`` is an order of one's own, or some of the classes.
        kwargs: as for :class:`mmengine.dataset.BaseDataset`.

    Raises:
        UserError: what is in the way of reading the data (:meth:`problems`), or a file that is no whole image.
    """

    def __init__(
        self,
        data_root: str = '',
        split: str = 'train',
        ann_file: str = '',
        classes_from: str = 'train',
        extensions: Sequence[str] = EXTENSIONS,
        metainfo: dict | None = None,
        **kwargs,
    ) -> None:
        if 'data_prefix' in kwargs:
            raise UserError(f"data_prefix={kwargs['data_prefix']!r}: ImageFolder reads data_root/split: split='val'")
        self.split, self.classes_from, self.extensions = split, classes_from, tuple(extensions)
        root, metainfo = os.fspath(data_root or ''), dict(metainfo or {})
        self._named = 'classes' in metainfo
        if not self._named:
            folders = (os.path.join(root, name) for name in (classes_from, split))
            metainfo['classes'] = next(filter(None, map(folders_in, folders)), ())
        super().__init__(ann_file=ann_file, data_root=root, metainfo=metainfo, **kwargs)

    @property
    def folder(self) -> str:
        """Where the images are."""
        return os.path.join(self.data_root, self.split)

    def problems(self) -> list[str]:
        """What is in the way of reading the data: each a sentence that begins with the key and its value."""
        return self._unusable() or (self._lines()[1] if self.ann_file else self._folder_problems())

    def _unusable(self) -> list[str]:
        root, classes = self.data_root, self.metainfo['classes']
        if not root or not os.path.isdir(root):
            options = generated_by(root)
            how = f'{runnable("shapes")} {options} generates it; or ' if options else ''
            return [f'data_root={root!r}: there is no such folder; {how}write the one that holds train/ and val/']
        if not os.path.isdir(self.folder):
            near = (os.path.dirname(os.path.abspath(root)), *(os.path.join(root, name) for name in folders_in(root)))
            instead = [path for path in near if os.path.isdir(os.path.join(path, self.split))]
            hint = (
                f'did you mean data_root={instead[0]!r}?'
                if instead
                else f'it has {_quoted(folders_in(root)) or "none"}'
            )
            return [f'split={self.split!r}: there is no such folder in data_root={root!r}; {hint}']
        if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
            return [f"metainfo.classes={classes!r:.80} is no list of names; write ('cat', 'dog')"]
        if len(set(classes)) < len(classes):
            twice = [name for name, count in Counter(classes).items() if count > 1]
            return [f'metainfo.classes names {_quoted(twice)} twice; name every class once']
        if not classes:
            return [
                f'data_root={root!r}: neither {self.classes_from}/ nor {self.split}/ holds folders of classes; write '
                'the folder that holds train/CLASS/*.jpg, or metainfo=dict(classes=[...]) with ann_file'
            ]
        return []

    def _folder_problems(self) -> list[str]:
        classes, names = self.metainfo['classes'], folders_in(self.folder)
        split, folder, there = f'split={self.split!r}', as_text(self.folder), set(names) & set(classes)
        empty = [name for name in sorted(there) if next(self._images(name), None) is None]
        other = [name for name in names if name not in there]
        problems = []
        if not names:
            problems.append(f'{split}: {folder} has no folders of classes; for a flat one write ann_file')
        elif other and not self._named:
            problems.append(
                f'{split}: {_quoted(other)} in {folder} is no class of {self.classes_from}/; rename or delete it '
                f'(the classes: {_quoted(classes)})'
            )
        elif not there:
            problems.append(f'metainfo.classes={_quoted(classes)}: none is a folder of {folder}: {_quoted(names)}')
        if empty:
            suffixes = ', '.join(self.extensions)
            problems.append(f'{split}: no image ({suffixes}) in {_quoted(empty)} of {folder}; delete it, or add images')
        return problems

    def load_data_list(self) -> list[dict]:
        """A dict with ``img_path`` and ``gt_label`` for every image."""
        problems, lines = self._unusable(), []
        if not problems:
            lines, problems = self._lines() if self.ann_file else ([], self._folder_problems())
        if problems:
            raise UserError(f'ImageFolder: {"; ".join(problems)}')
        if self.ann_file:
            return [dict(img_path=path, gt_label=label) for path, label in lines]
        classes, names = self.metainfo['classes'], folders_in(self.folder)
        missing, other = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
        for these, what in (
            (missing, 'has no folder of'),
            (other, 'has folders of other classes, which are left out:'),
        ):
            if these:
                print_log(f'{as_text(self.folder)} {what} {_quoted(these)}', logger='current', level=logging.WARNING)
        return [
            dict(img_path=path, gt_label=label)
            for label, name in enumerate(classes)
            for path in sorted(self._images(name))
        ]

    def get_cat_ids(self, idx: int) -> list[int]:
        """The label of an image, for mmengine's ``ClassBalancedDataset``."""
        return [self.get_data_info(idx)['gt_label']]

    def prepare_data(self, idx: int) -> Any:
        """The image through the pipeline; whatever fails at a file that is no whole image names the file."""
        image = self.get_data_info(idx)
        if _may_be_cut_off(image['img_path']):
            _require_image(image['img_path'])
        try:
            return self.pipeline(image)
        except Exception:
            _require_image(image['img_path'])
            raise

    def _images(self, name: str) -> Iterator[str]:
        """Paths of the images of a class, without asking the file system for each."""
        folders, seen = [os.path.join(self.folder, name)], set()
        while folders:
            folder = folders.pop()
            if os.path.realpath(folder) in seen or not os.path.isdir(folder):  # a link to a folder above
                continue
            seen.add(os.path.realpath(folder))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith('.'):
                        continue
                    if entry.name.lower().endswith(self.extensions) and not entry.is_dir(follow_symlinks=False):
                        yield entry.path
                    elif entry.is_dir():
                        folders.append(entry.path)

    def _lines(self) -> tuple[list[tuple[str, int]], list[str]]:
        """Path and label of every line of ``ann_file``, and what is wrong with it."""
        try:
            with open(self.ann_file, encoding='utf-8-sig', errors='surrogateescape') as file:  # as names of files are
                lines = [(number, line.rsplit(maxsplit=1)) for number, line in enumerate(file, 1) if line.strip()]
        except OSError as error:
            return [], [f'ann_file={self.ann_file!r}: {error.strerror}']
        classes = self.metainfo['classes']
        labels = {name: place for place, name in enumerate(classes)}
        if not all(len(line) == 2 and line[1] in labels for _, line in lines):
            labels = {str(place): place for place in range(len(classes))}
        for number, line in lines:
            if len(line) != 2 or line[1] not in labels:
                return [], [
                    f'ann_file={self.ann_file!r}, line {number}: {" ".join(line)!r:.80} must be NAME LABEL, with a '
                    f'label of 0 to {len(classes) - 1}, or all labels names of classes: {_quoted(classes)}'
                ]
        if not lines:
            return [], [f'ann_file={self.ann_file!r}: is empty; write lines of NAME LABEL']
        gone = missing_files(self.folder, [name for _, (name, _) in lines])
        if gone:
            names = [lines[place][1][0] for place in gone]
            return [], [f'ann_file={self.ann_file!r}: names {_quoted(names)}, not there in {self.folder}']
        return [(os.path.join(self.folder, name), labels[label]) for _, (name, label) in lines], []


def image_folders(cfg: Mapping, *splits: str) -> Iterator[tuple[str, str, Mapping]]:
    """Split, key and entry of every :class:`ImageFolder` that the splits of a config read; in wrappers, too."""
    for split in splits:
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
        for key, entry in mappings(dataset, f'{split}_dataloader.dataset'):
            if is_a(entry, ImageFolder, MMDETS):
                yield split, key, entry


def problems_of(entry: Mapping, key: str = 'dataset') -> list[str]:
    """What is wrong with the data of a config's entry: sentences such as ``{key}.data_root='x': there is no ...``.

    Args:
        entry: of an :class:`ImageFolder`; other entries have none.
        key: of the entry in the config.
    """
    return [f'{key}.{problem}' for problem in (_unread(entry).problems() if is_a(entry, ImageFolder, MMDETS) else ())]


def classes_of_entry(entry: Mapping) -> tuple[str, ...]:
    """The classes of a config's entry of an :class:`ImageFolder`, in the order of their labels; no image is listed."""
    return tuple(_unread(entry).metainfo['classes'])


def images_of_entry(entry: Mapping) -> list[str]:
    """The paths of all images of a config's entry. Raises what reading the data would."""
    return [image['img_path'] for image in _unread(entry).load_data_list()]


def _unread(entry: Mapping) -> ImageFolder:
    options = {key: value for key, value in entry.items() if key not in ('type', 'pipeline', '_scope_')}
    return class_of(entry, MMDETS)(**{**options, 'lazy_init': True})


def generated_by(data_root: str) -> str | None:
    """With which options the command that generates data writes a folder; None if it does not."""
    return _GENERATED.get(os.path.normpath(data_root or '.'))


def folders_in(folder: str) -> tuple[str, ...]:
    """The sorted names of the folders in a folder; none where there is no such folder."""
    try:
        with os.scandir(folder or '.') as entries:
            return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith('.')))
    except OSError:
        return ()


def _may_be_cut_off(path: str) -> bool:
    """Whether a JPEG has another end than it should, of which OpenCV up to 4.10 reads the rest as black, untold."""
    try:
        with open(path, 'rb') as file:
            is_jpeg = file.read(2) == b'\xff\xd8'
            file.seek(-2, os.SEEK_END)
            return is_jpeg and file.read() != b'\xff\xd9'
    except OSError:
        return True


def _require_image(path: str) -> None:
    wrong = decode(path)
    if isinstance(wrong, str):
        raise UserError(f'{as_text(path)} {wrong}; replace or delete the file')


def _quoted(names: Sequence[str]) -> str:
    return some([*map(repr, names)], 5)
