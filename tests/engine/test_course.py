"""What is said of a training before it, against the schedulers and hooks of mmengine doing it."""

from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import PARAM_SCHEDULERS
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.loops import calc_dynamic_intervals

from mmdet_norms.engine.course import checkpoints, learning_rates, validations

LENGTH = 7


def loop_of(kind=EpochBasedTrainLoop, epoch=0, iteration=0, end=5, val_begin=1, val_interval=1, dynamic=None):
    """A loop that nothing is loaded for."""
    loop = object.__new__(kind)
    loop._runner = SimpleNamespace(val_loop=object())
    loop.dataloader = range(LENGTH)
    loop._epoch, loop._iter = epoch, iteration
    by_iter = kind is IterBasedTrainLoop
    loop._max_epochs, loop._max_iters = (1, end) if by_iter else (end, end * LENGTH)
    loop.val_begin, loop.val_interval = val_begin, val_interval
    loop.dynamic_milestones, loop.dynamic_intervals = calc_dynamic_intervals(val_interval, dynamic)
    return loop


def runner_of(schedule, loop, momentum=0.9):
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [dict(params=parameters[:1], lr=0.4), dict(params=parameters[1:], lr=0.1)]
    optimizer = torch.optim.SGD(groups, lr=0.4, momentum=momentum)
    built = [PARAM_SCHEDULERS.build(dict(entry, optimizer=optimizer)) for entry in schedule]
    return SimpleNamespace(optim_wrapper=optimizer, param_schedulers=built, train_loop=loop)


def trained(runner, by_iter):
    """The rates of the first group in every iteration, by training."""
    loop, rates = runner.train_loop, []
    for iteration in range(loop.max_iters):
        rates.append(runner.optim_wrapper.param_groups[0]['lr'])
        runner.optim_wrapper.step()
        for scheduler in runner.param_schedulers:
            if not scheduler.by_epoch or (not by_iter and (iteration + 1) % LENGTH == 0):
                scheduler.step()
    return rates


@pytest.mark.parametrize(
    'schedule, turns',
    [
        ([], []),
        (
            [
                dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=5),
                dict(type='MultiStepLR', by_epoch=True, milestones=[2, 4], gamma=0.1),
            ],
            [5, 14, 28],
        ),
        ([dict(type='StepLR', by_epoch=False, step_size=10, gamma=0.5)], [10, 20, 30]),
        ([dict(type='CosineAnnealingLR', by_epoch=False, T_max=35, eta_min=0.01)], []),
        ([dict(type='OneCycleLR', by_epoch=False, total_steps=35, eta_max=0.8)], []),
        ([dict(type='PolyLR', by_epoch=False, power=0.9, begin=7, end=35, eta_min=0.0)], [7]),
        ([dict(type='CosineRestartLR', by_epoch=False, periods=[10, 25], restart_weights=[1, 0.5], eta_min=0)], [10]),
        ([dict(type='LinearMomentum', start_factor=0.1, by_epoch=False, begin=0, end=5)], []),
    ],
    ids=lambda value: '+'.join(entry['type'] for entry in value if isinstance(entry, dict)) or None,
)
@pytest.mark.parametrize('by_iter', [False, True])
def test_rates_are_those_of_the_training_and_nothing_has_moved(schedule, turns, by_iter):
    loop = loop_of(IterBasedTrainLoop, end=35) if by_iter else loop_of()
    runner = runner_of(schedule, loop)
    (said,) = learning_rates(runner)
    expected = trained(runner_of(schedule, loop), by_iter)
    assert trained(runner, by_iter) == expected  # as if nobody had looked
    assert said.points == {i: expected[i] for i in said.points}
    assert {0, 34} | (set() if by_iter else set(turns)) <= set(said.points)
    assert (said.lowest, said.highest) == (min(expected), max(expected))
    # cycles start below the rate of the config
    assert said.groups == 2 and not said.waits and said.factors[1] == 1


def test_a_schedule_that_waits_for_results_is_said_to():
    plateau = dict(type='ReduceOnPlateauLR', monitor='loss', rule='less')
    (said,) = learning_rates(runner_of([plateau], loop_of()))
    assert said.waits and said.points == {0: 0.4, 34: 0.4} and said.factors == (0.25, 1.0)


def test_a_resumed_training_starts_where_it_is():
    runner = runner_of([dict(type='MultiStepLR', by_epoch=True, milestones=[2, 4])], loop_of(epoch=2, iteration=14))
    for _ in range(2):
        runner.optim_wrapper.step()
        runner.param_schedulers[0].step()
    (said,) = learning_rates(runner)
    assert said.points == pytest.approx({14: 0.04, 28: 0.004, 34: 0.004})


def test_each_of_several_optimizers():
    one, other = runner_of([], loop_of()), runner_of([dict(type='StepLR', step_size=1)], loop_of())
    wrapper = SimpleNamespace(param_groups={'a': one.optim_wrapper.param_groups, 'b': other.optim_wrapper.param_groups})
    runner = SimpleNamespace(
        optim_wrapper=wrapper, param_schedulers={'b': other.param_schedulers}, train_loop=loop_of()
    )
    a, b = learning_rates(runner)
    assert (a.optimizer, a.lowest) == ('a', 0.4) and b.optimizer == 'b' and b.lowest < 1e-4


@pytest.mark.parametrize(
    'kind, arguments, expected',
    [
        (EpochBasedTrainLoop, dict(end=5, val_interval=2), [2, 4, 5]),
        (EpochBasedTrainLoop, dict(end=5, val_interval=2, val_begin=3, epoch=3), [4, 5]),
        (EpochBasedTrainLoop, dict(end=6, val_interval=3, dynamic=[(4, 1)]), [3, 4, 5, 6]),
        (IterBasedTrainLoop, dict(end=25, val_interval=10, iteration=10), [20, 25]),
    ],
)
def test_validations(kind, arguments, expected):
    assert validations(loop_of(kind, **arguments)) == expected


@pytest.mark.parametrize('begin', [0, 2])
@pytest.mark.parametrize('interval, save_last', [(2, True), (2, False), (-1, True), (3, False)])
def test_checkpoints_are_those_that_the_hook_would_save(begin, interval, save_last):
    hook = CheckpointHook(interval=interval, save_begin=begin, save_last=save_last)
    saved = []
    for epoch in range(5):
        runner = SimpleNamespace(epoch=epoch, max_epochs=5, logger=SimpleNamespace(info=lambda text: None))
        hook._save_checkpoint = lambda runner: saved.append(runner.epoch + 1)
        hook.after_train_epoch(runner)
    assert checkpoints(hook, loop_of()) == saved
    assert checkpoints(hook, loop_of(epoch=2, iteration=14)) == [step for step in saved if step > 2]
