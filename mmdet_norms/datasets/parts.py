"""Parts of an annotation file: a validation split held back from it, a file without a category; and writing copies."""

import hashlib
import json
import math
import os
import re
from pathlib import Path

from mmdet_norms.files import replacing

from .annotations import DataError

_SEED = 'mmdet_norms'  # of the split, the same for every run: runs with other seeds are to be compared
HELD_BACK = re.compile(r'-(train|val)(-[0-9a-f]{12})+\.json$')
"""Of the names of files that :func:`write_copy` writes for the two parts, and of changed copies of these."""


def held_back(content: dict, fraction: float) -> set[int]:
    """Positions of the images of an annotation file that make its validation split.

    The same images every time: they are chosen by a hash of their names, so that neither the order of the file nor
    ``--seed`` counts, and images that are added later move few of the others. Copies of one photo stay together: those
    of one file name, and those that Roboflow makes (``NAME.rf.HASH.jpg``).

    Args:
        content: of an annotation file.
        fraction: of the images, between 0 and 1; rounded to whole images.

    Raises:
        DataError: the fraction is none, or one of the two splits would be empty.
    """
    if not (isinstance(fraction, (int, float)) and 0 < fraction < 1):
        raise DataError(f'--val-fraction {fraction}: must be between 0 and 1, such as 0.2 for a fifth of the images')
    photos: dict[str, list[int]] = {}
    for i, image in enumerate(content['images']):
        photos.setdefault(_photo(image.get('file_name')), []).append(i)
    total = len(content['images'])
    wanted = math.floor(total * fraction + 0.5)
    chosen: set[int] = set()
    for photo in sorted(photos, key=lambda name: hashlib.sha256(f'{_SEED}/{name}'.encode(errors='replace')).digest()):
        if len(chosen) >= wanted:
            break
        chosen.update(photos[photo])
    if not 0 < len(chosen) < total:
        copies = ', copies of one photo counted as one' if len(photos) < total else ''
        raise DataError(
            f'--val-fraction {fraction}: of {total} images ({len(photos)} photos{copies}) that leaves '
            f'{len(chosen)} to validate and {total - len(chosen)} to train; each needs one at least'
            if total > 1
            else f'--val-fraction {fraction}: there is one image, or none, which cannot be split'
        )
    return chosen


def part_of(content: dict, keep: set[int] | None = None, drop: object = None) -> dict:
    """A copy of ``content`` with some of its images, and without a category.

    Args:
        keep: positions of the images that stay, with their annotations; all by default.
        drop: the position in the list of the category that goes; nothing may be annotated as it.
    """
    copy = {key: value for key, value in content.items() if key != '_bom'}
    if keep is not None:
        images = [image for i, image in enumerate(content['images']) if i in keep]
        ids = {_key(image.get('id')) for image in images}
        copy['images'] = images
        copy['annotations'] = [a for a in content.get('annotations', ()) if _key(a.get('image_id')) in ids]
    if drop is not None:
        copy['categories'] = [category for i, category in enumerate(content['categories']) if i != drop]
    return copy


def write_copy(content: dict, path: str | os.PathLike, folder: str | os.PathLike, what: str = '') -> str:
    """Write ``content``, made from the annotation file ``path``, into ``folder``; returns the absolute path.

    Named after its content, so that runs at the same time and processes of one run agree.

    Raises:
        DataError: it cannot be written.
    """
    text = json.dumps({key: value for key, value in content.items() if key != '_bom'})
    name = f'{Path(path).stem}{what}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json'
    copy = os.path.abspath(os.path.join(folder, name))
    if not os.path.isfile(copy):
        try:
            with replacing(copy) as part:
                part.write_text(text)
        except OSError as error:
            raise DataError(
                f'a changed copy of {path} is needed, but {copy} cannot be written ({error.strerror})'
            ) from error
    return copy


def group_category(contents: list[dict]) -> int | None:
    """The position of a category that is no class: Roboflow lists the name of the group of classes as the first one.

    That is the first category, if it has no supercategory ('none'), is the supercategory of all others, and nothing is
    annotated as it in any of the files. None if there is none.
    """
    for content in contents:
        first, *others = content['categories'] or [{}]
        if not others or first.get('supercategory') not in ('none', '', None) or not first.get('name'):
            return None
        if any(category.get('supercategory') != first['name'] for category in others):
            return None
        if any(annotation.get('category_id') == first.get('id') for annotation in content.get('annotations', ())):
            return None
    return 0 if contents else None


def _photo(name: object) -> str:
    """What the copies of one photo have in common, and the ways to write one path: ``./a.jpg`` is ``a.jpg``."""
    return os.path.normpath(str(name)).partition('.rf.')[0]


def _key(value: object) -> str:
    """Ids as text: some exporters write them as numbers in one list and as text in the other."""
    return str(value).strip()
