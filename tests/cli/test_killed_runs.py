"""A short form of tools/kill_test.py: SIGKILL at random moments, and the end is that of a run that nobody killed."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'kill_test.py'


@pytest.fixture(scope='module')
def kill_test():
    spec = importlib.util.spec_from_file_location('kill_test', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize('norm, loop, processes', [('bnet5', 'epochs', 1), ('mabn', 'iterations', 2)])
def test_a_killed_run_ends_as_one_that_was_not(kill_test, monkeypatch, tmp_path, norm, loop, processes):
    monkeypatch.setattr(kill_test.mmengine_runner, 'collect_env', dict)
    for text, long, short in (('CONFIG', 'max_epochs=4', 'max_epochs=3'), ('ITERATIONS', 'max_iters=8', 'max_iters=6')):
        assert long in getattr(kill_test, text)
        monkeypatch.setattr(kill_test, text, getattr(kill_test, text).replace(long, short))
    result = kill_test.try_out(tmp_path / norm, norm, loop, processes, 2, random.Random(1))
    assert result['kills'] == 2 and result['problems'] == []


def test_what_differs_is_noticed(kill_test, tmp_path):
    """The judge itself: one bit in a weight, another best checkpoint, something unreadable, nothing left."""
    hub = dict(
        log_scalars={'train/loss': type('History', (), {'_log_history': torch.zeros(2).numpy()})}, runtime_info={}
    )
    content = dict(state_dict=dict(w=torch.ones(3)), optimizer={}, message_hub=hub, meta=dict(epoch=1, iter=2, seed=0))
    loaded = {'one': content, 'two': dict(content, state_dict=dict(w=torch.tensor([1.0, 1.0, 1.0000001])))}
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(kill_test.torch, 'load', lambda path: loaded[path])
        assert kill_test.differing_bits('one', 'one') == 0 and kill_test.differing_bits('one', 'two') == 1
        loaded['three'] = dict(content, ema_state_dict=dict(w=torch.ones(1)))
        assert kill_test.differing_bits('one', 'three') > 8
    assert kill_test.problems_of(tmp_path, had_one=False) == []
    assert kill_test.problems_of(tmp_path, had_one=True) == ['there was a checkpoint, and there is none']
    torch.save({}, tmp_path / 'epoch_1.pth')
    assert kill_test.problems_of(tmp_path, had_one=True) == []
    (tmp_path / 'best_a_epoch_1.pth').write_bytes((tmp_path / 'epoch_1.pth').read_bytes()[:100])
    (tmp_path / 'last_checkpoint').write_text('epoch_1')
    said = kill_test.problems_of(tmp_path, had_one=True)
    assert len(said) == 2 and 'best_a_epoch_1.pth cannot be read' in said[0] and 'last_checkpoint names' in said[1]
    (tmp_path / 'other').mkdir()
    assert 'without a kill' in kill_test.compare(tmp_path, tmp_path / 'other')[0]
