"""Where exports of common tools keep annotations and images of a split, and what a folder of another format is."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from .annotations import DataError, read_annotations
from .columns import is_id

# What the split is called in names of files and folders.
_CALLED = {
    'train': ('train', 'Train', 'training'),
    'val': ('val', 'valid', 'validation', 'Validation'),
    'test': ('test', 'Test'),
}

# Relative to the root, the first that is there counts.
ANNOTATIONS = (
    'annotations/instances_{split}2017.json',
    'annotations/instances_{split}.json',
    'annotations/{split}.json',
    '{split}.json',
    '{split}/_annotations.coco.json',  # Roboflow
    '{split}/annotation_coco.json',  # mmdet's tutorial
    '{split}/annotations.json',
    '{split}/labels.json',  # FiftyOne
    '{split}/result.json',  # Label Studio, a project for each split
    '{split}/annotations/instances_default.json',  # CVAT, a task for each split
)
_IMAGES = (
    '{split}2017/',
    '{split}/',
    'images/{split}2017/',
    'images/{split}/',
    '{split}/images/',
    '{split}/data/',
    '{split}/images/default/',
    'images/',
    'images/default/',  # CVAT
    'JPEGImages/',
    'data/',
    '',
    '../',  # names that begin with the folder's own
)
_NAMED = {
    split: re.compile(rf'(?<![a-z])({"|".join(names)})(?![a-z])', re.IGNORECASE) for split, names in _CALLED.items()
}
_MANY = 20  # files of JSON in one folder: each is an image's, none is all images'
_MANY_FOLDERS = 300
_TRIED = 32  # images that are looked for


def split_names(split: str, patterns: Sequence[str] = ANNOTATIONS) -> list[str]:
    """Names of a split's files, as folders in COCO format write them, in the order in which they are looked for."""
    names = [pattern.format(split=name) for pattern in patterns for name in _CALLED[split]]
    return list(dict.fromkeys(names))


def loose_files(root: Path, split: str) -> list[str]:
    """Annotation files with names of nobody's convention that may be of a split, relative to ``root``.

    That is, in COCO format, in it or in annotations/, and with the split's name in theirs; for the training split, if
    there is none, those without the name of another split. A file of all images is the only one.
    """
    found = []
    for folder in ('', 'annotations'):
        names = sorted(path.name for path in (root / folder).glob('*.json') if path.is_file())
        if len(names) <= _MANY:
            found += [os.path.join(folder, name) for name in names if _is_coco(root / folder / name)]
    of_split = {name: _split_of(os.path.basename(name)) for name in found}
    named = [name for name in found if of_split[name] == split]
    return named or [name for name in found if of_split[name] is None and split == 'train']


def images_folder(root: Path, ann_file: str, split: str, first: Sequence[str]) -> tuple[str | None, str, list[str]]:
    """Where the images of an annotation file are.

    Args:
        ann_file: relative to ``root``, or absolute.
        split: whose common names are looked for.
        first: folders to look in before those, as the config names them.

    Returns:
        The folder, relative to ``root``, with most of the images that were looked for: one of the usual ones, else any
        other in ``root``; None where there is none, or the file lists no image. The name of one image. The folders.
    """
    own = os.path.dirname(ann_file)
    beside = [] if os.path.basename(own) in ('', 'annotations') and not os.path.isabs(own) else [f'{own}/']
    folders = [*beside, *first, *split_names(split, _IMAGES), *([f'{own}/images/'] if beside else [])]
    folders = list(dict.fromkeys(folders))
    names = [image.get('file_name') for image in read_annotations(root / ann_file)['images']]
    names = [name for name in names if isinstance(name, str) and '\0' not in name]
    if not names:
        return None, '', folders
    step = max(1, len(names) // _TRIED)
    tried = names[::step][:_TRIED]
    best, most = None, 0
    for folder in [*folders, *_folders_in(root)]:
        if best is not None and folder not in folders:
            break  # any other folder will do where there is nothing in these
        there = sum((root / folder / name).is_file() for name in tried)
        if there > most:
            best, most = folder, there
        if there == len(tried):
            break
    return best, names[0], folders


def other_format(root: Path) -> str | None:
    """What a folder holds that is no data set in COCO format, and how to make one of it; None if it is not known."""
    xml = next(islice(_files(root, '.xml'), 1), None)
    if xml is not None and b'<annotation' in _head(xml):
        images = 'JPEGImages' if (root / 'JPEGImages').is_dir() else os.path.relpath(xml.parent, root)
        return (
            f'It holds annotations of Pascal VOC ({os.path.relpath(xml, root)}), one file an image. Write them in '
            "COCO's format: pip install supervision, then, in that folder, "
            f'python -c "import supervision as sv; sv.DetectionDataset.from_pascal_voc({images!r}, '
            f"{os.path.relpath(xml.parent, root)!r}).as_coco(annotations_path='annotations.json')\", and add "
            '--val-fraction 0.2'
        )
    labelme = next((path for path in islice(_files(root, '.json'), 3) if _is_labelme(path)), None)
    if labelme is not None:
        folder = os.path.relpath(labelme.parent, root)
        return (
            f'It holds annotations of LabelMe ({os.path.relpath(labelme, root)}), one file an image. Write them in '
            "COCO's format: pip install labelme2coco, then "
            f'labelme2coco {os.path.normpath(root / folder)} --export_dir {root}/annotations --category_id_start 1, '
            'and add --val-fraction 0.2'
        )
    if any((root / name).is_file() for name in ('data.yaml', 'dataset.yaml')) or (root / 'labels').is_dir():
        return (
            "It seems to hold YOLO's format. Export it from the annotation tool as COCO, or write it in COCO's format: "
            'pip install supervision, and its DetectionDataset.from_yolo(...).as_coco(...)'
        )
    return None


def _split_of(name: str) -> str | None:
    return next((split for split, names in _NAMED.items() if names.search(name)), None)


def _is_coco(path: Path) -> bool:
    try:
        content = read_annotations(path)
    except DataError:
        return False
    return 'annotations' in content and bool(content['categories']) and is_id(content['categories'][0].get('name'))


def _is_labelme(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and 'shapes' in content and 'imagePath' in content


def _folders_in(root: Path) -> Iterator[str]:
    """Those in ``root`` and in them, the first few hundred."""
    levels = (path for pattern in ('*/', '*/*/') for path in sorted(root.glob(pattern)))
    for path in islice(levels, _MANY_FOLDERS):
        yield f'{path.relative_to(root)}/'


def _files(root: Path, suffix: str) -> Iterator[Path]:
    """Those with a suffix in a folder and in the folders in it."""
    for folder in ['.', *sorted(path.name for path in root.iterdir() if path.is_dir())]:
        try:
            yield from sorted(path for path in (root / folder).iterdir() if path.suffix.lower() == suffix)
        except OSError:
            continue


def _head(path: Path) -> bytes:
    try:
        with open(path, 'rb') as file:
            return file.read(1024)
    except OSError:
        return b''
