"""tools/train.py --dry-run: all checks of a training, what it would do, and nothing of it done."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer

import mmdet_norms  # noqa: F401
from helpers import tiny, tiny_cls
from helpers.commands import fails
from mmdet_norms.cli import dry_run, train
from mmdet_norms.engine import work_dir as work_dirs
from mmdet_norms.engine.dry_run import out_of_memory


def look(config, work_dir, *arguments):
    """The facts that a dry run writes."""
    for kind in (MMLogger, Visualizer):  # of a run of the same second, which would be written to
        kind._instance_dict.clear()
    out = Path(config).parent / 'facts.json'
    train.main([str(a) for a in (config, '--work-dir', work_dir, '--dry-run', '--json', out, *arguments)])
    return json.loads(out.read_text())


def state(folder):
    """Every file with its content and time."""
    paths = (path for path in Path(folder).rglob('*') if path.is_file() and path.name != '.training')
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_a_detector(tmp_path, capsys):
    config = tiny.write_config(
        tmp_path,
        "visualizer = dict(vis_backends=[dict(type='TensorboardVisBackend')])\n"
        f"default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2, out_dir='{tmp_path / 'elsewhere'}'))\n"
        "param_scheduler = [dict(type='MultiStepLR', milestones=[4, 5]), "
        "dict(type='MultiStepMomentum', milestones=[9])]\n",
    )
    before = state(tmp_path)
    work_dir = tmp_path / 'work' / 'run'
    options = ['--precise-bn', 3, '--cfg-options', 'train_cfg.max_epochs=6', 'train_cfg.val_interval=2']
    facts = look(config, work_dir, '--norm', 'cbn', '--threads', 1, *options)
    said = capsys.readouterr().out
    assert state(tmp_path).keys() - before.keys() == {str(tmp_path / 'facts.json')}
    assert not (tmp_path / 'work').exists() and not (tmp_path / 'elsewhere').exists()

    whole = facts['parts'][-1]
    assert whole['norms'] == {'BN': 20, 'CBN (window 3)': 13} and whole['parameters'] == whole['trainable'] > 2e5
    assert facts['data']['train'] == dict(
        images=4, different=4, objects=dict(disc=3, box=3), empty=1, ignored=1, left_out=0
    )
    assert 'disc 3, box 3; 1 ignored (crowds)\n' in said
    schedule = facts['schedule']
    assert (schedule['iterations'], schedule['iterations_per_epoch'], schedule['batch_size']) == (12, 2, 2)
    points = {point['iteration']: point['learning_rate'] for point in schedule['learning_rates'][0]['points']}
    assert points == pytest.approx({0: 0.002, 8: 0.0002, 10: 0.00002, 11: 0.00002})
    assert '0.0002 at iteration 8 (after epoch 4)' in said
    assert schedule['evaluations'] == [2, 4, 6]
    assert schedule['checkpoints'] == [dict(unit='epochs', after=[1, 2, 3, 4, 5, 6], kept=2)]
    assert facts['checkpoint_bytes'] > 3 * 4 * whole['parameters']  # AdamW has two moments
    assert any('MultiStepMomentum' in line for line in facts['warnings']) and 'MultiStepMomentum' in said
    cost = facts['time']
    assert cost['settled'] and cost['timed_iterations'] >= 3 and 0 <= cost['waiting_for_data'] < 1
    assert cost['fastest'] <= cost['seconds_per_iteration'] <= cost['slowest']
    precise = cost['seconds_per_precise_statistics']  # an evaluation and a checkpoint have the same
    assert 0 < precise < 60 and 'precise statistics of ' in said
    assert cost['seconds'] == pytest.approx(
        12 * cost['seconds_per_iteration'] + 3 * cost['seconds_per_evaluation'] + 6 * precise
    )
    assert facts['memory']['peak_bytes'] > 1e8

    changed = {one['key']: (one['before'], one['now']) for one in facts['changed_by_command']}
    assert changed['model.neck.norm_cfg'] == (None, "dict(type='CBN', buffer_num=3, burnin=8)")
    assert 'custom_hooks' not in changed and 'work_dir' not in changed
    assert 'train_cfg.max_epochs: 1 -> 6' in said and facts['base'] == ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py']
    own = {one['key'] for one in facts['changed_from_base']}
    assert own >= {'model.backbone.depth', 'train_dataloader.num_workers'}
    assert f"'{work_dir}'" in facts['whole_config'] and 'PendingValidationHook' in facts['hooks']
    assert '/tmp/mmdet_norms-' not in json.dumps(facts) and 'The whole config' not in said


def test_a_classifier_that_goes_on_and_one_that_would_overwrite(tmp_path, capsys):
    config, work_dir = tiny_cls.write_config(tmp_path), tmp_path / 'run'
    train.main([str(config), '--work-dir', str(work_dir), '--seed', '0', '--threads', '1', '--epochs', '1'])
    there = state(work_dir)
    assert '--resume, replace it by --overwrite' in fails(
        capsys, train.main, config, '--work-dir', work_dir, '--dry-run'
    )
    facts = look(config, work_dir, '--overwrite', '-v')
    assert 'deletes 1 checkpoints of an earlier run (epoch_1.pth)' in facts['start']
    assert facts['data']['val'] == dict(
        images=12, different=12, objects=dict(box=4, disc=4, ring=4), empty=None, ignored=0, left_out=0
    )
    assert 'The whole config\n' in capsys.readouterr().out
    options = ['train_cfg.max_epochs=3', 'optim_wrapper.accumulative_counts=3']
    facts = look(config, work_dir, '--resume', '--cfg-options', *options)
    assert 'steps every 3 iterations; goes on at iteration 2, amid a step\n' in capsys.readouterr().out
    assert any('its first step of the optimizer has 1 of 3 batches' in line for line in facts['warnings'])
    assert facts['start'] == f'goes on from {work_dir}/epoch_1.pth'
    assert (facts['schedule']['start_iteration'], facts['schedule']['evaluations']) == (2, [2, 3])
    train.main([str(config), '--work-dir', str(work_dir), '--dry-run', '--resume', '--epochs', '1'])
    assert 'nothing to do' in capsys.readouterr().out
    assert state(work_dir) == there


@pytest.mark.parametrize(
    'start, said',
    [(10, 'goes on at iteration 10; nothing is left to train'), (6, 'goes on at iteration 6, amid a step')],
)
def test_a_finished_run_is_not_amid_a_step(start, said):
    """Its last one had fewer batches."""
    schedule = dict(unit='iterations', iterations_per_epoch=None, iterations=10, batch_size=2, iterations_per_step=4)
    schedule |= dict(start_iteration=start, learning_rates=[], evaluations=[], checkpoints=[])
    assert dry_run._schedule_lines(dict(schedule=schedule))[0].endswith(said)


def test_what_would_write_elsewhere_is_left_out(tmp_path):
    cfg = Config(
        dict(
            work_dir='own',
            visualizer=dict(vis_backends=[dict(type='WandbVisBackend')]),
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', out_dir='s3://a'),
                logger=dict(type='TimedLoggerHook', out_dir='b'),
            ),
            custom_hooks=[dict(type='PendingValidationHook'), dict(type='NormHook')],
        )
    )
    other = dry_run._elsewhere(cfg, SimpleNamespace(copies=f'{tmp_path}/annotations'))
    assert (
        other.work_dir == f'{tmp_path}/run'
        and other.visualizer.vis_backends == [dict(type='LocalVisBackend')]
        and cfg.work_dir == 'own'
    )
    assert all('out_dir' not in hook for hook in other.default_hooks.values())
    assert [hook['type'] for hook in other.custom_hooks] == ['NormHook']


def test_averages_of_the_weights_are_in_each_checkpoint(tmp_path):
    config = tiny_cls.write_config(tmp_path)
    plain = look(config, tmp_path / 'run', '--epochs', 1)
    config.write_text(config.read_text() + "custom_hooks = [dict(type='EMAHook')]\n")
    averaged = look(config, tmp_path / 'run', '--epochs', 1)
    assert averaged['checkpoint_bytes'] - plain['checkpoint_bytes'] > 4 * plain['parts'][-1]['parameters']


def test_a_work_dir_that_cannot_be_used(tmp_path, capsys, monkeypatch):
    config = tiny_cls.write_config(tmp_path)
    (tmp_path / 'file').write_text('')
    assert 'Not a directory' in fails(capsys, train.main, config, '--work-dir', tmp_path / 'file' / 'w', '--dry-run')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '.training').write_text('{"pid": 1, "host": "other", "since": "today"}')
    monkeypatch.setattr(work_dirs, '_lock', lambda handle: False)
    said = fails(capsys, train.main, config, '--work-dir', tmp_path / 'run', '--dry-run')
    assert 'another run is at work there (process 1 on other, since today)' in said


def test_options_that_go_with_it(tmp_path, capsys):
    config = tiny_cls.write_config(tmp_path)
    assert '--json goes with --dry-run' in fails(capsys, train.main, config, '--json', tmp_path / 'a.json')
    assert '--verbose goes with --dry-run' in fails(capsys, train.main, config, '-v')
    (tmp_path / 'folder').mkdir()
    assert '--json: ' in fails(capsys, train.main, config, '--dry-run', '--json', tmp_path / 'folder')


@pytest.mark.parametrize(
    'error',
    [
        torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_too_little_memory_is_told_from_other_errors(error):
    with pytest.raises(MemoryError, match=r'^(CUDA out of memory|DefaultCPUAllocator: .* 8 bytes\.)$'), out_of_memory():
        raise error
    with pytest.raises(RuntimeError, match='sizes'), out_of_memory():
        raise RuntimeError('sizes of tensors must match')


def test_warnings_of_the_log_are_kept_once():
    said, logger = dry_run._Warnings(), MMLogger.get_instance('warnings')  # of mmengine's own kind, as a runner has
    logger.addHandler(said)
    for _ in range(2):
        logger.warning('the schedule %s', 'ends')
    logger.info('no warning')
    assert said.lines == ['the schedule ends']


def test_durations_and_sizes():
    shown = [dry_run._duration(seconds) for seconds in (0.2, 59, 61, 3700, 300_000)]
    assert shown == ['0.2 s', '59 s', '1 min', '1 h 02 min', '3.5 days']
    assert (dry_run._mb(3 * 2**20), dry_run._mb(3 * 2**30)) == ('3 MB', '3.0 GB')
