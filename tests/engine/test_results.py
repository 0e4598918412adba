"""results.json, the table, and progress by the clock."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import MMLogger
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, get_priority
from pycocotools import mask as rle_codec

import mmdet_norms  # noqa: F401
from helpers import tiny
from mmdet_norms.engine import ClassResultsHook, PerClassCocoMetric, ResultsHook, TimedLoggerHook
from mmdet_norms.engine.picture import to_mask
from mmdet_norms.engine.results import kept_results, plain_results, results_table, write_json

METRICS = {
    'coco/bbox_mAP': 0.401, 'coco/bbox_mAP_50': 0.6, 'coco/bbox_mAP_75': 0.5,
    'coco/bbox_mAP_s': -1.0, 'coco/bbox_mAP_m': 0.3, 'coco/bbox_mAP_l': 0.2,
    'coco/segm_mAP': 0.352, 'coco/segm_mAP_50': 0.55, 'coco/segm_mAP_75': 0.45,
    'coco/segm_mAP_s': -1.0, 'coco/segm_mAP_m': 0.25, 'coco/segm_mAP_l': 0.15,
}  # fmt: skip


@pytest.fixture
def runner(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    return SimpleNamespace(
        work_dir=str(tmp_path),
        cfg=SimpleNamespace(filename='configs/a-name.py'),
        logger=logging.getLogger('test_results'),
        hooks=[],
        _train_loop=None,
        _load_from='epoch_3.pth',
    )


def test_results_are_written_without_the_prefix_and_with_their_origin(runner, tmp_path):
    ResultsHook().after_test_epoch(runner, METRICS)
    written = json.loads((tmp_path / 'results.json').read_text())
    assert written['bbox_mAP'] == 0.401 and written['segm_mAP_50'] == 0.55
    assert written['config'] == 'configs/a-name.py' and written['checkpoint'] == 'epoch_3.pth'
    assert not any(key.startswith('coco/') for key in written)


def test_the_table_is_logged_with_the_numbers_of_the_file(runner, caplog):
    ResultsHook().after_val_epoch(runner, METRICS)
    rows = [line.split('|')[1:-1] for line in caplog.text.splitlines() if line.startswith('|')]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 7}
    assert cells[''] == ['AP', 'AP50', 'AP75', 'APs', 'APm', 'APl']
    assert cells['bbox'] == ['0.401', '0.600', '0.500', '-', '0.300', '0.200']
    assert cells['segm'] == ['0.352', '0.550', '0.450', '-', '0.250', '0.150']


def test_a_model_that_detects_nothing_leaves_no_old_numbers(runner, tmp_path, caplog):
    hook = ResultsHook()
    hook.after_val_epoch(runner, METRICS)
    hook.after_val_epoch(runner, {})
    assert 'bbox_mAP' not in json.loads((tmp_path / 'results.json').read_text())
    assert 'gave no results' in caplog.text


def test_metrics_of_other_kinds_are_written_and_not_tabled(runner, tmp_path, caplog):
    ResultsHook().after_val_epoch(runner, {'pascal_voc/mAP': np.float32(0.5), 'matrix': np.eye(2)})
    written = json.loads((tmp_path / 'results.json').read_text())
    assert written['pascal_voc/mAP'] == 0.5 and 'matrix' not in written
    assert 'AP50' not in caplog.text


def test_a_format_only_run_leaves_earlier_results(runner, tmp_path, caplog):
    ResultsHook().after_test_epoch(runner, METRICS)
    before = (tmp_path / 'results.json').read_text()
    evaluator = SimpleNamespace(metrics=[SimpleNamespace(format_only=True)])
    runner._test_loop = SimpleNamespace(evaluator=evaluator)
    ResultsHook().after_test_epoch(runner, {})
    assert (tmp_path / 'results.json').read_text() == before and 'left as it was' in caplog.text
    evaluator.metrics.append(SimpleNamespace())  # one that evaluates, and found nothing
    ResultsHook().after_test_epoch(runner, {})
    assert 'bbox_mAP' not in (tmp_path / 'results.json').read_text()


def test_results_of_semi_supervised_runs_get_their_rows():
    table = results_table(plain_results({'teacher/coco/bbox_mAP': 0.31, 'student/coco/bbox_mAP': 0.3}))
    assert 'teacher/coco/bbox' in table and '0.310' in table and 'student/coco/bbox' in table


def test_undefined_values_are_valid_json():
    plain = plain_results({'coco/bbox_ring_precision': np.float64('nan'), 't': torch.tensor(0.25)})
    assert plain == {'bbox_ring_precision': None, 't': 0.25}
    json.loads(json.dumps(plain, allow_nan=False))


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / 'results.json'
    write_json(path, {'bbox_mAP': 0.5})
    with pytest.raises(TypeError):
        write_json(path, {'bbox_mAP': object()})
    assert json.loads(path.read_text()) == {'bbox_mAP': 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ['results.json']


def test_per_class_results_get_their_own_table():
    results = {'bbox_mAP': 0.5, 'bbox_ring_precision': 0.25, 'segm_mAP': 0.5, 'segm_ring_precision': None}
    assert ['ring', '0.250', '-'] in [
        [cell.strip() for cell in line.split('|')[1:-1]] for line in results_table(results).splitlines()
    ]


def test_per_class_results_of_boxes_and_masks_are_kept_apart(tmp_path):
    tiny.write_dataset(tmp_path)
    metric = PerClassCocoMetric(ann_file=str(tmp_path / 'annotations.json'), metric=['bbox', 'segm'])
    metric.dataset_meta = dict(classes=tiny.CLASSES)
    content = json.loads((tmp_path / 'annotations.json').read_text())
    for image in content['images']:
        metric.process({}, [perfect_boxes_empty_disc_masks(image, content['annotations'])])
    metrics = metric.evaluate(size=len(content['images']))
    assert metrics['coco/bbox_disc_precision'] == metrics['coco/bbox_box_precision'] == 1
    assert metrics['coco/segm_disc_precision'] == 0
    assert metrics['coco/segm_box_precision'] == 1
    assert metrics['coco/segm_mAP'] == 0.5


def test_a_detector_that_finds_nothing_has_an_ap_of_0(tmp_path):
    """mmdet gives none, and the norm that failed was in no comparison."""
    tiny.write_dataset(tmp_path)
    path = str(tmp_path / 'annotations.json')
    metric = PerClassCocoMetric(ann_file=path, metric=['bbox', 'segm'])
    metric.dataset_meta = dict(classes=tiny.CLASSES)
    content = json.loads((tmp_path / 'annotations.json').read_text())
    for image in content['images']:
        sample = perfect_boxes_empty_disc_masks(image, content['annotations'])
        for key, value in sample['pred_instances'].items():
            sample['pred_instances'][key] = value[:0]
        metric.process({}, [sample])
    metrics = metric.evaluate(size=len(content['images']))
    assert metrics['coco/bbox_mAP'] == metrics['coco/segm_mAP'] == 0
    assert metrics['coco/bbox_disc_precision'] == metrics['coco/segm_box_precision'] == 0
    assert set(metrics.values()) <= {0, -1}


@pytest.mark.parametrize('table', [True, False])
def test_the_table_of_mmdet_is_no_flood_in_every_validation(table, tmp_path, monkeypatch):
    tiny.write_dataset(tmp_path)
    said = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'callHandlers', lambda record: said.append(record.msg))
    path = str(tmp_path / 'annotations.json')
    metric = PerClassCocoMetric(ann_file=path, metric=['bbox', 'segm'], table=table)
    metric.dataset_meta = dict(classes=tiny.CLASSES)
    content = json.loads((tmp_path / 'annotations.json').read_text())
    for image in content['images']:
        metric.process({}, [perfect_boxes_empty_disc_masks(image, content['annotations'])])
    metric.evaluate(size=len(content['images']))
    assert sum('| mAP_50 |' in text for text in said) == 2 * table
    assert sum('_mAP_copypaste' in text for text in said) == 2
    assert not MMLogger.get_current_instance().filters


@pytest.mark.parametrize('count', [2, 30])
def test_results_of_classes_are_in_the_file_only(count, runner, tmp_path, caplog):
    classes = {f'coco/{kind}_c{i}_precision': 0.1 for kind in ('bbox', 'segm') for i in range(count)}
    metrics, top = METRICS | classes, {'accuracy/top1': 0.5, 'accuracy/top1_a': 0.5}
    runner.hooks.append(ClassResultsHook())
    runner.hooks[0].after_val_epoch(runner, metrics)
    assert metrics == METRICS  # which all other hooks get
    ResultsHook().after_val_epoch(runner, metrics)
    written = json.loads((tmp_path / 'results.json').read_text())
    assert written['segm_c1_precision'] == 0.1 and written['segm_mAP'] == 0.352
    assert ('AP per class' in caplog.text) == (count < 20) != ('those of the classes, too' in caplog.text)
    runner.hooks[0].after_val_epoch(runner, top)
    ResultsHook().after_val_epoch(runner, top)
    written = json.loads((tmp_path / 'results.json').read_text())
    assert written['accuracy/top1_a'] == 0.5 and 'bbox_c1_precision' not in written and len(top) == 1
    assert get_priority(ClassResultsHook.priority) < get_priority(RuntimeInfoHook.priority)


def perfect_boxes_empty_disc_masks(image, annotations):
    found = [a for a in annotations if a['image_id'] == image['id'] and not a['iscrowd']]
    boxes = torch.tensor([a['bbox'] for a in found]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = []
    for a in found:
        mask = to_mask(a['segmentation'], image['height'], image['width'])
        if a['category_id'] == 1:
            mask = np.zeros_like(mask)
        masks.append(rle_codec.encode(np.asfortranarray(mask.astype(np.uint8))))
    predicted = dict(
        bboxes=boxes,
        scores=torch.ones(len(found)),
        labels=torch.tensor([a['category_id'] - 1 for a in found]),
        masks=masks,
    )
    return dict(pred_instances=predicted, img_id=image['id'], ori_shape=(image['height'], image['width']))


def test_a_quiet_loop_logs_by_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('mmdet_norms.engine.progress.time.monotonic', lambda: now[0])
    hook = TimedLoggerHook(interval=50, max_quiet_s=10)
    hook.before_val_epoch(None)
    due = []
    for index in range(60):
        now[0] += 3.0
        due.append(hook.every_n_inner_iters(index, 50))
    assert [index for index, line in enumerate(due) if line][:3] == [3, 7, 11]
    assert due[49]  # the stock rule still holds


def evaluate(runner, split, origin, value):
    runner._load_from, runner._train_loop = origin, None
    if split == 'val':
        runner._train_loop, (runner.epoch, runner.iter) = BaseLoop.__new__(EpochBasedTrainLoop), origin
    getattr(ResultsHook(), f'after_{split}_epoch')(runner, {'coco/bbox_mAP': value})


def test_results_of_another_checkpoint_are_kept(runner, tmp_path, caplog):
    def now():
        paths = sorted(tmp_path.glob('*.json'))
        return {path.name: json.loads(path.read_text())['bbox_mAP'] for path in paths}

    evaluate(runner, 'val', (1, 20), 0.1)
    evaluate(runner, 'val', (2, 40), 0.2)
    assert now() == {'results.json': 0.2}
    evaluate(runner, 'test', 'run/epoch_2.pth', 0.25)  # of what was validated
    assert now() == {'results.json': 0.25}
    evaluate(runner, 'test', './run/epoch_2.pth', 0.2)  # once more
    assert now() == {'results.json': 0.2} and 'are now in' not in caplog.text
    evaluate(runner, 'test', 'run/epoch_1.pth', 0.1)
    assert now() == {'results.json': 0.1, 'results-test-epoch_2.json': 0.2}
    assert 'had (test, epoch_2.pth) are now in' in caplog.text
    evaluate(runner, 'test', 'other/epoch_2.pth', 0.3)
    evaluate(runner, 'test', 'run/epoch_2.pth', 0.2)
    evaluate(runner, 'val', (3, 60), 0.4)
    expected = {'results.json': 0.4, 'results-test-epoch_1.json': 0.1}
    expected |= {'results-test-epoch_2.json': 0.2, 'results-test-epoch_2-2.json': 0.3}
    assert now() == expected
    evaluate(runner, 'test', 'run/best.pth', 0.5)
    assert now() == {**expected, 'results.json': 0.5, 'results-val-epoch_3.json': 0.4}
    (tmp_path / 'results-mine.json').write_text('{"bbox_mAP": 1, "split": "test"}')
    assert [path.name for path in kept_results(tmp_path)] == sorted(
        {*expected, 'results-val-epoch_3.json'} - {'results.json'}
    )


@pytest.mark.parametrize(
    'content', ['', '[]', '{"split": 7}', '{"split": "test", "checkpoint": [1]}', '{"bbox_mAP": 1}']
)
def test_whatever_lies_there_is_replaced(runner, tmp_path, content):
    (tmp_path / 'results.json').write_text(content)
    evaluate(runner, 'test', 'a/../../x y.pth', 0.3)
    evaluate(runner, 'test', 'b.pth', 0.4)
    assert json.loads((tmp_path / 'results.json').read_text())['bbox_mAP'] == 0.4
    assert json.loads((tmp_path / 'results-test-x_y.json').read_text())['bbox_mAP'] == 0.3
