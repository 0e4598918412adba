"""Which data a training reads, as hashes: data that were replaced in place are noticed."""

import hashlib
import os
from pathlib import Path

from mmengine.config import Config

from ..classification.image_folder import image_folders, images_of_entry
from ..datasets.generated import sha256
from ..datasets.sources import evaluated_files, sources


def fingerprint(cfg: Config) -> dict[str, str]:
    """Of what a config trains on and is validated with: path -> hash.

    An annotation file by its content, since copies have other times; folders of classes by the names and sizes of their
    images. What is not there, or not on this disk, is left out.

    Raises:
        UserError: a folder of classes cannot be read.
    """
    splits, found = ('train', 'val'), {}
    files = [source.ann_file for source in sources(cfg, splits)]
    files += [path for split in splits for _, _, path in evaluated_files(cfg, split)]
    for path in dict.fromkeys(map(os.path.normpath, filter(None, files))):
        if (digest := sha256(Path(path))) is not None:
            found[path] = digest[:16]
    for split, _, entry in image_folders(cfg, *splits):
        images = hashlib.sha256()
        for path in sorted(images_of_entry(entry)):
            images.update(os.fsencode(f'{path}\0{os.path.getsize(path)}\n'))
        found[os.path.normpath(os.path.join(entry['data_root'], entry.get('split', split)))] = images.hexdigest()[:16]
    return found
