"""Top-k accuracy against sorting, with ties, NaN, few classes, and two processes."""

import os

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from torch.utils.data import DataLoader

from helpers.processes import run_in_two
from mmdet_norms.classification import Accuracy
from mmdet_norms.errors import UserError


def evaluate(scores, labels, classes=None, size=None, batch=4, **options):
    metric = Accuracy(**options)
    metric.dataset_meta = dict(classes=classes) if classes else None
    for i in range(0, len(labels), batch):
        samples = zip(torch.as_tensor(scores)[i : i + batch], labels[i : i + batch])
        metric.process(None, [dict(pred_score=score, gt_label=torch.tensor(int(label))) for score, label in samples])
    return metric.evaluate(size or len(labels))


def test_the_part_among_the_k_best():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((50, 7)), rng.integers(0, 7, 50)
    best = np.argsort(-scores, 1)
    expected = {f'accuracy/top{k}': np.mean([labels[i] in best[i, :k] for i in range(50)]) for k in (1, 3, 5)}
    assert evaluate(scores, labels, topk=(1, 3, 5)) == pytest.approx(expected)


def test_of_equal_scores_the_first_class_is_the_better_one():
    scores, labels = torch.tensor([[0.25] * 4] * 4), torch.arange(4)
    assert evaluate(scores, labels, topk=(1, 2, 4)) == {'accuracy/top1': 0.25, 'accuracy/top2': 0.5, 'accuracy/top4': 1}
    assert [int(score.argmax()) for score in scores] == [0] * 4  # as pred_label
    assert evaluate(torch.tensor([[0.1, 0.45, 0.45]]), [2], topk=(1, 2)) == {'accuracy/top1': 0, 'accuracy/top2': 1}


def test_a_diverged_model_is_wrong():
    scores = torch.full((3, 6), float('nan'))
    scores[1] = torch.tensor([float('nan'), 1, 0, 0, 0, 0])
    scores[2] = torch.tensor([0.0, 1, 0, 0, 0, 0])
    assert evaluate(scores, [0, 1, 1], topk=(1, 5)) == pytest.approx({'accuracy/top1': 1 / 3, 'accuracy/top5': 1 / 3})


def test_fewer_classes_than_k():
    assert evaluate(torch.eye(3), [0, 1, 1], topk=(1, 5)) == pytest.approx({'accuracy/top1': 2 / 3})


def test_every_class_that_has_images():
    scores, labels = torch.eye(4)[[0, 0, 1, 3]], [0, 1, 1, 3]
    expected = {'accuracy/top1': 0.75, 'accuracy/top1_ant': 1.0, 'accuracy/top1_bee': 0.5, 'accuracy/top1_dog': 1.0}
    assert evaluate(scores, labels, ('ant', 'bee', 'cat', 'dog'), topk=1, per_class=True) == expected
    assert 'accuracy/top1_3' in evaluate(scores, labels, topk=1, per_class=True)


def test_no_images():
    assert evaluate(torch.zeros(0, 3), []) == {}


@pytest.mark.parametrize('topk', [0, (1, 0), (), (1.5,), 'x'])
def test_a_wrong_k_is_named(topk):
    with pytest.raises(UserError, match=r'Accuracy: topk=.* such as \(1, 5\)'):
        Accuracy(topk=topk)


def in_two(rank, folder, round_up):
    os.chdir(folder)  # mmengine collects in a folder below it
    loader = DataLoader(range(7), 2, sampler=DefaultSampler(range(7), shuffle=False, round_up=round_up))
    metric = Accuracy(topk=1, per_class=True)
    metric.dataset_meta = dict(classes=tuple('abcdefg'))
    for batch in loader:  # the first image alone is right; it is the one that fills up the second process's part
        scores = torch.eye(7)[torch.where(batch == 0, batch, (batch + 1) % 7)]
        metric.process(None, [dict(pred_score=s, gt_label=i) for s, i in zip(scores, batch)])
    return metric.evaluate(7)


@pytest.mark.parametrize('round_up', [True, False])
def test_two_processes_count_every_image_once(tmp_path, round_up):
    expected = {'accuracy/top1': 1 / 7, 'accuracy/top1_a': 1.0} | {f'accuracy/top1_{c}': 0.0 for c in 'bcdefg'}
    assert run_in_two(tmp_path, in_two, tmp_path, round_up) == [pytest.approx(expected)] * 2
