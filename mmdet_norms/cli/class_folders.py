"""What is wrong with the data of a classifier: said before anything is built, as of detectors' data."""

import os
from collections.abc import Iterator, Mapping

from mmengine.config import Config

from mmdet_norms.classification.image_folder import (
    classes_of_entry,
    generated_by,
    image_folders,
    images_of_entry,
    problems_of,
)
from mmdet_norms.datasets.annotations import other_order
from mmdet_norms.datasets.checks import Finding
from mmdet_norms.datasets.images import decode
from mmdet_norms.datasets.sources import SPLITS

# Where the data are to be had that configs of the package read, by the last part of data_root.
_SOURCES = {
    'imagenette2-160': 'https://github.com/fastai/imagenette has imagenette2-160.tgz: unpack it there',
    'imagenet': 'https://image-net.org has ILSVRC2012: unpack it so that train/ and val/ hold a folder for each class',
}


def folder_of(entry: Mapping) -> str:
    """Where the images of such a data set are."""
    return os.path.join(entry.get('data_root') or '', entry.get('split', 'train'))


def class_folder_findings(cfg: Config, splits: tuple[str, ...] = SPLITS, full: bool = False) -> list[Finding]:
    """What is wrong with the folders that the given splits of a config read, and with the numbers of classes.

    Args:
        full: decode every image.
    """
    findings, sound = [], []
    for split, key, entry in image_folders(cfg, *splits):
        problems = problems_of(entry, key)
        for problem in problems:
            where, _, what = problem.partition(': ')
            findings.append(Finding('error', where, what, _where_data_are(entry), fatal=True))
        if not problems:
            sound.append((split, key, entry))
    if not sound:
        return list(dict.fromkeys(findings))
    _, first, entry = sound[0]
    classes = classes_of_entry(entry)
    for _, key, entry in sound[1:]:
        difference = other_order(classes, classes_of_entry(entry))
        if difference:
            what = f'{difference} as {first} has them'
            findings.append(Finding('error', key, what, 'Name them once for all, in metainfo.classes'))
    trains = any(split == 'train' for split, _, _ in sound)
    findings += _counts(cfg.get('model') or {}, f'{first}.data_root', classes, trains)
    for _, _, entry in sound if full else ():
        for path in images_of_entry(entry):
            wrong = decode(path)
            if isinstance(wrong, str):
                findings.append(Finding('error', path, wrong, 'Replace or delete the file', fatal=True))
    return list(dict.fromkeys(findings))


def _counts(model: Mapping, key: str, classes: tuple[str, ...], trains: bool) -> Iterator[Finding]:
    """Whoever counts the classes."""
    if len(classes) < 2:
        said = f'the data have one class, {classes[0]!r}, and nothing to tell it from'
        yield Finding('error', key, said, 'A classifier needs folders of at least two classes', fatal=True)
        return
    for part in ('head', 'data_preprocessor'):
        count = (model.get(part) or {}).get('num_classes')
        if isinstance(count, int) and count != len(classes):
            key = f'model.{part}.num_classes'
            yield Finding(
                'error',
                key,
                f'is {count}, but the data have {len(classes)} classes',
                f'Set it to {len(classes)} (--cfg-options {key}={len(classes)}), or give --data-root DIR, which does',
                fatal=trains and count < len(classes),
            )


def _where_data_are(entry: Mapping) -> str:
    """What to do about data that are not there at all."""
    root = entry.get('data_root') or ''
    if not root or os.path.isdir(root):
        return ''
    name = os.path.basename(os.path.normpath(root))
    if generated_by(root):  # the problem says already what does
        return 'Or give another folder with --data-root DIR'
    given = 'give the folder with --data-root DIR'
    return f'{_SOURCES[name]}; or {given}' if name in _SOURCES else f'To read another: {given.replace("the ", "its ")}'
