"""``--per-class`` of a training: which metrics it is for, and what it leaves as it is."""

import copy

import pytest
from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.config import Config

from mmdet_norms.classification.accuracy import Accuracy
from mmdet_norms.cli.per_class import validate_per_class

COCO = dict(type='CocoMetric', ann_file='a.json', metric=['bbox', 'segm'])
QUIET = dict(COCO, type='PerClassCocoMetric', table=False)
TOP = dict(type='Accuracy', topk=(1,))
VOC = dict(type='VOCMetric')


@pytest.mark.parametrize(
    'evaluator, changed',
    [
        (COCO, QUIET),
        (dict(COCO, type=CocoMetric), QUIET),
        (dict(COCO, type='mmdet.CocoMetric'), QUIET),
        (TOP, dict(TOP, per_class=True)),
        (dict(type=Accuracy), dict(type=Accuracy, per_class=True)),
        ([VOC, COCO], [VOC, QUIET]),
    ],
)
def test_metrics_that_know_classes_give_their_results(evaluator, changed):
    cfg = Config(dict(val_evaluator=copy.deepcopy(evaluator), test_evaluator=copy.deepcopy(evaluator)))
    assert validate_per_class(cfg) == [] and cfg.val_evaluator == changed
    assert cfg.test_evaluator == evaluator
    assert cfg.custom_hooks == [dict(type='ClassResultsHook')]


class OwnMetric(CocoMetric):
    def __init__(self, ann_file):
        super().__init__(ann_file)


@pytest.mark.parametrize(
    'evaluator, named',
    [
        (VOC, 'VOCMetric'),
        ([VOC, dict(type='LVISMetric')], 'VOCMetric, LVISMetric'),
        (dict(type='OwnMetric', ann_file='a.json'), 'OwnMetric'),
        (dict(type='mmpretrain.Accuracy'), 'Accuracy'),
        (dict(type='MultiDatasetsEvaluator', metrics=[COCO]), 'MultiDatasetsEvaluator'),
        (None, 'none'),
    ],
)
def test_others_are_left_as_they_are(evaluator, named, monkeypatch):
    monkeypatch.setitem(METRICS.module_dict, 'OwnMetric', OwnMetric)
    cfg = Config(dict(val_evaluator=copy.deepcopy(evaluator)))
    (note,) = validate_per_class(cfg)
    assert note.endswith(f'val_evaluator, {named}, is left as it is')
    assert cfg.val_evaluator == evaluator and 'custom_hooks' not in cfg


@pytest.mark.parametrize('asked', [dict(COCO, classwise=True), dict(COCO, type='PerClassCocoMetric')])
def test_who_asks_for_curves_of_classes_in_the_config_keeps_them(asked):
    cfg = Config(dict(val_evaluator=dict(asked)))
    assert validate_per_class(cfg) == []
    assert cfg.val_evaluator.type == 'PerClassCocoMetric' and 'custom_hooks' not in cfg


def test_a_config_of_a_run_that_had_the_option_stays_as_it_is():
    cfg = Config(dict(val_evaluator=dict(QUIET), custom_hooks=[dict(type='ClassResultsHook')]))
    assert validate_per_class(cfg) == []
    assert cfg.val_evaluator == QUIET and cfg.custom_hooks == [dict(type='ClassResultsHook')]


@pytest.mark.parametrize(
    'goes_by',
    [
        dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best=['coco/disc_precision']))),
        dict(custom_hooks=[dict(type='EarlyStoppingHook', monitor='accuracy/top1_disc')]),
        dict(param_scheduler=[dict(type='ReduceOnPlateauLR', monitor='coco/disc_precision')]),
    ],
)
def test_what_goes_by_the_result_of_a_class_finds_it(goes_by):
    cfg = Config(dict(val_evaluator=dict(COCO, classwise=True), **goes_by))
    before = cfg.to_dict()
    (note,) = validate_per_class(cfg)
    assert 'goes by the result of a class' in note and cfg.to_dict() == before
