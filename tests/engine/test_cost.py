"""``cost.json``: what a training costs, also of one that was resumed."""

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
from mmengine.logging import MessageHub
from torch import nn

from mmdet_norms.engine import cost
from mmdet_norms.engine.cost import COST, CostHook
from mmdet_norms.layers import BRN, CBN, MABN


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(cost.time, 'monotonic', lambda: now.time)
    return now


@pytest.fixture
def runner(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))
    hub = MessageHub(f'cost-{tmp_path.name}')
    loader = SimpleNamespace(batch_size=4)
    return SimpleNamespace(work_dir=str(tmp_path), model=model, message_hub=hub, train_dataloader=loader, iter=0)


def train(hook, runner, clock, *seconds, wait=0.5):
    """An iteration for each number of seconds, ``wait`` of which go by before it gets its data."""
    for each in seconds:
        clock.time += wait
        hook.before_train_iter(runner, 0)
        clock.time += each - wait
        hook.after_train_iter(runner, 0)
        runner.iter += 1


def written(tmp_path):
    return json.loads((tmp_path / COST).read_text())


def test_the_median_leaves_out_the_first_iterations_and_validations(runner, clock, tmp_path):
    hook = CostHook()
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    train(hook, runner, clock, *[50] * 10, 2, 2)
    clock.time += 1000
    hook.after_val_epoch(runner)
    assert written(tmp_path)['seconds'] == 1504
    train(hook, runner, clock, 70, 2, 4, 4)  # the first one after a validation is none of them
    hook.after_train(runner)
    found = written(tmp_path)
    assert found['seconds_per_iteration'] == 2 and found['images_per_second'] == 2
    assert found['seconds'] == 1584 and found['iterations'] == 16
    assert (found['parameters'], found['trainable_parameters']) == (14, 8)
    assert (found['batch_size'], found['processes'], found['device']) == (4, 1, 'cpu')
    assert found['peak_memory_of'] == 'process' and 50 < found['peak_memory_mb'] < 100_000


@pytest.mark.parametrize(
    'norm, counter, length',
    [
        (BRN(2), 'bn.num_batches_tracked', 5000),
        (MABN(2), 'iters', 1000),  # until then r is 1
        (MABN(2, warmup_iters=1500), 'iters', 1500),
        (MABN(2, norm_batch=2), 'iters', 99),
        (CBN(2), 'iter_count', 8),
    ],
)
def test_norms_that_are_in_their_warm_up_are_named(norm, counter, length, runner, clock, tmp_path):
    hook, runner.model = CostHook(), nn.Sequential(nn.BatchNorm2d(2), norm)
    hook.before_train(runner)
    for done in (0, 1, length, length + 1):  # 0: a norm of which training makes no use
        norm.get_buffer(counter).fill_(done)
        hook.after_train(runner)
        assert written(tmp_path)['in_warm_up'] == [type(norm).__name__] * (0 < done <= length)


def test_a_resumed_training_adds_to_what_its_checkpoint_says(runner, clock, tmp_path):
    hook = CostHook()
    hook.before_train(runner)
    train(hook, runner, clock, *[5] * 10, 2, 2, 2)
    saved = deepcopy(runner.message_hub.state_dict())  # as a checkpoint has it
    train(hook, runner, clock, 40)  # lost with the process
    again = CostHook()
    runner.message_hub = MessageHub(f'cost-again-{tmp_path.name}')
    runner.message_hub.load_state_dict(saved)
    clock.time += 500
    again.before_train(runner)
    train(again, runner, clock, 7)
    again.after_train(runner)
    assert written(tmp_path)['seconds'] == 56 + 7
    assert written(tmp_path)['seconds_per_iteration'] == 2


def test_a_few_iterations_have_a_time_as_well_and_a_test_has_none(runner, clock, tmp_path):
    hook = CostHook()
    hook.after_val_epoch(runner)
    assert not (tmp_path / COST).exists()
    hook.before_train(runner)
    train(hook, runner, clock, 60, 3, 3, wait=1)
    hook.after_train(runner)
    assert written(tmp_path)['seconds_per_iteration'] == 2
