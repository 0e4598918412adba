"""Fill in what exporters leave out of annotation files and what follows from the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from .columns import boxes, is_id, is_mask, is_polygon, numbers, size_of

# mmdet reads an object with no polygon of three points as one to ignore: neither an object nor background.
_NO_MASK = [[0.0, 0.0]]


@dataclass(frozen=True)
class Needs:
    """What the readers of a file need of it.

    Args:
        masks: a pipeline loads masks.
        segm: a metric compares masks.
        evaluated: a COCO metric reads the file.
        objects: it is trained on or evaluated, so that it must have objects.
        filtered: images without objects are left out of a data set.
    """

    masks: bool = False
    segm: bool = False
    evaluated: bool = False
    objects: bool = True
    filtered: bool = False


def complete(content: dict, needs: Needs, size: Callable[[dict], tuple[int, int] | None]) -> list[str]:
    """Fill in what can be known; changes ``content``.

    Args:
        content: of an annotation file.
        needs: what is only needed by some.
        size: width and height of an image, given its entry.

    Returns:
        What was filled in, a line each, for the log.
    """
    images, annotations = content['images'], content.get('annotations') or []
    steps = (
        lambda: 'a byte order mark taken off' if content.pop('_bom', False) else None,
        lambda: _sizes(images, size),
        lambda: _references(annotations, 'image_id', images),
        lambda: _references(annotations, 'category_id', content['categories']),
        lambda: _boxes(annotations),
        lambda: _areas(annotations),
        lambda: _crowds(annotations),
        lambda: _ids(annotations, needs.evaluated),
        lambda: _masks(annotations) if needs.masks and not needs.segm else None,
    )
    return [note for note in (step() for step in steps) if note]


def _sizes(images: list[dict], size: Callable) -> str | None:
    known = (numbers([i.get('width') for i in images]) > 0) & (numbers([i.get('height') for i in images]) > 0)
    filled = 0
    for i in np.flatnonzero(~known):
        found = size(images[i])
        if found is not None:
            images[i]['width'], images[i]['height'] = found
            filled += 1
    return f'width and height of {filled:,} images, from the image files' if filled else None


def _references(annotations: list[dict], key: str, targets: list[dict]) -> str | None:
    """An id as text on one side and as number on the other means the same."""
    known = {target.get('id') for target in targets if is_id(target.get('id'))}
    by_text = {str(value): value for value in known}
    if len(by_text) < len(known):
        return None
    filled = 0
    for annotation in annotations:
        value = annotation.get(key)
        if type(value) in (str, int) and value not in known and str(value).strip() in by_text:
            annotation[key] = by_text[str(value).strip()]
            filled += 1
    kind = key.removesuffix('_id')
    return f'{key} of {filled:,} annotations, written as the {kind} ids are (text or number)' if filled else None


def _boxes(annotations: list[dict]) -> str | None:
    filled = 0
    for annotation in annotations:
        if annotation.get('bbox') in (None, []) and is_mask(annotation.get('segmentation')):
            box = _box_of(annotation['segmentation'])
            if box is not None:
                annotation['bbox'] = box
                filled += 1
    return f'bbox of {filled:,} annotations, from their masks' if filled else None


def _areas(annotations: list[dict]) -> str | None:
    area, box = numbers([a.get('area') for a in annotations]), boxes([a.get('bbox') for a in annotations])
    has_box = (box[:, 2:] >= 1).all(1)
    missing = np.isnan(area) & has_box
    none = (area <= 0) & has_box
    if none.sum() > 0.01 * max(1, has_box.sum()):  # a few are COCO's own
        missing |= none
    for i in np.flatnonzero(missing):
        of_mask = _area_of(annotations[i].get('segmentation'))
        annotations[i]['area'] = float(box[i, 2] * box[i, 3]) if of_mask is None else of_mask
    return f'area of {missing.sum():,} annotations, from mask or box' if missing.any() else None


def _crowds(annotations: list[dict]) -> str | None:
    filled = 0
    for annotation in annotations:
        value = annotation.get('iscrowd')
        if value not in (0, 1):
            known = {'0': 0, '1': 1, 'false': 0, 'true': 1}.get(str(value or 0).lower())
            if known is not None:
                annotation['iscrowd'] = known
                filled += 1
    return f'iscrowd of {filled:,} annotations (0 where there was none)' if filled else None


def _ids(annotations: list[dict], evaluated: bool) -> str | None:
    """COCO's evaluation takes the id 0 for "no match", and needs numbers; the data set needs different ones."""
    ids = [annotation.get('id') for annotation in annotations]
    numeric = all(type(value) is int for value in ids)
    if numeric and len(set(ids)) == len(ids) and (not evaluated or 0 not in ids):
        return None
    if not numeric and not evaluated and all(map(is_id, ids)) and len(set(ids)) == len(ids):
        return None
    why = (
        'one was 0, which the evaluation takes for no match'
        if numeric and len(set(ids)) == len(ids)
        else ('some were missing, no numbers, or there twice')
    )
    for number, annotation in enumerate(annotations, 1):
        annotation['id'] = number
    return f'annotation ids from 1 ({why})'


def _masks(annotations: list[dict]) -> str | None:
    without = [a for a in annotations if not a.get('segmentation')]
    if not without or len(without) == len(annotations):
        return None
    for annotation in without:
        annotation['segmentation'] = _NO_MASK
    return f'{len(without):,} objects without a segmentation are marked to be ignored in training'


def _box_of(segmentation: Any) -> list[float] | None:
    if isinstance(segmentation, list):
        points = np.concatenate([np.array(p, np.float64).reshape(-1, 2) for p in segmentation if is_polygon(p)])
        low, high = points.min(0), points.max(0)
        return [float(v) for v in (*low, *(high - low))]
    rle = _run_lengths(segmentation)
    return None if rle is None else [float(v) for v in mask_utils.toBbox(rle)]


def _area_of(segmentation: Any) -> float | None:
    if isinstance(segmentation, list):
        areas = [_shoelace(polygon) for polygon in segmentation if is_polygon(polygon)]
        return sum(areas) or None
    rle = _run_lengths(segmentation)
    return None if rle is None else float(mask_utils.area(rle)) or None


def _run_lengths(segmentation: Any) -> dict | None:
    """Compressed run lengths; None for what is none."""
    if not is_mask(segmentation) or isinstance(segmentation, list):
        return None
    height, width = size_of(segmentation)
    counts = segmentation['counts']
    try:
        if isinstance(counts, list):
            if sum(counts) != height * width or min(counts, default=0) < 0:
                return None
            return mask_utils.frPyObjects(dict(size=[height, width], counts=counts), height, width)
        if not counts or (ord(counts[-1]) - 48) & 0x20:  # a number that goes on: pycocotools would read past the end
            return None
        return dict(size=[height, width], counts=counts.encode('ascii'))
    except (TypeError, ValueError, OverflowError):
        return None


def _shoelace(polygon: Sequence[float]) -> float:
    x, y = np.array(polygon[0::2], np.float64), np.array(polygon[1::2], np.float64)
    return float(0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
