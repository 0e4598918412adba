"""``--per-class`` of train and test: what evaluates tells classes apart."""

import copy

from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.config import Config

from mmdet_norms.classification.accuracy import Accuracy
from mmdet_norms.engine.results import PER_CLASS_SUFFIX, TOP1_OF_CLASS, PerClassCocoMetric
from mmdet_norms.entries import class_of, is_a, name_of

from .common import add_hook

_GO_BY = ('default_hooks', 'custom_hooks', 'param_scheduler')


def tell_classes_apart(metric: dict, with_subclasses: bool = False) -> bool:
    """Have a metric of a config give the results of each class, too; False if it is left as it is.

    Args:
        with_subclasses: also one derived from those that are known to do so, by the argument that these have.
    """
    kind = class_of(metric, METRICS)
    if kind is Accuracy or (with_subclasses and is_a(metric, 'Accuracy', METRICS)):
        metric['per_class'] = True
    elif kind in (CocoMetric, PerClassCocoMetric):
        metric['type'] = 'PerClassCocoMetric'
    elif with_subclasses:  # of CocoMetric, with work of its own
        metric['classwise'] = True
    else:
        return False
    return True


def validate_per_class(cfg: Config) -> list[str]:
    """Have every validation of a training write the results of each class to results.json.

    A line of a log and a tracker are spared them, unless the config asked for them by itself. Where it goes by one of
    them, such as ``save_best='coco/car_precision'``, all is left as it is: the name would be another.

    Returns:
        Notes, where nothing is changed.
    """
    if any(name in repr([cfg.get(key) for key in _GO_BY]) for name in (PER_CLASS_SUFFIX, TOP1_OF_CLASS)):
        return ['--per-class: the config goes by the result of a class, and is left as it is']
    evaluator = copy.deepcopy(cfg.get('val_evaluator'))
    metrics = evaluator if isinstance(evaluator, (list, tuple)) else [evaluator] if evaluator else []
    is_asked_for = any(_is_loud(metric) for metric in metrics)
    told = [metric for metric in metrics if tell_classes_apart(metric)]
    if not told:
        names = ', '.join(name_of(metric, METRICS) for metric in metrics) or 'none'
        return [f'--per-class: is for CocoMetric and Accuracy; val_evaluator, {names}, is left as it is']
    if not is_asked_for:
        for metric in told:
            if class_of(metric, METRICS) is PerClassCocoMetric:
                metric['table'] = False
        add_hook(cfg, 'ClassResultsHook')
    cfg.val_evaluator = evaluator
    return []


def _is_loud(metric: dict) -> bool:
    if class_of(metric, METRICS) is PerClassCocoMetric:
        return metric.get('table', True)
    return bool(metric.get('classwise') or metric.get('per_class'))
