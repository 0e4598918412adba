"""A difference of two models with its uncertainty over the images: both evaluated on the same resampled images.

pycocotools matches detections with objects image by image, and then counts. Only the counting depends on which images
are in the set, so that a thousand resamples are matched once: an image that was drawn twice counts twice. That is AP of
a set with two copies of it (but for equal scores within an image, whose order is nobody's).
"""

import contextlib
import copy
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from .effects import LEVEL

SAMPLES = 1000
AREAS = ('all', 'small', 'medium', 'large')

_MAX_DETECTIONS = 100  # an image, as COCO's AP has it
_AT_A_TIME = 1 << 22  # numbers in an array
FEW_IMAGES = 20
"""With objects: of fewer there is no interval, since resamples of them vary less than other images would."""

_ENOUGH = 0.95  # of the resamples must have objects of a class, or there is no interval for it


@dataclass(frozen=True)
class Difference:
    """Of two values that belong together.

    Args:
        a: the first one's value; None if there is none, as of a class without objects.
        b: the second one's.
        difference: ``b - a``.
        low: end of the interval of the difference, at :data:`.effects.LEVEL`; None if it is not known.
        high: the other end.
        p: of no difference, two-sided.
    """

    a: float | None
    b: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def is_seen(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class _Cell:
    """Of a class and a range of areas: the detections from the surest to the least sure, and the objects.

    Args:
        image: of each detection, its place among the images.
        right: threshold x detection.
        ignored: the same.
        objects: how many each image has.
    """

    image: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What became of the objects and detections of a class in an image, at one IoU threshold.

    Args:
        image: the id.
        category: the id of the class.
        objects: ids of the objects, without those to be ignored.
        found: the id of each object that was found -> the score of the detection.
        false: the scores of detections that are no object, or one that a surer detection had found.
    """

    image: object
    category: object
    objects: tuple
    found: dict
    false: tuple[float, ...]


class Matches:
    """Which detections of a model are right; matched once by pycocotools, counted for any weights of the images.

    Args:
        truth: the annotations.
        entries: detections in COCO's format.
        kind: ``'bbox'`` or ``'segm'``.
        categories: the ids of the classes that count; all by default.
    """

    def __init__(self, truth: COCO, entries: Sequence[dict], kind: str, categories: Sequence | None = None) -> None:
        entries = [{key: value for key, value in e.items() if (kind, key) != ('segm', 'bbox')} for e in entries]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, _loaded(truth, entries), kind)
            evaluation.params.maxDets = [_MAX_DETECTIONS]
            if categories is not None:
                evaluation.params.catIds = list(categories)
            evaluation.evaluate()
        params = evaluation.params
        self.images, self.categories = ([_as_given(i) for i in ids] for ids in (params.imgIds, params.catIds))
        self.thresholds, self._recalls = np.asarray(params.iouThrs), np.asarray(params.recThrs)
        count = len(self.images)
        groups = [evaluation.evalImgs[i : i + count] for i in range(0, len(evaluation.evalImgs), count or 1)]
        self._cells = [_cell(group, len(self.thresholds)) for group in groups]  # class by class, area by area
        self._of_all_sizes = groups[:: len(params.areaRng)]

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """AP by sample, threshold, class and area (:data:`AREAS`); NaN where a sample has no such object.

        Args:
            weights: by sample and image, in the order of :attr:`images`: how often it counts, 0 or more.
        """
        shape = len(weights), len(self.thresholds), len(self.categories), len(AREAS)
        found = np.full(shape, np.nan)
        for i, cell in enumerate(self._cells):
            step = max(1, _AT_A_TIME // max(1, len(cell.image)))
            for start in range(0, len(weights), step):
                part = slice(start, start + step)
                found[part, :, i // len(AREAS), i % len(AREAS)] = self._of_cell(cell, weights[part])
        return found

    def images_with_objects(self, area: int, category: int | None = None) -> int:
        """How many images have an object of a size, of one class or of any.

        Args:
            area: its place in :data:`AREAS`.
            category: the place of the class; None: of any.
        """
        cells = self._cells[area :: len(AREAS)]
        cells = cells if category is None else [cells[category]]
        return int(np.count_nonzero(sum((cell.objects for cell in cells), np.zeros(len(self.images)))))

    def _of_cell(self, cell: _Cell, weights: np.ndarray) -> np.ndarray:
        """Sample x threshold: precision at 101 recalls, of the best point at this recall or above, as COCOeval has it.

        Recall grows at right detections only, and precision is best there.
        """
        objects = weights @ cell.objects
        weight = weights[:, cell.image]
        counted = np.cumsum(weight, axis=1)
        found = np.zeros((len(weights), len(cell.right)))
        for t, (right, ignored) in enumerate(zip(cell.right, cell.ignored)):
            at, left_out = np.flatnonzero(right), np.flatnonzero(ignored)
            if not len(at):
                continue
            hits, shown = np.cumsum(weight[:, at], axis=1), counted[:, at]
            if len(left_out):
                before = np.searchsorted(left_out, at)
                skipped = np.cumsum(weight[:, left_out], axis=1)
                shown = shown - np.where(before > 0, skipped[:, before - 1], 0)
            precision = hits / (shown + np.spacing(1))
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            with np.errstate(invalid='ignore'):
                reached = np.searchsorted(self._recalls, hits / objects[:, None], side='right')
            found[:, t] = (best * np.diff(reached, axis=1, prepend=0)).sum(1) / len(self._recalls)
        found[objects == 0] = np.nan
        return found

    def outcomes(self, threshold: float = 0.5) -> Iterator[Outcome]:
        """Of every class and image that has an object or a detection of it, of whatever score."""
        t = int(np.flatnonzero(np.isclose(self.thresholds, threshold))[0])
        for result in (result for group in self._of_all_sizes for result in group if result is not None):
            scores = dict(zip(result['dtIds'], result['dtScores']))
            counts = [not ignored for ignored in result['gtIgnore']]
            pairs = [pair for pair, counts in zip(zip(result['gtIds'], result['gtMatches'][t]), counts) if counts]
            wrong = (result['dtMatches'][t] == 0) & ~result['dtIgnore'][t].astype(bool)
            yield Outcome(
                image=_as_given(result['image_id']),
                category=_as_given(result['category_id']),
                objects=tuple(object_id for object_id, _ in pairs),
                found={object_id: scores[int(match)] for object_id, match in pairs if match > 0},
                false=tuple(score for score, is_wrong in zip(result['dtScores'], wrong) if is_wrong),
            )


def resamples(images: int, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Sample x image: how often each image is drawn when as many as there are are drawn, with replacement."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples)


def mean_over_classes(precision: np.ndarray) -> np.ndarray:
    """Over the classes (the last axis) that a sample has objects of; NaN where it has none of any."""
    known = ~np.isnan(precision)
    with np.errstate(invalid='ignore'):
        return np.where(known, precision, 0).sum(-1) / known.sum(-1)


def difference(a: float, b: float, of_a: np.ndarray, of_b: np.ndarray, images: int) -> Difference:
    """Of two values, with the interval that their values in the same resamples give (percentiles).

    Args:
        a, b: on the images as they are.
        of_a, of_b: in each resample.
        images: that the values rest on; of fewer than :data:`FEW_IMAGES` there is no interval.
    """
    if np.isnan(a) or np.isnan(b):
        return Difference(*(None if np.isnan(value) else float(value) for value in (a, b)))
    differences = of_b - of_a
    known = differences[~np.isnan(differences)]
    if images < FEW_IMAGES or len(known) < max(1, _ENOUGH * len(differences)):
        return Difference(float(a), float(b), float(b - a))
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min((known <= 0).sum(), (known >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (len(known) + 1))
    return Difference(float(a), float(b), float(b - a), float(low), float(high), float(p))


def accuracy_difference(right_a: np.ndarray, right_b: np.ndarray, weights: np.ndarray) -> Difference:
    """Of two classifiers' top-1: the interval over resampled images, and McNemar's exact p.

    Args:
        right_a, right_b: of each image, whether it was right.
        weights: as :func:`resamples` gives them.
    """
    total = weights.sum(1)
    with np.errstate(invalid='ignore'):
        of_a, of_b = (weights @ right / total for right in (right_a, right_b))
    found = difference(right_a.mean(), right_b.mean(), of_a, of_b, len(right_a))
    only_a, only_b = (right_a & ~right_b).sum(), (right_b & ~right_a).sum()
    p = stats.binomtest(int(only_b), int(only_a + only_b)).pvalue if only_a + only_b else 1.0
    return Difference(found.a, found.b, found.difference, found.low, found.high, float(p))


def _as_given(value: object) -> object:
    """An id, of which COCOeval's np.unique makes a number of numpy's."""
    return value.item() if isinstance(value, np.generic) else value


def _loaded(truth: COCO, entries: list[dict]) -> COCO:
    if entries:
        return truth.loadRes(copy.deepcopy(entries))
    found = COCO()
    found.dataset = dict(images=truth.dataset['images'], categories=truth.dataset['categories'], annotations=[])
    found.createIndex()
    return found


def _cell(group: Sequence[dict | None], thresholds: int) -> _Cell:
    results = [(i, result) for i, result in enumerate(group) if result is not None]
    objects = np.zeros(len(group), np.int64)
    for i, result in results:
        objects[i] = np.count_nonzero(np.asarray(result['gtIgnore']) == 0)
    nothing = [np.zeros((thresholds, 0), bool)]
    scores = np.concatenate([np.zeros(0), *(np.asarray(r['dtScores'], float) for _, r in results)])
    image = np.concatenate([np.zeros(0, np.int64), *(np.full(len(r['dtScores']), i) for i, r in results)])
    matched = np.concatenate([*nothing, *(r['dtMatches'] > 0 for _, r in results)], axis=1)
    ignored = np.concatenate([*nothing, *(r['dtIgnore'].astype(bool) for _, r in results)], axis=1)
    order = np.argsort(-scores, kind='mergesort')  # as COCOeval sorts: which of two equal ones is first counts
    order = order[~ignored[:, order].all(0)]
    right = (matched & ~ignored)[:, order]
    # what comes after the last right one changes nothing
    end = np.flatnonzero(right.any(0))[-1] + 1 if right.any() else 0
    return _Cell(image[order[:end]], right[:, :end], ignored[:, order[:end]], objects)
