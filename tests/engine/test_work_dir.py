"""One run in a work dir at a time, and nothing lost in it by accident."""

import errno
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import mmdet_norms  # noqa: F401
from mmdet_norms.engine import work_dir
from mmdet_norms.engine.safe_checkpoints import CheckpointFolder
from mmdet_norms.engine.work_dir import TESTING, TRAINING, claimed, require_unclaimed
from mmdet_norms.errors import UserError


class Held:
    """A child process that holds a work dir, with a worker of its own that lives on."""

    def __init__(self, folder, name=TRAINING, worker=False):
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                with claimed(folder, name):
                    if worker and os.fork() == 0:
                        os.write(tell, b'x')
                        time.sleep(60)
                        os._exit(0)
                    os.write(tell, b'x')
                    time.sleep(60)
            finally:
                os._exit(0)
        assert os.read(ready, 1) == b'x'
        os.close(ready)
        os.close(tell)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_a_second_run_is_told_whose_it_is_and_a_kill_sets_it_free(tmp_path):
    held = Held(tmp_path, worker=True)
    said = f'process {held.pid} on {socket.gethostname()}.*--work-dir'
    with pytest.raises(UserError, match=said), claimed(tmp_path):
        pass
    with pytest.raises(UserError, match='another run'):
        require_unclaimed(tmp_path)
    held.kill()
    with claimed(tmp_path):
        assert json.loads((tmp_path / TRAINING).read_text())['pid'] == os.getpid()
    assert (tmp_path / TRAINING).read_text() == ''


def test_a_test_is_in_the_way_of_tests_alone(tmp_path):
    held = Held(tmp_path, TESTING)
    require_unclaimed(tmp_path)
    with claimed(tmp_path):
        pass
    with pytest.raises(UserError, match='another run'), claimed(tmp_path, TESTING):
        pass
    held.kill()
    with claimed(tmp_path, TESTING):
        pass


def owned_by(folder, **owner):
    (folder / TRAINING).write_text(json.dumps(dict(dict(pid=1, host='elsewhere', since='now'), **owner)))
    return folder / TRAINING


def test_a_run_on_another_machine_shows_signs_of_life(tmp_path, monkeypatch, capsys):
    path = owned_by(tmp_path)
    beat = threading.Timer(0.3, os.utime, [path])
    beat.start()
    with pytest.raises(UserError, match=f'process 1 on elsewhere.*delete {path}'), claimed(tmp_path):
        pass
    beat.join()
    os.utime(path, (time.time() - 1000,) * 2)  # none for long: taken over at once
    with claimed(tmp_path):
        assert json.loads(path.read_text())['host'] == socket.gethostname()
    owned_by(tmp_path)
    monkeypatch.setattr(work_dir, '_DEAD', 1)
    with claimed(tmp_path):  # none while one waits
        pass
    assert 'waiting up to 1 s' in capsys.readouterr().out


def test_a_run_shows_signs_of_life_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(work_dir, '_BEAT', 0.05)
    with claimed(tmp_path):
        os.utime(tmp_path / TRAINING, (1, 1))
        end = time.monotonic() + 10
        while (tmp_path / TRAINING).stat().st_mtime == 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / TRAINING).stat().st_mtime > 1


def test_where_the_disk_has_no_locks_the_process_counts(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(work_dir.fcntl, 'lockf', no_locks)
    owned_by(tmp_path, host=socket.gethostname(), pid=os.getppid())
    with pytest.raises(UserError, match=f'process {os.getppid()} on'), claimed(tmp_path):
        pass
    owned_by(tmp_path, host=socket.gethostname(), pid=2**22 + 1)  # no process has such a number
    with claimed(tmp_path):
        pass


@pytest.mark.parametrize('content', ['', 'garbage', '[]', '{"pid": null, "host": null}', '{"pid": "x"}'])
def test_a_lock_file_that_says_nothing_is_taken(tmp_path, content):
    (tmp_path / TRAINING).write_text(content)
    with claimed(tmp_path):
        pass


@pytest.mark.parametrize('kind', ['file', 'below a file', 'folder in the way'])
def test_a_work_dir_that_cannot_be_one_is_one_message(tmp_path, kind):
    (tmp_path / 'file').touch()
    folder = tmp_path / 'file' if kind == 'file' else tmp_path / 'file' / 'run'
    if kind == 'folder in the way':
        folder = tmp_path
        (tmp_path / TRAINING).mkdir()
        with pytest.raises(OSError, match=TRAINING), claimed(folder):
            pass
        return
    with pytest.raises(UserError, match=f'work dir {folder}: .*file where a folder should be'), claimed(folder):
        pass


@pytest.mark.parametrize('code', [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_cannot_be_written_to_is_one_message(tmp_path, monkeypatch, code):
    def refuse(path, *args):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, 'write_bytes', refuse)
    with pytest.raises(UserError, match=os.strerror(code)) as error, claimed(tmp_path):
        pass
    assert str(error.value).startswith(f'work dir {tmp_path}: ') and '\n' not in str(error.value)


MADE = ['epoch_1.pth', 'iter_20.pth', 'best_coco_bbox_mAP_epoch_3.pth', 'epoch_3-0123abcd.pth', 'own-7.pth']
NOT_MADE = [
    'pretrained.pth',
    'epoch_one.pth',
    'my_epoch_1.pth',
    'epoch_1.pth.bak',
    'notes.txt',
    'results.pkl',
    'own.pth',
]


def test_overwrite_deletes_what_a_run_made_and_nothing_else(tmp_path, monkeypatch):
    for name in [*MADE, *NOT_MADE, 'last_checkpoint', 'results.json', 'finished.json']:
        (tmp_path / name).touch()
    (tmp_path / 'results-test-epoch_1.json').write_text('{"split": "test"}')  # kept by another test
    (tmp_path / 'epoch_9.pth').mkdir()
    (tmp_path / '20260101_000000').mkdir()
    folder = CheckpointFolder(tmp_path, tmp_path, ('own-{}.pth', 'epoch_{}.pth', 'iter_{}.pth'))
    assert sorted(path.name for path in folder.all()) == sorted(MADE)
    with pytest.raises(UserError, match=r'holds 5 checkpoints .*--resume.*--overwrite.*--work-dir'):
        work_dir.require_fresh(folder)
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'epoch_1.pth')
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / 'epoch_1.pth'), './epoch_1.pth', 'link.pth'):
        with pytest.raises(UserError, match=r'--overwrite deletes .*\.pth, from which load_from starts'):
            work_dir.require_replaceable(folder, dict(load_from=name))
    (tmp_path / 'link.pth').unlink()
    work_dir.require_replaceable(folder, dict(load_from=str(tmp_path / 'pretrained.pth')))
    work_dir.remove_earlier_run(folder)
    assert sorted(os.listdir(tmp_path)) == sorted([*NOT_MADE, 'epoch_9.pth', '20260101_000000'])
    work_dir.require_fresh(folder)


def test_half_written_files_of_killed_runs_go_and_those_of_living_ones_stay(tmp_path):
    from mmdet_norms.files import replacing, unfinished

    (tmp_path / '.epoch_1.part-77-abcdef.pth').touch()
    (tmp_path / '.epoch_1.part-notes.pth').touch()  # no name of ours
    with replacing(tmp_path / 'epoch_2.pth') as part:
        part.touch()
        assert [path.name for path in work_dir.tidy(CheckpointFolder(tmp_path, tmp_path))] == [
            '.epoch_1.part-77-abcdef.pth'
        ]
        assert part.exists()
    assert unfinished(tmp_path) == [] and (tmp_path / 'epoch_2.pth').exists()


def test_a_run_counts_as_finished_at_the_end_that_it_was_to_have(tmp_path):
    end = dict(max_epochs=3)
    assert not work_dir.is_finished(tmp_path, 30, end)
    work_dir.mark_finished(tmp_path, 3, 30, end)
    assert work_dir.is_finished(tmp_path, 30, end)
    assert not work_dir.is_finished(tmp_path, 20, end)  # taken back
    assert not work_dir.is_finished(tmp_path, 30, dict(max_epochs=4))  # made longer
    (tmp_path / 'finished.json').write_text('half')
    assert not work_dir.is_finished(tmp_path, 30, end)
