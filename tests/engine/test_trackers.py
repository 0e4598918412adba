"""Trackers: nothing before a training, one run however often it is resumed. Stand-ins for wandb and mlflow."""

import logging
import sys

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer

from mmdet_norms.engine.trackers import MLflowTracker, TensorboardTracker, TrackersHook, WandbTracker, start_trackers
from mmdet_norms.errors import UserError

WANDB = """
import os
class Error(Exception): pass
calls = []
class config:
    @staticmethod
    def update(values, allow_val_change=False): calls.append(('config', values, allow_val_change))
def init(dir, id='first', **kwargs):
    if os.environ.get('WANDB_MODE') != 'offline': raise Error('no API key\\nconfigured')
    os.makedirs(f'{dir}/wandb/offline-run-2026112{len(calls) % 10}_000000-{id}', exist_ok=True)
    calls.append(('init', id, kwargs))
def define_metric(**kwargs): calls.append(('define', kwargs))
def log(values, commit=None): calls.append(('log', values))
def join(): calls.append(('join',))
"""
MLFLOW = """
import logging
class exceptions:
    class MlflowException(Exception): pass
calls, runs = [], []
class Run:
    def __init__(self, number, tags):
        self.tags, self.info = tags, type('Info', (), dict(run_id=str(number)))
for handler in logging.getLogger('mmengine').handlers: handler.close()  # as mlflow does
def get_tracking_uri(): return 'sqlite:///mlflow.db'
def set_experiment(name):
    if name == 'gone': raise exceptions.MlflowException('no\\nserver')
def search_runs(experiment_names, filter_string, **kwargs):
    return [run for run in reversed(runs) if filter_string == "tags.work_dir = '%s'" % run.tags['work_dir']][:1]
def start_run(run_id=None, run_name=None, tags=None):
    calls.append(('start', run_id, run_name))
    if run_id is None: runs.append(Run(len(runs), tags))
def log_params(params): calls.append(('params', params))
def log_text(text, name): calls.append(('text', name))
def log_metrics(values, step): calls.append(('metrics', values, step))
"""
CFG = Config(dict(a=1, b=dict(c=2)))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    def make(name, text):
        (tmp_path / 'modules').mkdir(exist_ok=True)
        (tmp_path / 'modules' / f'{name}.py').write_text(text)
        monkeypatch.syspath_prepend(tmp_path / 'modules')
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    yield make
    for name in ('wandb', 'mlflow'):
        sys.modules.pop(name, None)


class Runner:
    iter = 0

    def __init__(self, *backends):
        self.visualizer = Visualizer(vis_backends=list(backends))
        self.visualizer.add_config(CFG)


def trained(tracker, steps, begin=0):
    runner = Runner(tracker)
    runner.visualizer.add_scalars(dict(loss=0.0), step=-1)  # as a test would
    start_trackers(runner)
    runner.iter = begin
    TrackersHook().before_train(runner)
    for step in steps:
        runner.visualizer.add_scalars(dict(loss=step + begin / 10), step=step)
    return runner


def test_tensorboard_shows_one_run_without_what_was_lost(tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    trained(TensorboardTracker(str(tmp_path)), [1, 2, 3, 4, 5]).visualizer.close()
    trained(TensorboardTracker(str(tmp_path)), [3, 4], begin=2).visualizer.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    seen = [(event.step, round(event.value, 3)) for event in events.Scalars('loss')]
    assert seen == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]
    assert 'config/text_summary' in events.Tags()['tensors']


def test_nothing_is_written_before_a_training_begins(tmp_path):
    Runner(TensorboardTracker(str(tmp_path / 'nothing'))).visualizer.add_scalars(dict(loss=1.0), step=1)
    assert not (tmp_path / 'nothing').exists()


def test_wandb_goes_on_in_the_run_that_was_last(tmp_path, monkeypatch, stand_in):
    wandb = stand_in('wandb', WANDB)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    make = dict(save_dir=str(tmp_path), init_kwargs=dict(project='p', name='n'))
    trained(WandbTracker(**make), [1]).visualizer.close()
    first = [
        ('init', 'first', dict(project='p', name='n')),
        ('define', dict(name='*', step_metric='iter')),
        ('config', CFG.to_dict(), True),
        ('log', dict(loss=1.0)),
        ('join',),
    ]
    assert wandb.calls == first
    (tmp_path / 'wandb' / 'offline-run-20261201_000000-newer').mkdir()
    trained(WandbTracker(resume=True, **make), [2], begin=1)
    assert wandb.calls[5] == ('init', 'newer', dict(project='p', name='n', resume='allow'))
    trained(WandbTracker(**make), [1])
    assert wandb.calls[9][1] == 'first'  # a new one


def test_wandb_without_a_login_is_one_error(tmp_path, monkeypatch, stand_in):
    stand_in('wandb', WANDB)
    monkeypatch.delenv('WANDB_MODE', raising=False)
    runner = Runner(WandbTracker(str(tmp_path)))
    with pytest.raises(UserError, match=r'--wandb: .*\(no API key configured\).*WANDB_MODE=offline'):
        start_trackers(runner)


def test_mlflow_goes_on_in_the_run_of_the_work_dir_and_lets_the_log_go_on(tmp_path, stand_in):
    logger = MMLogger.get_instance('trackers', log_file=str(tmp_path / 'run.log'))
    logging.getLogger('mmengine').addHandler(logger.handlers[-1])
    try:
        mlflow = stand_in('mlflow', MLFLOW)
        make = dict(save_dir=str(tmp_path), exp_name='e', run_name='r')
        trained(MLflowTracker(**make), [1])
        trained(MLflowTracker(**{**make, 'save_dir': str(tmp_path / 'other')}), [])
        assert [call[0] for call in mlflow.calls[:5]] == ['start', 'params', 'params', 'text', 'metrics']
        assert mlflow.calls[0] == ('start', None, 'r') and mlflow.calls[2] == ('params', {'a': 1, 'b.c': 2})
        del mlflow.calls[:]
        trained(MLflowTracker(resume=True, **make), [2], begin=1)
        assert mlflow.calls == [
            ('start', '0', None),
            ('params', {}),
            ('text', 'config.py'),
            ('metrics', dict(loss=2.1), 2),
        ]
        logger.error('still written')
        assert 'still written' in (tmp_path / 'run.log').read_text()
        with pytest.raises(UserError, match=r'--mlflow: .*sqlite:///mlflow.db \(no server\)'):
            start_trackers(Runner(MLflowTracker(str(tmp_path), exp_name='gone')))
    finally:
        logging.getLogger('mmengine').removeHandler(logger.handlers[-1])
