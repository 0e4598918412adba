"""Which data a training reads, as hashes: data that were replaced in place are noticed."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config

from ..classification.image_folder import image_folders, images_of_entry
from ..datasets.generated import sha256
from ..datasets.sources import evaluated_files, sources


def fingerprint(cfg: Config) -> dict[str, str]:
    """Of what a config trains on and is validated with: path -> hash.

    An annotation file by its content, since copies have other times; folders of classes by the names and sizes of the
    images that are read of them. What is not there, or not on this disk, is left out.

    Raises:
        UserError: a folder of classes cannot be read.
    """
    splits, found = ('train', 'val'), {}
    files = [source.ann_file for source in sources(cfg, splits)]
    files += [path for split in splits for _, _, path in evaluated_files(cfg, split)]
    for path in dict.fromkeys(map(os.path.normpath, filter(None, files))):
        if (digest := sha256(Path(path))) is not None:
            found[path] = digest[:16]
    for _, _, entry in image_folders(cfg, *splits):
        images = hashlib.sha256()
        folder = os.path.join(entry.get('data_root') or '', entry.get('split', 'train'))
        for path in sorted(images_of_entry(entry)):  # without the folder, which may be written in several ways
            images.update(os.fsencode(f'{path.removeprefix(folder)}\0{_size(path)}\n'))
        found[os.path.normpath(folder) + _choice(entry)] = images.hexdigest()[:16]
    return found


def _choice(entry: Mapping) -> str:
    """Which images of a folder an entry reads, if not all: another choice is no other content of the folder."""
    classes = (entry.get('metainfo') or {}).get('classes')
    given = dict(ann_file=entry.get('ann_file'), classes=classes, extensions=entry.get('extensions'))
    said = ', '.join(f'{key}={value!r}' for key, value in given.items() if value)
    if len(said) > 100:  # a thousand classes
        said = f'{said[:80]}... {hashlib.sha256(os.fsencode(said)).hexdigest()[:8]}'
    return f' ({said})' if said else ''


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # a link to nowhere: its training says it, should it come to the image
        return -1
