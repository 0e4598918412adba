"""tools/train.py: a detector that was resumed is, bit by bit, the one that was not; without --seed."""

import pytest
import torch

from helpers import tiny
from helpers.commands import run_tool_in_two
from mmdet_norms.cli import train

MORE = """
train_pipeline.insert(2, dict(type='RandomFlip', prob=0.5))
train_pipeline.insert(2, dict(type='PhotoMetricDistortion'))
train_dataloader['dataset']['pipeline'] = train_pipeline
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
default_hooks = dict(checkpoint=dict(interval=1))
"""
ITERATIONS = """
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=6, val_interval=10)
train_dataloader.update(sampler=dict(_delete_=True, type='InfiniteSampler'), batch_sampler=None)
default_hooks['checkpoint'].update(by_epoch=False, interval=2)
log_processor = dict(by_epoch=False)
"""


def differing(one, two):
    """Keys of state dict, optimizer, averages and losses in which two checkpoints differ."""
    one, two = (torch.load(path) for path in (one, two))
    losses = [c['message_hub']['log_scalars']['train/loss']._log_history.tolist() for c in (one, two)]
    names = ['losses'] * (losses[0] != losses[1])
    for part in ('state_dict', 'ema_state_dict'):
        assert one[part].keys() == two[part].keys()
        names += [key for key, value in one[part].items() if not torch.equal(value, two[part][key])]
    for key, state in one['optimizer']['state'].items():
        names += [
            f'optimizer {key}' for name in state if not torch.equal(state[name], two['optimizer']['state'][key][name])
        ]
    return names


@pytest.mark.parametrize(
    'more, first, last, options',
    [
        ('', 'epoch_1.pth', 'epoch_2.pth', ['--cfg-options', 'train_cfg.max_epochs=2', 'train_cfg.val_interval=1']),
        (ITERATIONS, 'iter_4.pth', 'iter_6.pth', ['--norm', 'bnet5']),
    ],
    ids=['epochs', 'iterations'],
)
def test_a_resumed_detector_is_the_one_that_was_not_stopped(more, first, last, options, tmp_path):
    config = tiny.write_config(tmp_path, MORE + more)
    train.main([str(config), '--work-dir', str(tmp_path / 'whole'), *options])
    arguments = ['--work-dir', str(tmp_path / 'rest'), '--resume', str(tmp_path / 'whole' / first)]
    train.main([str(config), *arguments, *options])
    assert not differing(tmp_path / 'rest' / last, tmp_path / 'whole' / last)


def test_going_on_reads_the_checkpoint_once(tmp_path, monkeypatch):
    """Its size is that of model and optimizer; is it whole, does it fit, and the run all need it."""
    config, read = str(tiny.write_config(tmp_path)), []
    options = ['--work-dir', str(tmp_path / 'run'), '--cfg-options', 'default_hooks.checkpoint.save_optimizer=True']
    train.main([config, *options])
    load = torch.load

    def counted(path, *args, **kwargs):
        if not kwargs.get('mmap'):  # which reads no weights
            read.append(str(path))
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, 'load', counted)
    train.main([config, *options, 'train_cfg.max_epochs=2', '--resume'])
    assert (tmp_path / 'run' / 'epoch_2.pth').is_file()
    assert [path for path in read if path.endswith('epoch_1.pth')] == [str(tmp_path / 'run' / 'epoch_1.pth')]


@pytest.mark.parametrize('norm', ['cbn', 'mabn'])
def test_validations_on_the_way_change_no_bit(norm, tmp_path):
    config = str(tiny.write_config(tmp_path, MORE))
    for every in ('1', '3'):
        options = ['train_cfg.max_epochs=3', f'train_cfg.val_interval={every}']
        arguments = ['--work-dir', str(tmp_path / every), '--norm', norm, '--seed', '0']
        train.main([config, *arguments, '--cfg-options', *options])
    assert (tmp_path / '1' / 'results.json').read_bytes() == (tmp_path / '3' / 'results.json').read_bytes()
    assert not differing(tmp_path / '1' / 'epoch_3.pth', tmp_path / '3' / 'epoch_3.pth')


@pytest.mark.slow
def test_so_is_one_of_two_processes(tmp_path):
    config = tiny.write_config(tmp_path, MORE + "train_dataloader['num_workers'] = 1\n")
    options = ['--norm', 'cbn', '--cfg-options', 'train_cfg.max_epochs=3', 'train_cfg.val_interval=1']
    run_tool_in_two('train', config, '--work-dir', tmp_path / 'whole', *options)
    arguments = ['--work-dir', tmp_path / 'rest', '--resume', tmp_path / 'whole' / 'epoch_2.pth']
    run_tool_in_two('train', config, *arguments, *options)
    assert not differing(tmp_path / 'rest' / 'epoch_3.pth', tmp_path / 'whole' / 'epoch_3.pth')
