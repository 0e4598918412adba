"""Two trained models on one validation set: how far they differ and how sure that is, by class, and on which images."""

import contextlib
import copy
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from mmdet.registry import METRICS
from pycocotools.coco import COCO

from ..datasets.annotations import read_annotations
from ..datasets.complete import Needs, complete
from ..datasets.sources import evaluated_files, metrics, sources
from ..engine.results import KINDS
from ..entries import is_a, name_of
from ..errors import UserError, some
from ..version import __version__
from .bootstrap import (
    AREAS,
    Difference,
    Matches,
    Outcome,
    accuracy_difference,
    difference,
    mean_over_classes,
    resamples,
)
from .detections import EvaluatedRun, detections, predictions, require_same_images
from .effects import LEVEL

IOU = 0.5
"""At which an object counts as found where images are compared."""

KIND_NAMES = {'bbox': 'boxes', 'segm': 'masks'}
BETTER, WORSE = 'better', 'worse'

_COLUMNS = {'AP': ('all', None), 'AP50': ('all', 0.5), 'AP75': ('all', 0.75)} | {
    f'AP{area[0]}': (area, None) for area in AREAS[1:]
}


def compare(
    a: EvaluatedRun,
    b: EvaluatedRun,
    samples: int,
    seed: int = 0,
    score_thr: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """What is to be said of two runs, as plain data: see :mod:`.diff_page` for how it reads.

    Args:
        a, b: the runs; a difference is what ``b`` has more.
        samples: resampled sets of images, for the intervals.
        seed: of the resampling.
        score_thr: from which a detection counts where images are compared; by default, for each run, where F1 is best.
        say: told what is being done.

    Raises:
        UserError: they were not validated on the same data, or not by what is compared here.
    """
    if a.is_classifier != b.is_classifier:
        one, other = (a, b) if a.is_classifier else (b, a)
        raise UserError(f'{one.path} is the run of an image classifier and {other.path} that of a detector')
    if os.path.realpath(a.checkpoint) == os.path.realpath(b.checkpoint):
        raise UserError(f'both runs are {a.checkpoint}; name two of them, or two checkpoints')
    found = (_classifiers if a.is_classifier else _detectors)(a, b, samples, seed, score_thr, say)
    named = {side: dict(name=run.name, checkpoint=str(run.checkpoint)) for side, run in zip('ab', (a, b))}
    for side, name in zip('ab', _told_apart(a, b)):
        named[side]['name'] = name
        named[side].update(found.pop(side, {}))
    about = dict(made_by=f'mmdet_norms {__version__}', **named)
    return {**about, 'images': found.pop('images'), 'samples': samples, 'seed': seed, 'level': LEVEL, **found}


def _told_apart(a: EvaluatedRun, b: EvaluatedRun) -> tuple[str, str]:
    """Their names, or where these are one, what tells their paths apart."""
    if a.name != b.name:
        return a.name, b.name
    paths = [os.path.abspath(run.checkpoint if run.path == other.path else run.path) for run, other in ((a, b), (b, a))]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    first, second = (os.path.relpath(path, common) for path in paths)
    return first, second


# ----------------------------------------------------------------------------------------------------------- detectors


def _detectors(
    a: EvaluatedRun, b: EvaluatedRun, samples: int, seed: int, score_thr: float | None, say: Callable[[str], None]
) -> dict:
    kinds = [kind for kind in KINDS if all(kind in _kinds(run) for run in (a, b))]
    if not kinds:
        raise UserError(f'{a.path} evaluates {", ".join(_kinds(a))} and {b.path} {", ".join(_kinds(b))}: nothing both')
    truth = _same_truth(a, b)
    categories = a.category_ids
    entries = [detections(run) for run in (a, b)]
    found: dict = {'images': len(truth.imgs), 'kinds': {}}
    matches: dict[str, list[Matches]] = {}
    for kind in kinds:
        say(f'matching {KIND_NAMES[kind]} with the objects of {len(truth.imgs)} images')
        matches[kind] = [Matches(truth, part, kind, categories) for part in entries]
        images = matches[kind][0].images
        weights = np.vstack([np.ones((1, len(images)), int), resamples(len(images), samples, seed)])
        say(f'counting in {samples} resamples')
        precision = [of_run.average_precision(weights) for of_run in matches[kind]]
        found['kinds'][kind] = dict(
            overall={name: asdict(_of_all(precision, name, matches[kind][0])) for name in _COLUMNS},
            classes=[asdict(_of_class(precision, k, matches[kind][0])) for k in range(len(categories))],
        )
    shown = kinds[0]
    outcomes = [list(of_run.outcomes(IOU)) for of_run in matches[shown]]
    thresholds = [best_threshold(part) if score_thr is None else score_thr for part in outcomes]
    found.update(a=dict(score_thr=thresholds[0]), b=dict(score_thr=thresholds[1]), shown=shown)
    per_place = {place: _count(pair, thresholds) for place, pair in _paired(outcomes).items()}
    found['classes'] = _classes(a, categories, per_place)
    found['changes'] = _changes(a, truth, per_place)
    found['counts'] = _counts(found['changes'], found['images'])
    return found


def _kinds(run: EvaluatedRun) -> list[str]:
    """What the run's validation evaluates, of what is compared here."""
    entries = [metric for _, metric in metrics(run.cfg, 'val')]
    coco = [m for m in entries if is_a(m, 'CocoMetric', METRICS) and not is_a(m, 'LVISMetric', METRICS)]
    given = [metric.get('metric') or 'bbox' for metric in coco]
    kinds = {kind for kinds in given for kind in ([kinds] if isinstance(kinds, str) else kinds)} & set(KINDS)
    if not kinds:
        names = ', '.join(name_of(metric, METRICS) for metric in entries) or 'none'
        raise UserError(
            f'the val_evaluator of {run.path} is {names}: detectors are compared by the average precision of COCO, of '
            'CocoMetric with bbox or segm'
        )
    return [kind for kind in KINDS if kind in kinds]


def _same_truth(a: EvaluatedRun, b: EvaluatedRun) -> COCO:
    """The annotations that both were validated on."""
    require_same_images([a, b], list(a.infos))
    require_same_images([b, a], list(b.infos))
    names = [dict(zip(run.category_ids, run.classes)) for run in (a, b)]
    if names[0] != names[1]:
        only = sorted(str(name) for name in set(names[0].values()) ^ set(names[1].values()))
        what = f'{some(only)} only in one of them' if only else 'the same ones, numbered differently'
        raise UserError(f'{a.path} and {b.path} were validated with different classes: {what}')
    contents = [_content(run) for run in (a, b)]
    objects = [_objects(content) for content in contents]
    if objects[0] != objects[1]:
        differ = sum(((objects[0] - objects[1]) + (objects[1] - objects[0])).values())
        raise UserError(
            f'{a.path} and {b.path} were validated on different annotations: {differ} objects are not in both, so that '
            'their numbers do not compare'
        )
    truth = COCO()
    truth.dataset = contents[0]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _content(run: EvaluatedRun) -> dict:
    """The annotation file of a run, complete, with the images of its validation set."""
    files = [path for _, _, path in evaluated_files(run.cfg, 'val')]
    files = files or [source.ann_file for source in sources(run.cfg, ('val',)) if source.ann_file]
    if len(set(map(os.path.realpath, files))) != 1:
        raise UserError(f'the validation set of {run.path} has {len(files)} annotation files; one can be compared')
    content = copy.deepcopy(read_annotations(files[0]))
    complete(content, Needs(evaluated=True), lambda image: None)
    content['images'] = [image for image in content['images'] if image['id'] in run.infos]
    content['annotations'] = [a for a in content.get('annotations') or () if a['image_id'] in run.infos]
    return content


def _objects(content: dict) -> Counter:
    return Counter(
        (a['image_id'], a['category_id'], *(round(float(v), 1) for v in a['bbox']), int(a.get('iscrowd', 0)))
        for a in content['annotations']
    )


def _of_all(precision: Sequence[np.ndarray], name: str, matches: Matches) -> Difference:
    size, threshold = _COLUMNS[name]
    area = AREAS.index(size)
    at = slice(None) if threshold is None else np.isclose(matches.thresholds, threshold)
    values = [mean_over_classes(of_run[..., area][:, at]).mean(1) for of_run in precision]
    return _paired_difference(values, matches.images_with_objects(area))


def _of_class(precision: Sequence[np.ndarray], k: int, matches: Matches) -> Difference:
    return _paired_difference([of_run[:, :, k, 0].mean(1) for of_run in precision], matches.images_with_objects(0, k))


def _paired_difference(values: Sequence[np.ndarray], images: int) -> Difference:
    """Of values of which the first ones are of the images as they are."""
    a, b = values
    return difference(a[0], b[0], a[1:], b[1:], images)


def best_threshold(outcomes: Iterable[Outcome]) -> float:
    """The score from which detections are to count for the best F1, over all classes; 0.5 where nothing is right."""
    outcomes = list(outcomes)
    objects = sum(len(outcome.objects) for outcome in outcomes)
    right = [score for outcome in outcomes for score in outcome.found.values()]
    wrong = [score for outcome in outcomes for score in outcome.false]
    if not right:
        return 0.5
    scores, is_right = np.array([*right, *wrong]), np.array([True] * len(right) + [False] * len(wrong))
    order = np.argsort(-scores, kind='stable')
    scores, hits = scores[order], np.cumsum(is_right[order])
    last = np.append(scores[1:] != scores[:-1], True)  # of equal ones all count or none
    f1 = np.where(last, 2 * hits / (np.arange(1, len(scores) + 1) + objects), -1)
    return float(scores[np.argmax(f1)])


def _classes(run: EvaluatedRun, categories: Sequence, per_place: Mapping[tuple, dict[str, int]]) -> list[dict]:
    """Of each class, how many objects which of the runs finds, and how many false detections it has."""
    totals = {category: Counter() for category in categories}
    for (_, category), own in per_place.items():
        totals[category].update(own)
    names = dict(zip(run.category_ids, run.classes))
    return [dict(name=names[category], **_plain(totals[category])) for category in categories]


def _changes(run: EvaluatedRun, truth: COCO, per_place: Mapping[tuple, dict[str, int]]) -> list[dict]:
    """The images on which the runs differ, the greatest gain first: objects found less false detections."""
    names = dict(zip(run.category_ids, run.classes))
    images: dict[object, Counter] = {}
    listed: dict[object, dict[str, list]] = {}
    for (image, category), own in per_place.items():
        images.setdefault(image, Counter()).update(own)
        for key, objects in listed.setdefault(image, dict(only_a=[], only_b=[])).items():
            objects += [names[category]] * own[key]
    changes = []
    for image, counts in images.items():
        counts = _plain(counts)
        gain = counts['found_b'] - counts['false_b'] - counts['found_a'] + counts['false_a']
        if gain or counts['only_a'] or counts['only_b']:
            file = str(truth.imgs[image].get('file_name', ''))
            lost, gained = listed[image]['only_a'], listed[image]['only_b']
            changes.append(dict(image=image, file=file, gain=gain, **counts, lost=lost, gained=gained))
    return sorted(changes, key=lambda change: (-change['gain'], str(change['file'])))


def _paired(outcomes: Sequence[Iterable[Outcome]]) -> dict[tuple, list[Outcome]]:
    """Image and class -> the outcome of either run. Where one has none, there is no object, and no detection of it."""
    found: dict[tuple, list] = {}
    for i, part in enumerate(outcomes):
        for outcome in part:
            place = outcome.image, outcome.category
            found.setdefault(place, [Outcome(*place, outcome.objects, {}, ()) for _ in outcomes])[i] = outcome
    return found


def _found(outcome: Outcome, threshold: float) -> set:
    return {object_id for object_id, score in outcome.found.items() if score >= threshold}


def _count(pair: Sequence[Outcome], thresholds: Sequence[float]) -> dict[str, int]:
    a, b = (_found(outcome, threshold) for outcome, threshold in zip(pair, thresholds))
    false = [sum(score >= threshold for score in outcome.false) for outcome, threshold in zip(pair, thresholds)]
    return dict(
        objects=len(pair[0].objects),
        found_a=len(a),
        found_b=len(b),
        only_a=len(a - b),
        only_b=len(b - a),
        false_a=false[0],
        false_b=false[1],
    )


def _plain(counts: Counter) -> dict[str, int]:
    keys = ('objects', 'found_a', 'found_b', 'only_a', 'only_b', 'false_a', 'false_b')
    return {key: int(counts[key]) for key in keys}


# --------------------------------------------------------------------------------------------------------- classifiers


def _classifiers(
    a: EvaluatedRun, b: EvaluatedRun, samples: int, seed: int, score_thr: float | None, say: Callable[[str], None]
) -> dict:
    if score_thr is not None:
        raise UserError(f'--score-thr {score_thr:g}: these are image classifiers, of whose scores the best one counts')
    if a.classes != b.classes:
        only = sorted(set(a.classes) ^ set(b.classes))
        what = f'{some(only)} only in one of them' if only else 'the same ones in another order'
        raise UserError(f'{a.path} and {b.path} were validated with different classes: {what}')
    first, second = (_by_image(predictions(run)) for run in (a, b))
    only = sorted(first.keys() ^ second.keys())
    if only:
        raise UserError(
            f'{a.path} and {b.path} were validated on different data: {len(only)} images are not in both, such as '
            f'{only[0]}; name runs with one validation set'
        )
    images = sorted(first)
    labels = np.array([first[image]['gt_label'] for image in images])
    other = [image for image in images if first[image]['gt_label'] != second[image]['gt_label']]
    if other:
        raise UserError(
            f'{a.path} and {b.path} were validated with different labels: {other[0]} and {len(other) - 1} more'
        )
    right = [np.array([part[image]['pred_label'] for image in images]) == labels for part in (first, second)]
    say(f'counting in {samples} resamples of {len(images)} images')
    weights = resamples(len(images), samples, seed)
    classes = []
    for label, name in enumerate(a.classes):
        own = labels == label
        counts = dict(
            objects=own.sum(),
            found_a=(own & right[0]).sum(),
            found_b=(own & right[1]).sum(),
            only_a=(own & right[0] & ~right[1]).sum(),
            only_b=(own & right[1] & ~right[0]).sum(),
        )
        accuracy = Difference(None, None)
        if own.any():
            accuracy = accuracy_difference(right[0][own], right[1][own], weights[:, own])
        classes.append(dict(name=name, **{key: int(n) for key, n in counts.items()}, accuracy=asdict(accuracy)))
    changes = []
    for i in np.flatnonzero(right[0] != right[1]):
        said = [
            dict(label=a.classes[part[images[i]]['pred_label']], score=part[images[i]]['pred_score'])
            for part in (first, second)
        ]
        file = first[images[i]]['img_path']
        changes.append(
            dict(image=images[i], file=file, gain=int(right[1][i]) - int(right[0][i]), label=a.classes[labels[i]])
            | dict(zip(('said_a', 'said_b'), said))
        )
    changes.sort(key=lambda change: (-change['gain'], change['image']))
    return dict(
        images=len(images),
        accuracy=asdict(accuracy_difference(*right, weights)),
        classes=classes,
        changes=changes,
        counts=_counts(changes, len(images)),
    )


def _by_image(entries: Sequence[dict]) -> dict[str, dict]:
    """By folder and name, which stay the same where the data lie elsewhere; by the path where these are not enough."""
    found = {'/'.join(Path(entry['img_path']).parts[-2:]): entry for entry in entries}
    return found if len(found) == len(entries) else {os.path.realpath(entry['img_path']): entry for entry in entries}


def _counts(changes: Sequence[dict], images: int) -> dict[str, int]:
    better, worse = (sum(sign * change['gain'] > 0 for change in changes) for sign in (1, -1))
    return {BETTER: better, WORSE: worse, 'same': images - better - worse}
