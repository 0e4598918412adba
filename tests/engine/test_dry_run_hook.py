"""When the training of a dry run ends, and which of its iterations are timed."""

from types import SimpleNamespace

import pytest
from torch import nn

from mmdet_norms.engine import dry_run
from mmdet_norms.engine.dry_run import DryRunEnds, DryRunHook


def train(monkeypatch, seconds, warm_up=0, per_epoch=10**6, iterations=100):
    """Train by a clock of our own; returns the hook and how many iterations there were.

    Args:
        seconds: of the iteration with a number; a tenth of it is waiting for data.
    """
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(dry_run.time, 'monotonic', lambda: clock.now)
    model = nn.Identity()
    hook = DryRunHook(lambda settled: warm_up if settled is model else None)
    runner = SimpleNamespace(model=model)
    hook._begun = clock.now
    for i in range(iterations):
        clock.now += 0.1 * seconds(i)
        hook.before_train_iter(runner, i % per_epoch)
        clock.now += 0.9 * seconds(i)
        try:
            hook.after_train_iter(runner, i % per_epoch)
        except DryRunEnds:
            return hook, i + 1
    with pytest.raises(DryRunEnds):
        hook.after_train(runner)
    return hook, iterations


def test_eight_iterations_after_the_first(monkeypatch):
    hook, done = train(monkeypatch, lambda i: 9 if i == 0 else 0.5)
    assert done == 9 and hook.timing.iterations == pytest.approx([0.5] * 8)
    assert hook.timing.data == pytest.approx([0.05] * 8) and hook.timing.settled


def test_norms_get_past_their_warm_up_first(monkeypatch):
    hook, done = train(monkeypatch, lambda i: 0.1 * (1 + i), warm_up=3)
    assert done == 12 and hook.timing.iterations == pytest.approx([0.1 * (1 + i) for i in range(4, 12)])


def test_slow_iterations_are_at_least_two(monkeypatch):
    hook, done = train(monkeypatch, lambda i: 50.0, warm_up=3)
    assert done == 2 and hook.timing.iterations == pytest.approx([50.0]) and not hook.timing.settled
    hook, done = train(monkeypatch, lambda i: 6.0)
    assert done == 4 and len(hook.timing.iterations) == 3


def test_the_first_iteration_of_an_epoch_waits_for_workers(monkeypatch):
    hook, done = train(monkeypatch, lambda i: 5 if i % 4 == 0 else 0.5, per_epoch=4, iterations=8)
    assert done == 8 and hook.timing.iterations == pytest.approx([0.5] * 6)


@pytest.mark.parametrize('iterations', [1, 3, 100])
def test_epochs_of_one_iteration_and_short_trainings(monkeypatch, iterations):
    hook, done = train(monkeypatch, lambda i: 0.5, per_epoch=1, iterations=iterations)
    assert done == min(iterations, 17) and hook.timing.peak > 0
    assert hook.timing.iterations == pytest.approx([0.5] * max(1, done - 1))
