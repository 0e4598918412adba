"""The comparison page: what it says of runs, and that it is a page."""

import ast
import copy
import csv
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset

from helpers.commands import options_of
from helpers.work_dirs import coco, dump, top_k, write_run
from mmdet_norms.cli import compare, train
from mmdet_norms.errors import UserError
from mmdet_norms.experiments import report, runs
from mmdet_norms.experiments.report import figures, metrics, pictures, published, tables
from mmdet_norms.experiments.report.answer import answer, method, verdict
from mmdet_norms.experiments.report.content import Content
from mmdet_norms.experiments.runs import Run
from mmdet_norms.placement import apply_norm

CLASSES = ('disc', 'a "b" <i>')
NOISE = (-0.002, 0.001, 0.002)  # of a seed, whatever the norm
OWN_NOISE = dict(bn=(0, 0, 0), mabn=(0.004, -0.003, 0.001), bnet5=(-0.003, 0.002, 0.0015))
LEVELS = {'bn': {2: 0.25, 16: 0.34}, 'mabn': {2: 0.33, 16: 0.345}, 'bnet5': {2: 0.253, 16: 0.341}}


def run_of(norm, batch_size, seed, value, cost=None, status='finished', metric='bbox_mAP', **labels):
    results = {metric: value} if value is not None else {}
    labels = dict(norm=norm, batch_size=batch_size, seed=seed, **labels)
    return Run(f'{norm}-{batch_size}-{seed}', labels, status, results, cost=cost or {})


def grid(levels=LEVELS, seeds=3):
    """Runs whose seeds have some of their noise in common."""
    return [
        run_of(norm, size, seed, round(ap + NOISE[seed] + OWN_NOISE[norm][seed], 4), cost(norm, size))
        for norm, sizes in levels.items()
        for size, ap in sizes.items()
        for seed in range(seeds)
    ]


def cost(norm, size):
    times = dict(bn=1.0, mabn=1.5, bnet5=1.005)[norm]
    return dict(
        seconds_per_iteration=0.1 * size * times, peak_memory_mb=1000 * times, parameters=4e6, peak_memory_of='GPU'
    )


def said(found):
    return ' '.join([*answer(found), method(found)])


def _set(key, value):
    return lambda cfg: cfg.merge_from_dict({key: value})


def _repeat(cfg):
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=8, dataset=cfg.train_dataloader.dataset)


def _adamw(cfg):
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=0.02, weight_decay=0.0001)


def _batch(size, rate=None, warm_up=500):
    """What ``--batch-size`` makes of a config, or less than that."""

    def change(cfg):
        cfg.optim_wrapper.optimizer.lr = 0.02 * size / 16 if rate is None else rate
        cfg.param_scheduler[0].end = warm_up
        return size

    return change


# What was changed of a config of 1x, each by itself.
WRONG = {
    '50 images': _set('train_dataloader.dataset.indices', 50),
    'a subset': _set('train_dataloader.dataset.ann_file', 'annotations/instances_train2017_5percent.json'),
    'trained on val': _set('train_dataloader.dataset.ann_file', 'annotations/instances_val2017.json'),
    'images without boxes': _set('train_dataloader.dataset.filter_cfg', None),
    'each image 8 times': _repeat,
    '10 batches': _set('train_dataloader.num_batch_per_epoch', 10),
    'no shuffle': _set('train_dataloader.sampler.shuffle', False),
    '10 images validated': _set('val_dataloader.dataset.indices', 10),
    'small images validated': _set('val_dataloader.dataset.pipeline.1.scale', (400, 240)),
    'another metric': _set('val_evaluator.iou_thrs', [0.5]),
    'lr 1e-6': _set('optim_wrapper.optimizer.lr', 1e-6),
    'AdamW': _adamw,
    'momentum': _set('optim_wrapper.optimizer.momentum', 0.5),
    'weight decay': _set('optim_wrapper.optimizer.weight_decay', 0.0),
    'clipped': _set('optim_wrapper.clip_grad', dict(max_norm=1)),
    'AMP': _set('optim_wrapper.type', 'AmpOptimWrapper'),
    'backbone stands still': _set('optim_wrapper.paramwise_cfg', dict(custom_keys=dict(backbone=dict(lr_mult=0)))),
    'no schedule': _set('param_scheduler', None),
    'an earlier step': _set('param_scheduler.1.milestones', [1, 2]),
    'a longer warm-up': _set('param_scheduler.0.end', 5000),
    'batch 512, lr as it was': _batch(512, rate=0.02, warm_up=16),
    'batch 2, lr as it was': _batch(2, rate=0.02, warm_up=4000),
    'batch 2, warm-up as it was': _batch(2),
    'EMA': _set('custom_hooks', [dict(type='EMAHook')]),
    'EMA beside the defaults': _set('default_hooks.ema', dict(type='EMAHook')),
    'somebody freezes': _set('custom_hooks', [dict(type='FreezeHook', layers=['neck'])]),
    'precise BN': _set('custom_hooks', [dict(type='PreciseBNHook', num_images=200)]),
    'starts in part': _set('custom_hooks', [dict(type='StartHook', partial=dict(new=['neck']))]),
    'another start': _set('load_from', 'some.pth'),
    'statistics of all GPUs': _set('sync_bn', 'torch'),
    'geometry': _set('model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio', 2),
    'smaller pooling': _set('model.roi_head.bbox_roi_extractor.roi_layer.aligned', False),
}
RIGHT = {
    'as it is': lambda cfg: None,
    'another place': _set('train_dataloader.dataset.data_root', '/elsewhere/'),
    'a full path': _set('val_dataloader.dataset.ann_file', '/elsewhere/annotations/instances_val2017.json'),
    'workers': _set('train_dataloader.num_workers', 8),
    'intervals': _set('default_hooks', dict(logger=dict(interval=1), checkpoint=dict(interval=12, save_best='auto'))),
    'validated every 3 epochs': _set('train_cfg.val_interval', 3),
    'a seed': _set('randomness', dict(seed=3, deterministic=True)),
    'hooks of train': _set('custom_hooks', [dict(type='CostHook'), dict(type='StartHook'), dict(type='NormHook')]),
    'batch 2': _batch(2, warm_up=4000),
    'batch 3, rounded': _batch(3, rate=0.00375, warm_up=2667),
    'batch 512': _batch(512, warm_up=16),
}


@pytest.fixture(scope='module')
def coco_root(tmp_path_factory):
    """COCO's classes and names of files, of 64 grey images."""
    root = tmp_path_factory.mktemp('coco')
    (root / 'annotations').mkdir()
    classes = [dict(id=i + 1, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])]
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        images = [dict(id=i + 1, file_name=f'{i}.png', width=64, height=64) for i in range(64)]
        for image in images:
            cv2.imwrite(str(root / split / image['file_name']), np.full((64, 64, 3), 127, np.uint8))
        boxes = [
            dict(id=i + 1, image_id=i + 1, category_id=i % 80 + 1, bbox=[0, 0, 40, 40], area=1600, iscrowd=0,
                 segmentation=[[0, 0, 40, 0, 40, 40, 0, 40]])
            for i in range(64)
        ]  # fmt: skip
        dump(
            root / 'annotations' / f'instances_{split}.json', dict(images=images, annotations=boxes, categories=classes)
        )
    return root


class TestAnswer:
    def test_names_norm_batch_size_gap_cost_and_how_sure(self):
        found = Content(grid())
        assert verdict(found).startswith('MABN ahead of BN at batch size 2; ')
        first = answer(found)[0]
        assert re.match(r'At batch size 2, MABN has the highest box AP, 33\.\d: 8\.\d above BN \(95 % interval ', first)
        assert (
            '3 seeds, p ' in first
            and "MABN takes 1.50 times BN's time per iteration and 1.50 times BN's memory" in first
        )
        assert 'BN loses 9.' in said(found) and "Holm's correction for the 2 comparisons" in said(found)

    def test_noise_is_said_to_be_noise(self):
        found = Content(grid({'bn': {2: 0.3}, 'bnet5': {2: 0.3002}}))
        assert verdict(found) == 'No difference seen from BN'
        words = r'but against BN there is no difference seen: 0\.0, 95 % interval -0\.\d to 0\.\d, p = 0\.\d+, 3 seeds'
        assert re.search(words, said(found))

    def test_what_is_seen_only_alone_is_not_certain(self):
        found = Content(grid({'bn': {2: 0.3}, 'mabn': {2: 0.3105}, 'bnet5': {2: 0.3}}))
        assert verdict(found) == 'MABN perhaps ahead of BN'
        words = r'Against BN that is not certain: \+1\.1, 95 % interval 0\.\d to 2\.\d, p = 0\.0\d+ by itself, 0\.\d'
        assert re.search(words, said(found))

    def test_the_baseline_may_be_best(self):
        found = Content(grid({'bn': {2: 0.4}, 'mabn': {2: 0.3}, 'bnet5': {2: 0.2}}))
        assert verdict(found) == 'BN ahead of MABN and BNET-5'
        assert 'the next is MABN, -9.9, 95 % interval' in said(found)

    def test_what_is_below_is_named_as_far_as_that_can_be_said(self):
        """Of 22 below, not certain, and of 22 below in one seed, it said 'no difference seen'."""
        levels = {'gn': 0.301, 'mabn': 0.289, 'bnet5': 0.25}
        found = Content(
            [run_of('bn', 2, seed, 0.3 + NOISE[seed]) for seed in range(3)]
            + [
                run_of(norm, 2, s, levels[norm] + (0.006 * (s - 1) if norm == 'mabn' else 0))
                for norm in levels
                for s in range(3)
            ]
            + [run_of('cbn', 2, 0, 0.07), run_of('bn', 4, 0, 0.3), run_of('bn', 4, 1, 0.3)]
            + [run_of('gn', 4, 0, 0.3), run_of('gn', 4, 1, 0.3), run_of('cbn', 4, 1, 0.1)]
        )
        assert verdict(found) == (
            'BNET-5 behind BN, MABN perhaps behind it at batch size 2; one seed only of CBN (-22.8) at 2; '
            'no difference seen from BN at 4; one seed only of CBN (-20.0) at 4'
        )
        first, second, falls = answer(found)
        assert re.search(
            r'Below BN: BNET-5 by 5\.0 \(4\.5 to 5\.6\)\. Perhaps below BN: MABN by 1\.1 \(0\.\d to \d\.\d\)\. '
            r'CBN is 22\.8 below BN in one seed: how sure that is cannot be said\.$',
            first,
        )
        assert second.endswith('CBN is 20.0 below BN in one seed: how sure that is cannot be said.')
        assert falls.endswith('CBN loses 3.0 in one seed.') and '"Perhaps" is what' in method(found)

    def test_what_is_not_seen_is_said_with_the_widest_interval(self):
        loose = dict(bn=(0, 0), gn=(0.001, 0.001), mabn=(0, 0.08), bnet5=(0, 0.01))
        runs = [
            run_of(norm, 2, s, 0.3 + above + (s - 1) * spread)
            for norm, (above, spread) in loose.items()
            for s in range(3)
        ]
        found = Content(runs)
        assert verdict(found) == 'No difference seen from BN'
        assert re.search(
            r'seen of MABN and BNET-5; the widest interval is that of MABN, -19\.9 to 19\.9\.$', answer(found)[0]
        )

    def test_means_of_different_seeds_are_not_ranked(self):
        """The mean of GN is higher, GN is not."""
        values = dict(bn=(0.4, 0.41, 0.42, 0.1), gn=(0.35, 0.361, 0.37))
        found = Content([run_of(norm, 2, seed, v) for norm in values for seed, v in enumerate(values[norm])])
        assert verdict(found) == 'BN ahead of GN'
        words = r'not all have the same seeds.* over the seeds of both: GN -5\.0, 95 % interval -5\.1 to -4\.8'
        assert re.search(words, said(found)) and 'highest' not in said(found)
        found = Content([run_of('bn', 2, 0, 0.4), run_of('bn', 2, 1, 0.1), run_of('gn', 2, 0, 0.35)])
        assert verdict(found) == 'One seed only of GN (-5.0)' and 'GN -5.0' in said(found)

    def test_a_headline_names_some_of_many(self):
        low = [run_of(f'n{i}', 2, s, 0.3 - 0.02 * i + NOISE[s]) for i in range(1, 7) for s in range(3)]
        base = [run_of('bn', 2, s, 0.3 + NOISE[s]) for s in range(3)]
        assert verdict(Content(base + low)) == 'BN ahead of n1, n2, n3 and 3 others'

    def test_one_seed_is_no_proof(self):
        found = Content(grid(seeds=1))
        assert 'of one seed: how sure that is cannot be said' in said(found)
        assert 'MABN has the highest value, of one seed' in verdict(found)
        assert any('Every setting has one seed' in note for note in found.notes)

    @pytest.mark.parametrize('seeds', [1, 3])
    def test_equal_means_are_said_to_be_equal(self, seeds):
        def runs(**values):
            return [run_of(norm, 2, s, v + NOISE[s]) for norm, v in values.items() for s in range(seeds)]

        found = Content(runs(bn=0.3, gn=0.3))
        assert 'At batch size 2, BN and GN have the same box AP, ' in said(found) and 'highest' not in said(found)
        assert ('GN 0.0, one seed' if seeds == 1 else 'GN no difference seen: 0.0, ') in said(found)
        told = 'BN and GN have the same value, of one seed' if seeds == 1 else 'No difference seen from BN'
        assert verdict(found) == told
        found = Content(runs(bn=0.3, gn=0.3, mabn=0.2))
        assert 'BN and GN have the same, highest box AP, ' in said(found)
        told = 'BN and GN have the highest value, of one seed' if seeds == 1 else 'MABN behind BN'
        assert verdict(found) == told
        found = Content(runs(bn=0.2, gn=0.3, mabn=0.3))
        assert re.search(r'GN and MABN have the same.* Against BN: GN \+10\.0, .*; MABN \+10\.0, ', said(found))

    def test_what_did_not_finish_is_in_no_mean(self):
        broken = run_of('mabn', 2, 9, 0.001, status='unfinished')
        failed = run_of('gn', 2, 0, None, status='failed')
        found = Content([*grid(), broken, failed])
        assert found.values(found.best(2)[0]).keys() == {0, 1, 2}
        assert found.notes[:2] == [
            '1 of 20 runs is unfinished, and counted in no mean.',
            '1 of 20 runs failed, and counted in no mean.',
        ]
        assert 'GN' in [method.name for method in found.methods]  # as one of which nothing is known
        with pytest.raises(UserError, match=r'no run has come to its end.*1 unfinished, 1 failed'):
            Content([broken, failed])

    def test_costs_nobody_measured_are_not_mentioned(self):
        assert 'takes' not in said(Content([run_of(r.labels['norm'], 2, r.labels['seed'], 0.3) for r in grid()[:6]]))

    def test_images_per_second_are_those_of_the_mean_time(self):
        times = (0.05, 0.06, 0.1)
        costs = [dict(seconds_per_iteration=time, images_per_second=32 / time) for time in times]
        (setting,) = Content([run_of('bn', 32, seed, 0.3, cost) for seed, cost in enumerate(costs)]).settings
        product = setting.cost('images_per_second') * setting.cost('seconds_per_iteration')
        assert product == pytest.approx(32)

    def test_other_norms_and_further_labels_have_baselines_of_their_own(self):
        several = [
            run_of(norm, 2, seed, 0.3 + (norm != 'bn') * 0.1 * rho + NOISE[seed], rho=rho)
            for norm in ('bn', 'mine')
            for rho in (0, 1)
            for seed in range(3)
        ]
        found = Content(several)
        pairs = [(d.setting.method.name, d.baseline.method.name) for d in found.differences]
        assert pairs == [('mine (rho 0)', 'BN (rho 0)'), ('mine (rho 1)', 'BN (rho 1)')]
        by_label = Content(several, baseline='rho=0')
        assert by_label.baseline_name == 'rho 0' and len(by_label.differences) == 2
        assert Content(several, baseline='mine').baseline_name == 'mine'

    def test_batch_size_is_compared_with_that_of_the_baseline(self):
        found = Content(grid())
        fall = next(fall for fall in found.falls if fall.small.method.name == 'MABN')
        assert fall.effect.difference == pytest.approx(-0.015) and fall.more.difference == pytest.approx(0.075)
        assert found.falls[0].more is None

    @pytest.mark.parametrize(
        ('options', 'said'),
        [
            (dict(metric='bbox_mAP_5'), r"--metric bbox_mAP_5: .*did you mean 'bbox_mAP'\?.*choose one of: bbox_mAP"),
            (dict(baseline='mabm'), r"--baseline mabm: .*did you mean 'mabn'\?.*the runs have bn, mabn, bnet5"),
            (dict(baseline='lr=1'), r'--baseline lr=1: no run has it; the runs have the labels norm'),
        ],
    )
    def test_wrong_options(self, options, said):
        with pytest.raises(UserError, match=said):
            Content(grid(), **options)


class TestMetrics:
    def test_detectors_and_classifiers_are_two_reports(self):
        ones = [run_of('bn', 2, 0, 0.9, metric='accuracy/top1')]
        found = Content([*grid(), *ones])
        assert found.metric.key == 'bbox_mAP' and found.others == ones
        assert '--metric accuracy/top1 makes a report of them' in ' '.join(found.notes)
        top = Content([*grid(), *ones], metric='accuracy/top1')
        assert said(top).startswith(
            'At batch size 2, BN has a top-1 accuracy of 90.0 %; there is nothing to compare it with.'
        )

    def test_one_run_without_ap_does_not_choose_another_metric(self):
        """A NaN is no result. By AP50, which that run has as well, all others would be compared."""
        found = grid()
        for run in found:
            run.results['bbox_mAP_50'] = run.results['bbox_mAP'] + 0.1
        del found[0].results['bbox_mAP']
        assert Content(found).metric.key == 'bbox_mAP' and Content(found).others == found[:1]

    def test_seeds_are_in_the_order_of_numbers(self):
        assert Content([run_of('bn', 2, seed, 0.3) for seed in (10, 2, None, 0)]).seeds == [0, 2, 10, None]

    def test_a_run_without_results_is_no_silent_gap(self):
        """mmdet's metric has none where nothing is detected, which is the worst that a norm can do."""
        found = grid()
        found[0].results.clear()
        (note,) = (note for note in Content(found).notes if 'without a result' in note)
        assert note.startswith('1 run came to the end without a result, and is in no mean') and 'too high' in note

    def test_a_norm_that_never_left_its_warm_up_is_named(self):
        found = grid()
        found[6].cost['in_warm_up'] = found[7].cost['in_warm_up'] = ['MABN']
        (note,) = (note for note in Content(found).notes if 'warm-up' in note)
        assert note.startswith('MABN: 2 trainings ended within the warm-up of MABN, and measured what it is until then')

    def test_classes_are_no_metrics(self):
        results = coco('bbox', 0.3, CLASSES) | coco('segm', 0.2, CLASSES) | {'pascal_voc/mAP': 0.5}
        found = metrics.metrics([results])
        assert [m.name for m in found[:3]] == ['box AP', 'box AP50', 'box AP75'] and found[-1].key == 'pascal_voc/mAP'
        assert len(found) == 13
        assert metrics.of_classes(results, found[0]) == {'disc': 0.27, 'a "b" <i>': 0.29}
        top = metrics.metrics([top_k(0.5, CLASSES)])
        assert [m.name for m in top] == ['top-1 accuracy', 'top-5 accuracy']
        assert list(metrics.of_classes(top_k(0.5, CLASSES), top[0])) == list(CLASSES)

    def test_of_an_error_the_lowest_is_the_best(self):
        """Of CrowdHuman's miss rate, the norm that misses most was ahead, and better."""
        levels = dict(bn={2: 0.45, 16: 0.4}, gn={2: 0.57, 16: 0.5}, mabn={2: 0.31, 16: 0.3})
        noise = dict(bn=0.001, gn=-0.002, mabn=0.003)
        key = 'crowd_human/mMR'
        found = Content(
            [
                run_of(norm, size, seed, value + noise[norm] * seed, metric=key)
                for norm, sizes in levels.items()
                for size, value in sizes.items()
                for seed in range(3)
            ]
        )
        assert found.metric.is_lower_better
        assert verdict(found) == 'MABN ahead of BN, GN behind it at batch sizes 2 and 16'
        text = said(found)
        assert f'MABN has the lowest {key}, 0.313: 0.138 below BN' in text and 'Above BN: GN by 0.117' in text
        assert 'From batch size 16 to 2, GN rises by 0.070' in text and 'highest' not in text
        results, differences, falls = (tables.tables(found)[i] for i in (0, 1, 2))
        assert [row[0].text for row in results.rows if row[-1].kind == 'best'] == ['MABN', 'MABN']
        assert 'the best of each batch size' in results.caption and 'how much more a norm rises' in falls.caption
        assert {row[0].text: row[-1].text for row in differences.rows} == dict(GN='worse', MABN='better')
        loose = {norm: [0.3 + x * s for s in (1, 2, 4)] for norm, x in dict(bn=0.1, gn=0.011, mabn=0.01).items()}
        loose['gn'][2] += 0.01
        close = Content([run_of(norm, 2, seed, v, metric=key) for norm in loose for seed, v in enumerate(loose[norm])])
        words = r'GN, 0\.\d+ above it, is not told apart from it \(95 % interval -0\.\d+ to 0\.\d+\)'
        assert re.search(words, said(close))
        best = Content([run_of(norm, 2, 0, value, metric=key) for norm, value in dict(bn=0.4, gn=0.5).items()])
        assert verdict(best) == 'BN has the lowest value, of one seed'
        assert 'BN has the lowest crowd_human/mMR, 0.400; GN comes next' in said(best)

    @pytest.mark.parametrize(
        ('key', 'is_lower'),
        [('val_loss', True), ('loss_bbox', True), ('pose/RMSE', True), ('crowd_human/mAP', False), ('glossy', False)],
    )
    def test_which_metrics_are_errors(self, key, is_lower):
        (found,) = metrics.metrics([{key: 0.5}])
        assert found.is_lower_better == is_lower

    def test_a_published_row_is_beside_the_config_that_it_is_of(self):
        config = 'configs/mabn/mask-rcnn_r50-scratch_fpn_mabn_180k_coco.py'
        model, path = published._rows()['mask-rcnn_r50-scratch_fpn_mabn_180k_coco']
        cfg = published.Config.fromfile(path).to_dict()
        theirs = published.published(Run('', {}, 'finished', config=config, cfg=cfg))
        assert theirs['results']['bbox_mAP'] == model['Results'][0]['Metrics']['box AP'] / 100
        assert theirs['data'] == 'COCO'
        cfg['val_dataloader']['dataset']['metainfo'] = dict(classes=['cat'])
        assert published.published(Run('', {}, 'finished', config=config, cfg=cfg)) is None
        del cfg['val_dataloader']['dataset']['metainfo']
        cfg['model']['neck']['norm_cfg'] = dict(type='GN')
        assert published.published(Run('', {}, 'finished', config=config, cfg=cfg)) is None
        assert published.published(Run('', {}, 'finished', config='own.py', cfg=cfg)) is None

    @pytest.mark.parametrize(
        'change',
        [
            *('model.neck.norm_cfg.rho=0', 'model.backbone.depth=101', 'train_cfg.max_epochs=1', 'norm gn-ws'),
            *('model.backbone.init_cfg=None', 'train_dataloader.dataset.pipeline.2.scale=(1, 2)', None),
        ],
    )
    def test_a_published_row_is_of_that_model_and_that_length(self, change, tmp_path):
        """It stood beside every run whose norms have the same type: GN's beside GN + WS, CBN's beside rho 0."""
        norm = 'gn' if change == 'norm gn-ws' else 'cbn'
        name = f'mask-rcnn_r50_fpn_{norm}_1x_coco'
        cfg = published.Config.fromfile(published._rows()[name][1])
        if change == 'norm gn-ws':
            cfg.model = apply_norm(cfg.model, 'gn-ws')
        elif change is not None:
            key, _, value = change.partition('=')
            cfg.merge_from_dict({key: ast.literal_eval(value)})
        if cfg.model.backbone.init_cfg:
            cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='another/place/of/resnet50.pth')
        (tmp_path / 'now' / 'vis_data').mkdir(parents=True)
        cfg.dump(tmp_path / 'now' / 'vis_data' / 'config.py')  # as a run has it
        run = Run('', {}, 'finished', config=f'configs/{norm}/{name}.py', cfg=runs._config(tmp_path))
        assert (published.published(run) is None) == (change is not None)

    def test_a_published_row_is_that_of_the_norm(self):
        """Of a grid of one config, only the norm that the config names had one."""
        rows = published._rows()
        cfg = published.Config.fromfile(rows['mask-rcnn_r50_fpn_bnet5_1x_coco'][1])
        found = {}
        for norm in ('bnet5', 'bn', 'gn'):
            cfg.model = apply_norm(cfg.model, norm)
            name = f'mask-rcnn_r50_fpn_{norm}_1x_coco'
            cost = dict(parameters=rows[name][0]['Metadata']['Parameters'])
            run = Run('', {}, 'finished', config='mask-rcnn_r50_fpn_bnet5_1x_coco.py', cfg=cfg.to_dict(), cost=cost)
            found[norm] = (published.published(run) or {}).get('name')
        names = {norm: f'mask-rcnn_r50_fpn_{norm}_1x_coco' for norm in ('bnet5', 'bn')}
        assert found == dict(names, gn=None)  # that is one with CBN's box head

    @pytest.mark.parametrize(
        ('iterations', 'batch_size', 'is_there'),
        [(180000, 16, True), (1440000, 2, True), (180000, 2, False), (100, 16, False), (180000, None, True)],
    )
    def test_a_published_row_of_iterations_is_of_as_many_images(self, iterations, batch_size, is_there):
        """A training of 100 iterations had the row of 180000."""
        name = 'mask-rcnn_r50-scratch_fpn_mabn_180k_coco'
        cfg = published.Config(copy.deepcopy(published._config(published._rows()[name][1])))
        cfg.train_cfg.max_iters = iterations
        if batch_size == 2 and is_there:
            cfg.optim_wrapper.optimizer.lr /= 8
            warm_up, steps = cfg.param_scheduler
            warm_up.end, steps.end, steps.milestones = 4000, 1440000, [960000, 1280000]
        run = Run('', dict(batch_size=batch_size), 'finished', config=f'{name}.py', cfg=cfg.to_dict())
        assert (published.published(run) is not None) == is_there

    @pytest.mark.parametrize('change', [*WRONG, *RIGHT])
    def test_a_published_row_is_of_all_that_decides_the_result(self, change):
        """Of a run on 50 images, or at a learning rate of 1e-6, it said 'same model, data and number of images'."""
        name = 'mask-rcnn_r50_fpn_bnet5_1x_coco'
        cfg = published.Config(copy.deepcopy(published._config(published._rows()[name][1])))
        size = {**WRONG, **RIGHT}[change](cfg) or 16
        run = Run('', dict(batch_size=size), 'finished', config=f'{name}.py', cfg=cfg.to_dict())
        assert (published.published(run) is not None) == (change in RIGHT)

    def test_a_published_row_of_iterations_is_of_that_learning_rate(self):
        name = 'mask-rcnn_r50-scratch_fpn_mabn_180k_coco'
        cfg = published.Config(copy.deepcopy(published._config(published._rows()[name][1])))
        cfg.optim_wrapper.optimizer.lr = 1e-9
        run = Run('', dict(batch_size=16), 'finished', config=f'{name}.py', cfg=cfg.to_dict())
        assert published.published(run) is None

    @pytest.mark.parametrize(
        ('config', 'row', 'options'),
        [
            ('bnet/mask-rcnn_r50_fpn_bnet5_1x_coco', None, ()),
            ('bnet/mask-rcnn_r50_fpn_bnet5_1x_coco', 'mask-rcnn_r50_fpn_bn_1x_coco', ('--norm', 'bn')),
            ('cbn/faster-rcnn_r50_fpn_cbn_1x_coco', None, ('--norm', 'cbn', '--batch-size', 2)),
            (
                'mabn/mask-rcnn_r50-scratch_fpn_mabn_180k_coco',
                None,
                ('--norm', 'mabn', '--batch-size', 32, '--per-class'),
            ),
            ('bnet/mask-rcnn_r50_fpn_bnet5_1x_coco', '', ('--batch-size', 2, '--no-scale-lr')),
            ('bnet/mask-rcnn_r50_fpn_bnet5_1x_coco', '', ('--epochs', 6)),
        ],
    )
    def test_a_published_row_is_found_as_train_makes_a_config(self, config, row, options, coco_root, tmp_path):
        """With its hooks, another data root, batch size and work dir."""
        name = config.rpartition('/')[2]
        row = name if row is None else row
        arguments = ('--data-root', coco_root, '--work-dir', tmp_path / 'w', '--seed', 3, *options)
        cfg = options_of(train, f'configs/{config}.py', *arguments)
        (tmp_path / 'now' / 'vis_data').mkdir(parents=True)
        cfg.dump(tmp_path / 'now' / 'vis_data' / 'config.py')
        size = options[options.index('--batch-size') + 1] if '--batch-size' in options else 16
        cost = dict(parameters=published._rows()[row][0]['Metadata']['Parameters']) if row else {}
        run = Run('', dict(batch_size=size), 'finished', config=f'{name}.py', cfg=runs._config(tmp_path), cost=cost)
        assert (published.published(run) or dict(name=''))['name'] == row


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A grid of work dirs with a failed cell, and its report."""
    root = tmp_path_factory.mktemp('grid')
    cells = [dict(name='planted', labels=dict(norm='gn', batch_size=2, seed=0), status='failed')]
    cells[0].update(error='<b>no & no', log='planted/output.txt')
    for run in grid():
        ap = run.results['bbox_mAP']
        results = coco('bbox', ap, CLASSES) | coco('segm', ap - 0.05, CLASSES)
        write_run(root / 'runs' / run.folder, results, run.labels, cost=run.cost, seed=run.labels['seed'])
        cells.append(dict(name=run.folder, labels=run.labels, status='finished'))
    said = [dict(command='compare run first.py', date='1'), dict(command='compare run x.py', date='2')]
    head = dict(command='compare run x.py', date='3', commands=said, machine='a small one')
    dump(root / 'runs' / 'grid.json', dict(head, cells=cells))
    report.write([root / 'runs'], root / 'runs' / 'report')
    return root / 'runs'


class TestFiles:
    def test_page_has_everything_and_asks_for_nothing(self, folder):
        html = (folder / 'report' / 'index.html').read_text()
        assert set(re.findall(r'<section id="([\w-]+)"', html)) == {
            *(f'figure-{name}' for name in ('batch-size', 'differences', 'progress', 'loss', 'cost', 'classes')),
            *(f'table-{name}' for name in ('results', 'differences-bbox_mAP', 'differences-segm_mAP')),
            *('table-classes-bbox_mAP', 'table-classes-segm_mAP'),
            *('table-falls', 'table-costs', 'table-runs', 'failed'),
        }
        assert "default-src 'none'" in html
        assert not re.findall(r'https?:|//\w|@import|<link|<iframe|\bsrc=(?!"data:)|url\((?!#)', html)
        assert '<b>no' not in html and '&lt;b&gt;no &amp; no' in html and '<i>' not in html
        assert not re.findall(r'#fe[0-9a-f]{4}', html)  # what stands in for the colours of the page
        assert html.count('<svg class="figure"') == 2 + 2 + 2 + 2 + 4 + 4

    def test_command_gives_the_same_bytes(self, folder, tmp_path, capsys):
        """Also where the first report lies among the runs by then."""
        compare.main(['report', str(folder), '--out', str(tmp_path)])
        for name in report.FILES:
            assert (tmp_path / name).read_bytes() == (folder / 'report' / name).read_bytes()
        out = capsys.readouterr().out
        assert out.startswith('MABN ahead of BN') and str(tmp_path / 'index.html') in out
        for wrong, why in ((['--images', '-1'], 'must be at least 0'), (['--metric', 'x'], 'choose one of')):
            with pytest.raises(SystemExit) as stop:
                compare.main(['report', str(folder), '--out', str(tmp_path), *wrong])
            assert stop.value.code == 2 and why in capsys.readouterr().err

    def test_a_report_of_nothing_leaves_no_folder(self, folder, tmp_path, capsys):
        for arguments in ([str(tmp_path / 'nothing')], [str(folder), '--metric', 'x']):
            with pytest.raises(SystemExit):
                compare.main(['report', *arguments, '--out', str(tmp_path / 'out')])
            assert not (tmp_path / 'out').exists()
        (tmp_path / 'out').write_text('a file')
        with pytest.raises(SystemExit):
            compare.main(['report', str(folder), '--out', str(tmp_path / 'out')])
        assert '--out: ' in capsys.readouterr().err

    def test_numbers(self, folder):
        rows = list(csv.DictReader((folder / 'report' / 'results.csv').read_text().splitlines()))
        assert len(rows) == 19
        assert (rows[0]['norm'], rows[0]['status'], rows[0]['error']) == ('gn', 'failed', '<b>no & no')
        assert float(rows[1]['bbox_mAP']) == 0.248 and float(rows[1]['seconds_per_iteration']) == 0.2
        content = json.loads((folder / 'report' / 'results.json').read_text())
        assert content['grids'][0]['commands'][0]['command'] == 'compare run first.py'
        mabn = next(s for s in content['settings'] if s['labels'] == {'norm': 'mabn'} and s['batch_size'] == 2)
        values = mabn['results']['bbox_mAP']
        assert values['mean'] == pytest.approx(np.mean(list(values['seeds'].values())))
        assert values['std'] == pytest.approx(np.std(list(values['seeds'].values()), ddof=1))
        effects = [d for d in content['differences'] if d['labels'] == {'norm': 'mabn'} and d['batch_size'] == 2]
        assert [d['metric'] for d in effects] == ['bbox_mAP', 'segm_mAP'] and effects[0]['seen']
        assert effects[0]['interval'][0] < effects[0]['difference'] < effects[0]['interval'][1]

    def test_text(self, folder):
        text = (folder / 'report' / 'report.md').read_text()
        assert text.startswith('# MABN ahead of BN at batch size 2; ')
        assert '* compare run x.py' not in text and text.count('* command: compare run x.py') == 1
        assert '* date: 1 to 3\n* command: compare run first.py\n* command: ' in text
        assert re.search(r'\n\| MABN \| 2 \| 3 \| \*\*33\.\d ± 0\.\d\*\* \|', text)
        assert re.search(r'\* .*planted: \\<b\\>no & no \(log: .*/runs/planted/output\.txt\)\n', text)
        assert '## By class, mask AP\n' in text and '| norm | batch size | disc | a "b" \\<i\\> |' in text

    def test_pictures_are_in_the_page(self, folder, tmp_path, monkeypatch):
        from mmdet_norms.experiments import detections

        asked = {}

        def side_by_side(chosen, labels, number):
            asked.update(runs=chosen, labels=labels, number=number)
            return np.zeros((20, 30, 3), np.uint8)

        monkeypatch.setattr(detections, 'side_by_side', side_by_side)
        shown = pictures.pictures(Content(*runs.find([folder])), 3)
        assert asked['labels'] == ['BN', 'MABN', 'BNET-5'] and asked['number'] == 3
        assert [name.rpartition('/')[2] for name in asked['runs']] == ['bn-2-0', 'mabn-2-0', 'bnet5-2-0']
        assert shown.source.startswith('data:image/jpeg;base64,') and 'batch size 2, seed 0' in shown.caption

    def test_a_norm_of_larger_batches_only_is_in_the_pictures_too(self, monkeypatch):
        from mmdet_norms.experiments import detections

        asked = {}
        monkeypatch.setattr(
            detections,
            'side_by_side',
            lambda chosen, labels, number: asked.update(zip(labels, chosen)) or np.zeros((2, 2, 3), np.uint8),
        )
        levels = {'bn': {2: 0.25, 16: 0.34}, 'mabn': {2: 0.33}, 'bnet5': {16: 0.341}}
        caption = pictures.pictures(Content(grid(levels)), 3).caption
        assert asked == {'BN': 'bn-2-0', 'MABN': 'mabn-2-0', 'BNET-5': 'bnet5-16-0'}
        which = 'at batch size 2, seed 0 (BNET-5 at batch size 16, seed 0)'
        assert caption == f'What the norms find {which}, beside the ground truth.'

    def test_the_table_of_runs_is_without_the_report(self, folder, capsys):
        compare.main([str(folder)])
        assert 'gave no results' not in capsys.readouterr().out


def test_classes_are_paired_by_seed():
    """A grid begun before classes were told apart has them of its later seeds only."""
    runs = [run_of(norm, 2, seed, 0.3) for norm in ('bn', 'gn') for seed in range(3)]
    for run, value in zip(runs, (0.2, 0.4, None, None, 0.41, 0.61)):
        if value is not None:
            run.results['bbox_a_precision'] = value
    content = Content(runs)
    (found,) = content.class_differences(content.metric).values()
    assert found == {'a': pytest.approx(0.01)}


def test_of_many_classes_those_that_differ_most_are_shown():
    levels = dict(bn=0.3, mabn=0.4)
    names = [f'class {i}' for i in range(20)]
    found = [run_of(norm, 2, 0, ap) for norm, ap in levels.items()]
    for run, slope in zip(found, (0, -0.01)):
        run.results |= {f'bbox_{name}_precision': 0.5 + slope * i for i, name in enumerate(names)}
    content = Content(found)
    (section,) = (section for section in figures.figures(content) if section.name == 'classes')
    assert section.caption.endswith('less that of BN; the 12 classes of 20 that differ most.')
    (table,) = (table for table in tables.tables(content) if table.name == 'classes-bbox_mAP')
    assert list(table.columns[2:]) == names[8:] and [cell.text for cell in table.rows[0][2:4]] == ['-8.0', '-9.0']


def test_figures_of_one_batch_size_and_one_seed():
    found = figures.figures(Content(grid({'bn': {2: 0.3}, 'mabn': {2: 0.4}}, seeds=1)))
    assert [section.name for section in found] == ['values', 'differences', 'cost']


def test_pictures_that_cannot_be_made_cost_no_report(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'pictures', lambda content, images: 1 / 0)
    monkeypatch.setattr('mmdet_norms.experiments.report.files.figures', lambda content: [])
    report.write([folder], tmp_path)
    assert 'No pictures: ZeroDivisionError: division by zero.' in (tmp_path / 'report.md').read_text()


def test_labels_are_moved_apart_and_stay_inside():
    places = figures._apart([0.1, 0.11, 0.5, 0.98, 0.99], 0.1, 0, 1)
    assert np.diff(places).min() >= 0.1 - 1e-9 and places[-1] <= 1 and places[2] == pytest.approx(0.5, abs=0.1)
    assert figures._apart([0.3], 0.1, 0, 1) == [0.3]


PROBE = """<!doctype html><body><iframe src="index.html" style="border:0;width:390px;height:900px"></iframe><script>
onload = () => {
  const page = document.querySelector('iframe').contentDocument, table = page.querySelector('#table-results table');
  const all = [...page.querySelectorAll('main *:not(.scroll *):not(svg *)')];
  const wide = all.filter(e => e.getBoundingClientRect().right > 391).map(e => e.outerHTML.slice(0, 99));
  const first = () => table.tBodies[0].rows[0].cells[3].textContent;
  const button = table.tHead.rows[0].cells[3].firstChild, seen = [first()];
  button.click(); seen.push(first()); button.click(); seen.push(first());
  const style = page.defaultView.getComputedStyle.bind(page.defaultView);
  const figures = [...page.querySelectorAll('svg.figure')];
  const empty = figures.filter(figure => figure.getBoundingClientRect().height < 80).length;
  const {color, backgroundColor} = style(page.body), text = style(figures[0].querySelector('text')).fill;
  const scroll = page.documentElement.scrollWidth;
  document.title = JSON.stringify({wide, scroll, seen, color, backgroundColor, text, empty});
};
</script>"""


@pytest.mark.slow
def test_page_in_a_browser(folder, tmp_path):
    """On a phone, in both colour schemes, and without a word to any other place."""
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('there is no Chromium')
    shutil.copy(folder / 'report' / 'index.html', tmp_path)
    (tmp_path / 'probe.html').write_text(PROBE)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, text, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        pages = [_in_browser(chromium, f'http://127.0.0.1:{server.server_port}/probe.html', dark) for dark in (0, 1)]
    finally:
        server.shutdown()
    assert set(asked) <= {'/probe.html', '/index.html', '/favicon.ico'}
    for page in pages:
        assert page['scroll'] <= 390 and page['wide'] == [] and page['empty'] == 0
        values = [float(text.split()[0]) for text in page['seen']]
        assert values[1] == max(values) and values[2] == min(values)
    light, dark = pages
    assert _brightness(light['backgroundColor']) > 200 > 100 > _brightness(light['color'])
    assert _brightness(dark['color']) > 200 > 100 > _brightness(dark['backgroundColor'])
    assert light['text'] != dark['text']


def _in_browser(chromium, address, dark):
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--window-size=600,1000', '--dump-dom']
    options += [f'--blink-settings=preferredColorScheme={1 - dark}']
    options += ['--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1']
    done = subprocess.run([chromium, *options, address], capture_output=True, text=True, timeout=60)
    title = re.search('<title>(.*?)</title>', done.stdout)
    assert title, done.stderr[-2000:]
    return json.loads(title[1].replace('&lt;', '<').replace('&gt;', '>').replace('&amp;', '&'))


def _brightness(colour):
    return np.mean([float(part) for part in re.findall(r'[\d.]+', colour)[:3]])
