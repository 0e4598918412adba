"""Checkpoints of mmengine under torch's restricted unpickler."""

import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner

import mmdet_norms
from mmdet_norms.compat import checkpoints

RESTRICTED = tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 6)
needs_restricted_load = pytest.mark.skipif(not RESTRICTED, reason='torch < 2.6 unpickles anything')


class LineModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, y, mode):
        return dict(loss=((self.layer(x) - y) ** 2).mean())


class Points(torch.utils.data.Dataset):
    METAINFO = dict(classes=('a', 'b'))
    metainfo = METAINFO

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return dict(x=torch.tensor([i / 8.0, 1.0]), y=torch.tensor([float(i)]))


@pytest.fixture(autouse=True)
def registered():
    MODELS.register_module('LineModel', force=True, module=LineModel)
    DATASETS.register_module('Points', force=True, module=Points)
    yield
    for registry, name in ((MODELS, 'LineModel'), (DATASETS, 'Points')):
        registry._module_dict.pop(name)


def runner_for(work_dir, max_epochs, resume=False):
    cfg = Config(
        dict(
            model=dict(type='LineModel'),
            work_dir=str(work_dir),
            train_dataloader=dict(
                dataset=dict(type='Points'),
                batch_size=2,
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
            # an explicit end, since mmengine fills in max_epochs and keeps it on resuming
            param_scheduler=dict(type='StepLR', step_size=1, gamma=0.5, end=9),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
            resume=resume,
            experiment_name=f'{work_dir.parent.name}_{max_epochs}',
            log_level='ERROR',
        )
    )
    return Runner.from_cfg(cfg)


@pytest.fixture
def trained(tmp_path):
    """The work dir of one epoch."""
    runner_for(tmp_path / 'run', max_epochs=1).train()
    return tmp_path / 'run'


def test_training_resumes_with_its_epoch_optimizer_scheduler_and_log_history(trained):
    saved = torch.load(trained / 'epoch_1.pth')
    runner = runner_for(trained, max_epochs=2, resume=True)
    runner.train()
    assert (runner.epoch, runner.iter) == (2, 8)
    history, counts = runner.message_hub.get_scalar('train/loss').data
    assert len(history) == len(counts) == 8
    before, _ = saved['message_hub']['log_scalars']['train/loss'].data
    np.testing.assert_array_equal(history[:4], before)
    # momentum and the halved learning rate went on, they did not start anew
    assert runner.optim_wrapper.param_groups[0]['lr'] == pytest.approx(0.01 / 4)
    assert torch.load(trained / 'epoch_2.pth')['meta']['epoch'] == 2


def test_the_resumed_run_is_the_uninterrupted_run(tmp_path):
    torch.manual_seed(0)
    start = LineModel().state_dict()
    ends = []
    for name, stops in (('whole', [2]), ('halves', [1, 2])):
        for stop in stops:
            runner = runner_for(tmp_path / name, max_epochs=stop, resume=stop != stops[0])
            runner.model.load_state_dict(start)
            runner.train()
        ends.append(runner.model.layer.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@needs_restricted_load
def test_a_checkpoint_saved_here_needs_no_lookup_by_name(trained):
    asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(trained / 'epoch_1.pth'))
    assert asked == []
    assert b'getattr' not in (trained / 'epoch_1.pth').read_bytes()


def test_a_checkpoint_saved_here_loads_without_the_package(trained):
    loaded = torch.load(trained / 'epoch_1.pth', weights_only=False)
    loss = loaded['message_hub']['log_scalars']['train/loss']
    assert loss.statistics('min') == loss.min()


def test_a_checkpoint_of_a_stock_run_loads(tmp_path, monkeypatch):
    def stock_getstate(self):  # mmengine 0.10
        self.__dict__.update(statistics_methods=self._statistics_methods)
        return self.__dict__

    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    with monkeypatch.context() as patch:
        patch.setattr(HistoryBuffer, '__getstate__', stock_getstate)
        torch.save(dict(history=buffer, scalar=np.float32(2), dtypes=np.arange(3)), tmp_path / 'stock.pth')
    assert b'getattr' in (tmp_path / 'stock.pth').read_bytes()
    loaded = torch.load(tmp_path / 'stock.pth')
    assert loaded['history'].statistics('mean') == 2
    assert loaded['scalar'] == 2


class RunsCode:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@needs_restricted_load
@pytest.mark.parametrize('call', [os.system, os.mkdir, eval, exec], ids=lambda call: call.__name__)
def test_a_checkpoint_that_runs_code_is_refused_and_does_not_run_it(tmp_path, call):
    argument = str(tmp_path / 'ran') if call is os.mkdir else f'__import__("os").mkdir({str(tmp_path / "ran")!r})'
    torch.save(dict(state_dict={}, extra=RunsCode(call, (argument,))), tmp_path / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'evil.pth')
    assert not (tmp_path / 'ran').exists()


@needs_restricted_load
@pytest.mark.parametrize('name', ['register_statistics', '__init__', '__globals__', 'update'])
def test_getattr_in_a_checkpoint_reaches_statistics_only(tmp_path, name):
    torch.save(dict(extra=RunsCode(getattr, (HistoryBuffer, name))), tmp_path / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError, match=name):
        torch.load(tmp_path / 'evil.pth')


def test_the_explanation_names_the_file_and_what_it_asked_for(tmp_path):
    path = str(tmp_path / 'evil.pth')
    torch.save(dict(history=HistoryBuffer([1.0], [1]), extra=RunsCode(os.system, ('true',))), path)
    message = checkpoints.explain_refusal(path)
    assert path in message
    assert 'weights_only=False' not in message
    if RESTRICTED:
        assert 'system' in message and 'HistoryBuffer' not in message


def test_importing_the_package_is_enough():
    assert mmdet_norms.__version__
    assert HistoryBuffer.__getstate__ is checkpoints.state_without_functions
