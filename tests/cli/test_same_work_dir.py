"""The same command again, a job that is started again, a disk that is full: nothing lost, one sentence."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import mmdet_norms  # noqa: F401
from helpers import tiny, warm
from helpers.processes import run_in_two
from mmdet_norms.cli import test, train
from mmdet_norms.engine import shared_memory
from mmdet_norms.engine.safe_checkpoints import CheckpointFolder
from mmdet_norms.engine.work_dir import TESTING, TRAINING, Begins


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a config and a work dir of two epochs."""
    folder = tmp_path_factory.mktemp('trained')
    config = tiny.write_config(folder)
    run(config, folder / 'run', '--seed', '0', epochs=2)
    return folder


def run(config, work_dir, *arguments, epochs=1, **options):
    options = [f'{key}={value}' for key, value in dict({'train_cfg.max_epochs': epochs}, **options).items()]
    train.main([str(a) for a in (config, '--work-dir', work_dir, *arguments, '--cfg-options', *options)])


@pytest.fixture
def copied(trained, tmp_path):
    import shutil

    return trained / 'tiny.py', Path(shutil.copytree(trained / 'run', tmp_path / 'run'))


def fails(capsys, function, *arguments, **options):
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **options)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith('error: ')]
    assert len(errors) == 1 and not any('Traceback' in line for line in lines)
    return errors[0]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob('*') if path.is_file() and path.name != TRAINING}


def test_the_same_command_again_is_refused_and_touches_nothing(copied, capsys):
    config, work_dir = copied
    before = content(work_dir)
    message = fails(capsys, run, config, work_dir)
    assert 'holds 2 checkpoints of an earlier run (epoch_1.pth, epoch_2.pth)' in message
    assert '--resume' in message and '--overwrite' in message and content(work_dir) == before
    assert 'give one of them' in fails(capsys, run, config, work_dir, '--overwrite', '--resume')


def test_overwrite_replaces_the_run_only_when_training_begins(copied, capsys):
    config, work_dir = copied
    (work_dir / 'mine.pth').write_text('mine')
    before = content(work_dir)
    start = {'load_from': work_dir / 'epoch_1.pth'}
    assert 'from which load_from starts' in fails(capsys, run, config, work_dir, '--overwrite', **start)
    fails(capsys, run, config, work_dir, '--overwrite', **{'model.neck.norm_cfg.type': 'BNTE'})
    assert content(work_dir) == before
    looked = ('--norm-stats', '2', '--norm-stats-layers', '*.nope')
    assert 'fits none of the' in fails(capsys, run, config, work_dir, '--overwrite', *looked)
    assert content(work_dir) == before
    run(config, work_dir, '--overwrite', epochs=1)
    after = content(work_dir)
    assert sorted(name for name in after if name.endswith('.pth')) == ['epoch_1.pth', 'mine.pth']
    assert after['mine.pth'] == b'mine' and json.loads(after['results.json'])['epoch'] == 1


@pytest.mark.parametrize('earlier', [False, True])
def test_a_training_that_fails_leaves_a_log_only_if_it_had_begun(copied, tmp_path, capsys, earlier):
    """mmengine writes the config and opens the log before anything may refuse the training."""
    config, work_dir = copied
    work_dir = work_dir if earlier else tmp_path / 'new'
    before = everything(work_dir)
    assert bool(before) == earlier
    again = ('--overwrite',) * earlier
    fails(capsys, run, config, work_dir, *again, '--norm-stats', '2', '--norm-stats-layers', '*.nope')
    assert everything(work_dir) == before
    fails(capsys, run, config, work_dir, *again, **{'optim_wrapper.optimizer.lr': 1e30})
    assert {path.suffix for path in everything(work_dir)} >= {'.py', '.log'}
    assert Config.fromfile(work_dir / 'tiny.py').optim_wrapper.optimizer.lr == 1e30


@HOOKS.register_module()
class Stopped(Hook):
    """Ctrl-C while the training gets ready."""

    def before_train(self, runner):
        raise KeyboardInterrupt


def test_ctrl_c_before_the_training_begins_leaves_the_run_alone(copied, capsys):
    config, work_dir = copied
    before = everything(work_dir)
    with pytest.raises(SystemExit) as stopped:
        run(config, work_dir, '--overwrite', custom_hooks='[dict(type="Stopped")]')
    assert stopped.value.code == 130 and everything(work_dir) == before


def everything(folder):
    held = (TRAINING, TESTING)
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name not in held}


def test_overwrite_deletes_what_all_processes_agree_on(tmp_path):
    """A hook may refuse the training in one of them only."""
    for refuses in (1, None):
        (tmp_path / 'epoch_1.pth').write_text('earlier')
        ends = run_in_two(tmp_path, _overwrite, tmp_path, refuses)
        assert ends == ([False, False] if refuses else [True, True])
        assert (tmp_path / 'epoch_1.pth').exists() == bool(refuses)


def _overwrite(rank, folder, refuses):
    hook = Begins(threading.Event(), CheckpointFolder.of(Config(dict(work_dir=str(folder)))))
    try:
        if rank != refuses:
            hook.before_train(SimpleNamespace(logger=logging.getLogger('test')))
            return True
    except RuntimeError:  # the other one has gone
        pass
    return False


def test_a_finished_run_says_so_and_can_be_made_longer(copied, capsys):
    config, work_dir = copied
    before = content(work_dir)
    run(config, work_dir, '--resume', epochs=2)
    said = capsys.readouterr().out
    assert 'nothing to do: the run in' in said and 'train_cfg.max_epochs=2' in said and content(work_dir) == before
    run(config, work_dir, '--resume', epochs=3)
    assert torch.load(work_dir / 'epoch_3.pth')['meta']['epoch'] == 3


def test_a_checkpoint_of_another_run_is_not_resumed_into_the_work_dir_of_one(copied, trained, capsys, monkeypatch):
    config, work_dir = copied
    other = trained / 'run' / 'epoch_1.pth'
    before = content(work_dir)
    assert 'of an earlier run' in fails(capsys, run, config, work_dir, '--resume', other)
    assert 'of an earlier run' in fails(capsys, run, config, work_dir, resume=True, load_from=other)
    monkeypatch.chdir(work_dir)  # nor, for an empty variable of the shell, into the current folder
    assert '--work-dir' in fails(capsys, run, config, '')
    assert content(work_dir) == before
    run(config, work_dir, '--resume', work_dir / 'epoch_2.pth', epochs=2)
    said = max(work_dir.glob('*/*.log'), key=os.path.getmtime).read_text()
    assert 'Nothing is left to train: ' in said


def test_a_job_that_always_resumes_starts_from_load_from_first(trained, tmp_path, capsys):
    from mmengine.config import Config

    args = train.parse_args([str(trained / 'tiny.py'), '--work-dir', str(tmp_path / 'new'), '--resume'])
    args.cfg_options = dict(load_from=str(trained / 'run' / 'epoch_2.pth'))
    cfg = train.train_config(args)
    assert cfg.load_from == str(trained / 'run' / 'epoch_2.pth') and not cfg.resume
    assert 'no checkpoint in' in args.notes[0] and 'epoch_2.pth' in args.notes[0]
    args.work_dir = str(trained / 'run')
    cfg = train.train_config(args)
    assert cfg.load_from == str(trained / 'run' / 'epoch_2.pth') and cfg.resume and args.notes == []
    # the config's own word for it
    args.resume, args.cfg_options = None, dict(resume=True)
    assert train.train_config(args).load_from == str(trained / 'run' / 'epoch_2.pth')
    args.work_dir = str(tmp_path / 'new')
    assert not train.train_config(args).resume
    assert isinstance(cfg, Config)


def test_a_damaged_checkpoint_is_passed_over_in_the_log(copied):
    config, work_dir = copied
    last = work_dir / 'epoch_2.pth'
    last.write_bytes(last.read_bytes()[:5000])
    (work_dir / '.epoch_3.part-1-abcdef.pth').write_text('half')
    run(config, work_dir, '--resume', epochs=2)
    log = max(work_dir.glob('*/*.log'), key=os.path.getmtime).read_text()
    assert 'epoch_2.pth is not used' in log and 'going on from' in log and 'half-written' in log
    assert torch.load(last)['meta']['epoch'] == 2 and not list(work_dir.glob('.*.part-*'))


def test_a_training_and_a_test_in_one_work_dir(copied, capsys):
    config, work_dir = copied
    checkpoint = str(work_dir / 'epoch_2.pth')
    test.main([str(config), checkpoint, '--work-dir', str(work_dir), '--eval', 'bbox'])  # after the end: as ever
    assert json.loads((work_dir / 'results.json').read_text())['split'] == 'test'
    code = 'import sys, time; from mmdet_norms.engine.work_dir import claimed\nwith claimed(sys.argv[1]):\n'
    code += '    print(flush=True)\n    time.sleep(100)'
    with warm.Popen([sys.executable, '-c', code, str(work_dir)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        for function, arguments in (
            (test.main, [str(config), checkpoint, '--work-dir', str(work_dir)]),
            (train.main, [str(config), '--work-dir', str(work_dir), '--resume', checkpoint]),
        ):
            said = fails(capsys, function, arguments)
            assert f'another run is at work there (process {holder.pid} on ' in said
        holder.kill()
    run(config, work_dir, '--resume', checkpoint, epochs=2)


@HOOKS.register_module()
class FullDisk(Hook):
    """From the second epoch on nothing can be written."""

    priority = 'VERY_HIGH'

    def after_train_epoch(self, runner):
        if runner.epoch == 1:
            os.fsync = _full


def _full(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_keeps_what_is_there(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, 'fsync', os.fsync)
    config = tmp_path / 'full.py'
    config.write_text(f"_base_ = '{trained}/tiny.py'\ncustom_hooks = [dict(type='FullDisk')]\n")
    options = {'default_hooks.checkpoint.max_keep_ckpts': 1}
    message = fails(capsys, run, config, tmp_path / 'run', epochs=2, **options)
    assert 'epoch_2.pth: No space left on device; make room' in message
    assert torch.load((tmp_path / 'run' / 'last_checkpoint').read_text())['meta']['epoch'] == 1
    assert not list((tmp_path / 'run').glob('.*.part-*'))


@pytest.mark.parametrize('disk', ['gone', 'small', 'read-only'])
def test_workers_without_shared_memory_are_told_before_the_start(trained, tmp_path, capsys, monkeypatch, disk):
    if disk == 'gone':
        monkeypatch.setattr(shared_memory, 'SHARED', tmp_path / 'nowhere')
    elif disk == 'small':
        monkeypatch.setattr(shared_memory.shutil, 'disk_usage', lambda path: (10**12, 0, 16384))
    else:
        monkeypatch.setattr(shared_memory.os, 'access', lambda path, mode: path != shared_memory.SHARED)
    workers = {'train_dataloader.num_workers': 2}
    message = fails(capsys, run, trained / 'tiny.py', tmp_path / 'run', **workers)
    assert 'train_dataloader.num_workers=2: ' in message and 'num_workers=0' in message and '--shm-size' in message
    checkpoint = str(trained / 'run' / 'epoch_2.pth')
    options = ['--cfg-options', 'test_dataloader.num_workers=2']
    arguments = [str(trained / 'tiny.py'), checkpoint, '--work-dir', str(tmp_path / 'tested'), *options]
    assert 'test_dataloader.num_workers=2' in fails(capsys, test.main, arguments)
    train.train_config(train.parse_args([str(trained / 'tiny.py'), '--work-dir', str(tmp_path)]))  # none are asked for


@pytest.mark.parametrize('what', ['work dir', '--out', '--show-dir'])
def test_a_file_where_a_folder_should_be_is_found_before_anything_is_built(trained, tmp_path, capsys, what):
    (tmp_path / 'file').touch()
    checkpoint = str(trained / 'run' / 'epoch_2.pth')
    places = {'work dir': '--work-dir', '--out': '--out', '--show-dir': '--show-dir'}
    path = tmp_path / 'file' / ('a.pkl' if what == '--out' else 'folder')
    arguments = [str(trained / 'tiny.py'), checkpoint, '--work-dir', str(tmp_path / 'run'), places[what], str(path)]
    message = fails(capsys, test.main, arguments)
    assert what in message and 'a file where a folder should be' in message
    assert not list((tmp_path / 'run').glob('*/*.log'))


@pytest.mark.skipif(os.geteuid() != 0, reason='only root may mount a small disk')
@pytest.mark.parametrize('kind', ['too small', 'fills up', 'read-only'])
def test_a_small_disk(trained, tmp_path, capsys, kind):
    disk = tmp_path / 'disk'
    disk.mkdir()
    size = {'too small': '200k', 'fills up': '3m', 'read-only': '1m,ro'}[kind]
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(disk)], check=False).returncode:
        pytest.skip('mounting is not allowed here')
    try:
        message = fails(capsys, run, trained / 'tiny.py', disk / 'run', epochs=30, **{'train_cfg.val_interval': 30})
        if kind == 'fills up':
            assert 'No space left on device' in message
            last = Path((disk / 'run' / 'last_checkpoint').read_text())
            assert torch.load(last)['meta']['epoch'] == int(last.stem.removeprefix('epoch_'))
        else:
            assert {'too small': 'MB left', 'read-only': 'Read-only file system'}[kind] in message
    finally:
        import logging

        for logger in logging.Logger.manager.loggerDict.values():
            for handler in getattr(logger, 'handlers', ()):
                if str(disk) in getattr(handler, 'baseFilename', ''):
                    handler.close()
        subprocess.run(['umount', '-l', str(disk)], check=False)


@pytest.mark.slow
def test_a_command_beside_another_and_after_it_is_killed(trained, tmp_path, capsys):
    """The first is a process of its own: the second is refused, and after kill -9 of the first it goes on."""
    tool = Path(__file__).resolve().parents[2] / 'tools' / 'train.py'
    arguments = [trained / 'tiny.py', tmp_path / 'run', '--resume']
    command = [sys.executable, tool, arguments[0], '--work-dir', *arguments[1:]]
    command += ['--cfg-options', 'train_cfg.max_epochs=1000', 'train_cfg.val_interval=1000']
    with warm.Popen([*map(str, command)], stdout=subprocess.DEVNULL) as first:
        end = time.monotonic() + 120
        while not (tmp_path / 'run' / 'last_checkpoint').exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert f'process {first.pid} on' in fails(capsys, run, *arguments)
        first.send_signal(signal.SIGKILL)
    run(*arguments)
