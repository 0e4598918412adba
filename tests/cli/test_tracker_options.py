"""``--tensorboard``, ``--wandb`` and ``--mlflow``."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from helpers import tiny
from helpers.commands import fails, options_of
from mmdet_norms.cli import train

NAMES = ('tensorboard', 'wandb', 'mlflow')


@pytest.fixture
def installed(monkeypatch):
    """Whether find_spec finds one of the three."""
    there, find = dict.fromkeys(NAMES, True), importlib.util.find_spec

    def look(name, *args):
        return (ModuleSpec(name, None) if there[name] else None) if name in there else find(name, *args)

    monkeypatch.setattr(importlib.util, 'find_spec', look)
    return there


def backends(cfg):
    return {entry['type']: dict(entry) for entry in cfg.visualizer.vis_backends}


def test_names_are_those_of_config_and_work_dir(tmp_path, installed):
    config, run = tiny.write_config(tmp_path), tmp_path / 'runs' / 'first'
    found = backends(options_of(train, config, '--work-dir', run, *(f'--{name}' for name in NAMES)))
    assert found['LocalVisBackend'] and found['TensorboardTracker']['save_dir'] == str(run / 'tensorboard')
    assert found['WandbTracker']['init_kwargs'] == dict(project='tiny', name='first')
    assert (found['MLflowTracker']['exp_name'], found['MLflowTracker']['run_name']) == ('tiny', 'first')
    assert not found['WandbTracker']['resume']
    (run).mkdir(parents=True)
    found = backends(options_of(train, config, '--work-dir', run, '--wandb', '--resume'))
    assert found['WandbTracker']['resume'] is False  # there is nothing to go on from yet
    assert set(found) == {'LocalVisBackend', 'WandbTracker'}


@pytest.mark.parametrize('many', [True, False])
def test_what_the_config_says_stays(tmp_path, installed, many):
    own = "dict(type='WandbVisBackend', commit=False, init_kwargs=dict(project='mine'))"
    own = f'visualizer = dict(_delete_=True, type="DetLocalVisualizer", vis_backends={f"[{own}]" if many else own})\n'
    config = tiny.write_config(tmp_path, own)
    found = backends(options_of(train, config, '--work-dir', tmp_path / 'run', '--wandb'))
    assert found['WandbTracker']['commit'] is False and len(found) == 1
    assert found['WandbTracker']['init_kwargs'] == dict(project='mine', name='run')
    without = options_of(train, config, '--work-dir', tmp_path / 'run').visualizer.vis_backends
    assert (without[0] if many else without)['type'] == 'WandbVisBackend'


@pytest.mark.parametrize('name', NAMES)
def test_a_missing_package_is_one_error_with_the_command(tmp_path, capsys, installed, name):
    installed[name] = False
    said = fails(capsys, train.main, tiny.write_config(tmp_path), '--work-dir', tmp_path / 'run', f'--{name}')
    assert f"--{name} needs a package that is not installed: pip install '{name}'" in said
    assert not (tmp_path / 'run').exists()
