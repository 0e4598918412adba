"""``--batch-size``: the linear rule, and what of a schedule stays the same with another batch."""

import copy
import math
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from mmdet_norms.cli import batch_size
from mmdet_norms.cli.batch_size import IMAGES, ITERS
from mmdet_norms.errors import UserError

SET = 100  # images of the data set
WARM_UP = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50)
STEPS = dict(type='MultiStepLR', begin=0, end=12, milestones=[8, 11], gamma=0.1)
COSINE = dict(type='CosineAnnealingLR', begin=0, end=12, T_max=12, eta_min=0.001, convert_to_iter_based=True)


@pytest.fixture(autouse=True)
def length(monkeypatch):
    """Of epochs, without building a data set."""
    monkeypatch.setattr(
        batch_size, 'epoch_length', lambda cfg, launcher: math.ceil(SET / cfg.train_dataloader.batch_size)
    )


def config(*schedulers, iters=None, **more):
    loop = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=3)
    if iters:
        loop = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters // 10)
    return Config(
        dict(
            train_cfg=loop,
            train_dataloader=dict(batch_size=10),
            param_scheduler=list(copy.deepcopy(schedulers)),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.02)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=12), logger=dict(type='LoggerHook')),
            **more,
        )
    )


def arguments(batch=None, **more):
    given = dict(budget=IMAGES, no_scale_lr=False, auto_scale_lr=False, launcher='none', schedule_options=[])
    return SimpleNamespace(**{'batch_size': batch, 'cfg_options': {}, 'cfg_options_new': {}, **given, **more})


def changed(cfg, *args, **more):
    args = arguments(*args, **more)
    batch_size.begin(cfg, args)
    return batch_size.apply(cfg, args)


def test_as_many_iterations_for_every_batch():
    """Twelve epochs of ten iterations, and everything in epochs at the iteration where it was."""
    for batch in (5, 10, 40):
        cfg = config(WARM_UP, STEPS, COSINE)
        changed(cfg, batch, budget=ITERS)
        assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=120, val_interval=30)
        warm_up, steps, cosine = cfg.param_scheduler
        assert (warm_up.begin, warm_up.end) == (0, 50)
        assert (steps.end, steps.milestones, steps.by_epoch) == (120, [80, 110], False)
        assert (cosine.end, cosine.T_max, cosine.by_epoch) == (120, 120, False)
        assert 'convert_to_iter_based' not in cosine
        assert (cfg.default_hooks.checkpoint.by_epoch, cfg.default_hooks.checkpoint.interval) == (False, 24)
        assert cfg.log_processor.by_epoch is False and cfg.default_hooks.logger.log_metric_by_epoch is False
        assert cfg.train_dataloader.batch_size == batch
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.02 * batch / 10)
        assert cosine.eta_min == pytest.approx(0.001 * batch / 10)


def test_as_many_images_for_every_batch():
    cfg = config(WARM_UP, STEPS)
    (said,) = changed(cfg, 40)
    assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=3)
    warm_up, steps = cfg.param_scheduler
    assert warm_up.end == 15 and steps == STEPS  # 3 iterations in place of 10
    assert said == '--batch-size 40 in place of 10: as many images: 12 epochs; learning rate 0.08 by the linear rule'
    cfg = config(WARM_UP, dict(STEPS, by_epoch=False, end=1000, milestones=[500]), iters=1000)
    changed(cfg, 5)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (2000, 200)
    assert (cfg.param_scheduler[0].end, cfg.param_scheduler[1].milestones) == (100, [1000])
    changed(cfg := config(iters=1000), 5, budget=ITERS)
    assert cfg.train_cfg.max_iters == 1000 and cfg.optim_wrapper.optimizer.lr == 0.01


@pytest.mark.parametrize(
    'iters, interval, batch, wanted', [(90000, 10000, 15, 6667), (1000, 1000, 15, 667), (8, 3, 4, 7)]
)
def test_no_validation_comes_in_just_before_the_end(iters, interval, batch, wanted):
    """Where there is one in any case, and a checkpoint."""
    cfg = config(iters=iters)
    cfg.train_cfg.val_interval = interval
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=interval)
    changed(cfg, batch)
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == wanted
    assert math.ceil(cfg.train_cfg.max_iters / wanted) == math.ceil(iters / interval)


def test_times_of_validation_are_rounded_as_with_epochs():
    """And as those of checkpoints, with which they fell together."""
    cfg = config(iters=1000)
    cfg.train_cfg.update(val_begin=200, dynamic_intervals=[(900, 50)])
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=100)
    changed(cfg, 15)
    assert cfg.train_cfg.max_iters == 667 and cfg.default_hooks.checkpoint.interval == 67
    assert [cfg.train_cfg[key] for key in ('val_interval', 'val_begin', 'dynamic_intervals')] == [67, 134, [(600, 34)]]


@pytest.mark.parametrize('budget', [IMAGES, ITERS])
def test_a_warm_up_that_becomes_one_iteration_leaves_the_rate_alone(budget):
    """mmengine's of one iteration never comes to its end."""
    changed(cfg := config(dict(WARM_UP, end=4), COSINE, iters=None), 100, budget=budget)
    changed(iters := config(dict(WARM_UP, end=4), iters=1000), 100, budget=budget)
    wanted = (1, 1.0) if budget == IMAGES else (4, 0.001)
    for warm_up in (cfg.param_scheduler[0], iters.param_scheduler[0]):
        assert (warm_up.end, warm_up.start_factor) == wanted
    # an epoch of one iteration
    changed(cfg := config(dict(WARM_UP, by_epoch=True, convert_to_iter_based=True, end=1)), SET, budget=budget)
    assert cfg.param_scheduler[0].start_factor == (1.0 if budget == IMAGES else 0.001)


def test_the_reference_is_the_batch_that_the_learning_rate_is_for():
    """A stock config has two images a GPU, and a learning rate for eight of them."""
    cfg = config(STEPS, auto_scale_lr=dict(enable=True, base_batch_size=20))
    args = arguments(40)
    batch_size.begin(cfg, args)
    assert cfg.train_dataloader.batch_size == 20  # by which --epochs counts iterations
    batch_size.apply(cfg, args)
    assert cfg.optim_wrapper.optimizer.lr == 0.04 and not cfg.auto_scale_lr.enable
    changed(cfg := config(STEPS), 40, no_scale_lr=True)
    assert cfg.optim_wrapper.optimizer.lr == 0.02 and cfg.train_dataloader.batch_size == 40
    cfg = config()
    cfg.optim_wrapper = dict(
        constructor='Two', a=dict(optimizer=dict(type='SGD', lr=1)), b=dict(optimizer=dict(type='AdamW'))
    )
    changed(cfg, 20)
    assert (cfg.optim_wrapper.a.optimizer.lr, cfg.optim_wrapper.b.optimizer.lr) == (2, 0.002)


def test_a_batch_is_of_all_processes(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    changed(cfg := config(), 40, launcher='pytorch')
    assert cfg.train_dataloader.batch_size == 10 and cfg.optim_wrapper.optimizer.lr == 0.08
    with pytest.raises(
        UserError, match=r'--batch-size 6: is of all processes together, and must be a multiple of .* 4'
    ):
        changed(config(), 6, launcher='pytorch')


def test_a_resumed_run_has_to_have_the_same(monkeypatch):
    args = arguments(40, budget=ITERS, no_scale_lr=True, schedule_options=['--epochs 3'])
    cfg = config()
    batch_size.begin(cfg, args)
    batch_size.apply(cfg, args)
    assert args.schedule_options == ['--epochs 3', '--batch-size 40 --budget iters --no-scale-lr']


@pytest.mark.parametrize(
    'given, more, said',
    [
        (dict(batch=0), {}, '--batch-size 0: must be 1 or more'),
        (dict(budget=ITERS), {}, '--budget iters: says what to do with another --batch-size'),
        (dict(no_scale_lr=True), {}, '--no-scale-lr: says what to do'),
        (dict(batch=4, auto_scale_lr=True), {}, 'leave --auto-scale-lr out'),
        (dict(batch=4, cfg_options={'train_dataloader.batch_size': 2}), {}, 'train_dataloader.batch_size says some'),
        (dict(batch=4), dict(train_dataloader=dict(batch_size=4, sampler=dict(type='S', batch_size=4))), r'\(S\) has'),
        (dict(batch=4), dict(train_dataloader=dict(num_workers=2)), 'auto_scale_lr.base_batch_size=16'),
        (dict(batch=4), dict(optim_wrapper=dict(type='OptimWrapper')), 'no optim_wrapper.optimizer.lr to scale'),
        (dict(batch=4, budget=ITERS), dict(custom_hooks=[dict(type='H', num_last_epochs=5)]), 'H acts at an epoch'),
        (dict(batch=4, budget=ITERS), dict(train_cfg=dict(type='EpochBasedTrainLoop')), 'give --budget images'),
    ],
)
def test_what_cannot_be_done_is_one_error(given, more, said):
    cfg = config(STEPS)
    cfg = Config({**cfg.to_dict(), **more})
    with pytest.raises(UserError, match=said):
        changed(cfg, given.pop('batch', None), **given)
