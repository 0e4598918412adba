"""Recall of proposals on images with different numbers of boxes."""

import logging

import mmdet.evaluation.functional.recall as stock
import mmdet.evaluation.metrics.coco_metric as coco_metric
import numpy as np
import pytest

from mmdet_norms.compat.recalls import eval_recalls

QUIET = logging.getLogger('quiet')


def boxes(generator, n, columns=4):
    corners = generator.uniform(0, 50, (n, 2))
    values = np.concatenate([corners, corners + generator.uniform(5, 30, (n, 2))], 1)
    return np.concatenate([values, generator.uniform(0, 1, (n, 1))], 1)[:, :columns].astype(np.float32)


@pytest.mark.parametrize('columns', [4, 5])
@pytest.mark.parametrize('seed', range(5))
def test_where_mmdets_works_it_gives_the_same(seed, columns):
    generator = np.random.default_rng(seed)
    gts = [boxes(generator, 3) for _ in range(4)]
    found = [boxes(generator, 7, columns) for _ in range(4)]
    arguments = dict(proposal_nums=(1, 3, 10), iou_thrs=(0.1, 0.3, 0.5), logger=QUIET)
    np.testing.assert_allclose(eval_recalls(gts, found, **arguments), stock.eval_recalls(gts, found, **arguments))


def test_images_with_different_numbers_of_boxes_count_box_by_box():
    box = np.array([[0, 0, 10, 10]], np.float32)
    far = box + 100
    gts = [np.concatenate([box, far]), box, np.zeros((0, 4), np.float32), None]
    found = [box, np.zeros((0, 4), np.float32), box, box]
    assert eval_recalls(gts, found, (1, 10), (0.5,), QUIET).tolist() == [[1 / 3], [1 / 3]]
    assert np.isnan(eval_recalls([None], [box], (1,), (0.5,), QUIET)).all()


def test_mmdets_still_fails_there_and_is_replaced():
    with pytest.raises(ValueError):  # when it does not any more, mmdet_norms/compat/recalls.py can go
        stock.eval_recalls([np.ones((1, 4)), np.ones((2, 4))], [np.ones((3, 4))] * 2, (1,), (0.5,), QUIET)
    assert coco_metric.eval_recalls is eval_recalls
