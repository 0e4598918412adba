"""Resampled AP is COCOeval's: of the images as they are, and of a data set that has images several times."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from mmdet_norms.experiments.bootstrap import (
    Difference,
    Matches,
    accuracy_difference,
    difference,
    mean_over_classes,
    resamples,
)

IMAGES, SIDE = 9, 200


def scene(seed, kind):
    """Annotations and detections of three classes: crowds, objects of all sizes, equal scores, images without any."""
    rng = np.random.default_rng(seed)
    annotations, entries = [], []
    for image in range(1, IMAGES + 1):
        for _ in range(rng.integers(0, 7) if image % 4 else 0):
            width, height = rng.choice([12, 50, 120], 2) + rng.integers(0, 8, 2)
            x, y = rng.integers(0, 70, 2)
            category = int(rng.choice([3, 5], p=[0.7, 0.3]))  # of 8 there is no object
            crowd = int(rng.random() < 0.15)
            box = [int(v) for v in (x, y, width, height)]
            annotations.append(
                dict(id=len(annotations) + 1, image_id=image, category_id=category, bbox=box, iscrowd=crowd)
            )
            for _ in range(rng.integers(0, 4)):
                shifted = [float(v) for v in np.array(box) + rng.normal(0, 0.08, 4) * [width, height, width, height]]
                wrong = rng.random() < 0.2
                entries.append(entry(image, int(rng.choice([3, 5, 8])) if wrong else category, shifted, rng))
        for _ in range(rng.integers(0, 3)):
            box = [float(v) for v in (*rng.integers(0, 90, 2), *rng.integers(8, 90, 2))]
            entries.append(entry(image, int(rng.choice([3, 5, 8])), box, rng))
    for image in range(1, IMAGES + 1):  # equal ones in several images, none within one
        of_image = [e for e in entries if e['image_id'] == image]
        for e, score in zip(of_image, rng.permutation(24)):
            e['score'] = float(score + 1) / 25
    for annotation in annotations:
        x, y, w, h = annotation['bbox']
        annotation.update(area=w * h / 2, segmentation=[[x, y, x + w, y, x + w, y + h]])
    for e in entries if kind == 'segm' else ():
        e['segmentation'] = rle(e['bbox'])
    return annotations, entries


def entry(image, category, box, rng):
    return dict(image_id=image, category_id=category, bbox=box, score=float(rng.random()))


def rle(box):
    x, y, w, h = box
    coco = truth([], 1)
    return coco.annToRLE(dict(image_id=1, segmentation=[[x, y, x + w, y, x + w, y + h]]))  # half of the box


def truth(annotations, images=IMAGES):
    coco = COCO()
    coco.dataset = dict(
        images=[dict(id=i + 1, width=SIDE, height=SIDE) for i in range(images)],
        categories=[dict(id=i, name=str(i)) for i in (3, 5, 8)],
        annotations=[dict(annotation) for annotation in annotations],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def by_coco(annotations, entries, kind, images):
    """Threshold x class x area: COCOeval's AP."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = truth(annotations, images)
        entries = [{k: v for k, v in e.items() if (kind, k) != ('segm', 'bbox')} for e in entries]
        evaluation = COCOeval(coco, coco.loadRes(entries), kind)
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval['precision'][..., 0]  # threshold x recall x class x area
    return np.where((precision < 0).any(1), np.nan, precision.mean(1)), precision


def repeated(annotations, entries, weights):
    """The data set in which each image is there as often as its weight says, under new ids."""
    new, number = [[], []], 0
    for image, weight in enumerate(weights, 1):
        for _ in range(weight):
            number += 1
            for source, out in zip((annotations, entries), new):
                out += [dict(item, image_id=number) for item in source if item['image_id'] == image]
    for i, annotation in enumerate(new[0], 1):
        annotation['id'] = i
    return *new, number


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
@pytest.mark.parametrize('seed', range(3))
def test_ap_of_weighted_images_is_cocoevals_of_repeated_images(kind, seed):
    annotations, entries = scene(seed, kind)
    matches = Matches(truth(annotations), entries, kind)
    weights = np.vstack([np.ones((1, IMAGES), int), resamples(IMAGES, 4, seed)])
    found = matches.average_precision(weights)
    assert found.shape == (5, 10, 3, 4) and np.nanmax(found[0]) > 0.3
    for row, ap in zip(weights, found):
        expected, precision = by_coco(*repeated(annotations, entries, row)[:2], kind, row.sum())
        np.testing.assert_allclose(ap, expected, rtol=0, atol=1e-12)
        for area in range(4):
            of_area = precision[..., area][precision[..., area] > -1]
            overall = mean_over_classes(ap[..., area]).mean()
            assert np.isnan(overall) if not len(of_area) else overall == pytest.approx(of_area.mean(), abs=1e-12)
    assert np.isnan(found[:, :, 2]).all()  # the class without objects
    at_once = matches.average_precision(np.repeat(weights, 3, axis=0))
    np.testing.assert_array_equal(at_once[::3], found)


def test_large_sets_are_counted_in_parts(monkeypatch):
    annotations, entries = scene(0, 'bbox')
    matches, weights = Matches(truth(annotations), entries, 'bbox'), resamples(IMAGES, 7)
    whole = matches.average_precision(weights)
    monkeypatch.setattr('mmdet_norms.experiments.bootstrap._AT_A_TIME', 50)
    np.testing.assert_array_equal(matches.average_precision(weights), whole)


def test_classes_that_do_not_count_are_left_out_and_no_detections_are_ap_0():
    annotations, entries = scene(1, 'bbox')
    one = np.ones((1, IMAGES), int)
    every = Matches(truth(annotations), entries, 'bbox').average_precision(one)
    some = Matches(truth(annotations), entries, 'bbox', [5]).average_precision(one)
    np.testing.assert_array_equal(some[:, :, 0], every[:, :, 1])
    nothing = Matches(truth(annotations), [], 'bbox').average_precision(one)
    np.testing.assert_array_equal(nothing, np.where(np.isnan(every), np.nan, 0))


def test_outcomes_say_what_was_found_and_what_is_false():
    boxes = [[10, 10, 40, 40], [90, 90, 40, 40], [10, 120, 40, 40]]
    annotations = [
        dict(id=i + 1, image_id=1, category_id=3, bbox=box, area=1600, iscrowd=int(i == 2), segmentation=[])
        for i, box in enumerate(boxes)
    ]
    rng = np.random.default_rng(0)
    entries = [entry(1, 3, box, rng) for box in (boxes[0], boxes[0], boxes[2], [150, 10, 30, 30])]
    for e, score in zip(entries, (0.8, 0.9, 0.7, 0.6)):
        e['score'] = score
    (found,) = Matches(truth(annotations), entries, 'bbox').outcomes()
    assert (found.image, found.category, found.objects) == (1, 3, (1, 2))
    assert found.found == {1: 0.9} and found.false == (0.8, 0.6)  # twice the same; what is in a crowd does not count


def test_an_interval_covers_as_often_as_it_says():
    rng, covered, seen = np.random.default_rng(0), 0, 0
    weights = resamples(80, 300, seed=1)
    for _ in range(200):
        easy = rng.random(80) < 0.5  # images that both are better at
        a, b = (np.where(easy, rng.random(80) < 0.9, rng.random(80) < high) for high in (0.3, 0.5))
        found = accuracy_difference(a, b, weights)
        covered += found.low <= 0.1 <= found.high
        assert found.low <= found.difference <= found.high
        same = accuracy_difference(a, np.where(easy, rng.random(80) < 0.9, rng.random(80) < 0.3), weights)
        seen += same.p < 0.05
    assert 180 <= covered <= 198 and seen <= 15


def test_mcnemar_is_scipys_and_equal_models_are_no_difference():
    a, b = np.array([1, 1, 1, 0, 0, 0, 0, 1], bool), np.array([1, 0, 1, 1, 1, 1, 1, 1], bool)
    weights = resamples(8, 500)
    assert accuracy_difference(a, b, weights).p == stats.binomtest(4, 5).pvalue
    a = np.tile(a, 3)
    same = accuracy_difference(a, a, resamples(24, 500))
    assert same == Difference(0.5, 0.5, 0.0, 0.0, 0.0, 1.0) and not same.is_seen


def test_few_images_give_no_interval():
    right = np.arange(19) % 3 > 0
    found = accuracy_difference(right, ~right, resamples(19, 500))
    assert found.low is None and not found.is_seen and found.p == stats.binomtest(7, 19).pvalue
    annotations, entries = scene(0, 'bbox')
    matches = Matches(truth(annotations), entries, 'bbox')
    objects = [a for a in annotations if not a['iscrowd']]
    assert matches.images_with_objects(0) == len({a['image_id'] for a in objects}) == 7
    discs = [a for a in objects if a['category_id'] == 5 and a['area'] < 32**2]
    assert matches.images_with_objects(1, 1) == len({a['image_id'] for a in discs}) < 7


def test_what_few_resamples_have_gets_no_interval():
    few = np.where(np.arange(100) < 90, 0.5, np.nan)
    assert difference(0.4, 0.5, few, few, 99) == Difference(0.4, 0.5, pytest.approx(0.1))
    assert difference(np.nan, 0.5, few, few, 99) == Difference(None, 0.5)
    many = np.where(np.arange(100) < 99, 0.5, np.nan)
    assert difference(0.4, 0.5, many, many + 0.1, 99).is_seen
