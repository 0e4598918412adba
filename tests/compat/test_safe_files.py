"""A run that is killed at any file operation leaves checkpoints to go on from, and goes on to the same end."""

import inspect
import io
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner

import mmdet_norms  # noqa: F401
from mmdet_norms import files
from mmdet_norms.compat import safe_files

SCORES = [0.1, 0.4, 0.3, 0.6, 0.5]  # of the epochs: better, better, worse, better, worse


class LineModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, y, mode):
        return dict(loss=((self.layer(x) - y) ** 2).mean()) if mode == 'loss' else [self.layer(x)]


class Points(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return dict(x=torch.tensor([i / 8.0, 1.0]), y=torch.tensor([float(i)]))


class Scripted(BaseMetric):
    """Scores by epoch, or by iteration / 2."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        from mmengine.logging import MessageHub

        score = SCORES[(MessageHub.get_current_instance().get_info('iter') + 1) // 2 - 1]
        return dict(acc=score, loss=score)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    # what takes the time in a run of ten steps: compilers asked for their versions, formatting, waiting for the disk
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setattr(Config, 'pretty_text', '')
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
    entries = ((MODELS, LineModel), (DATASETS, Points), (METRICS, Scripted))
    for registry, cls in entries:
        registry.register_module(cls.__name__, force=True, module=cls)
    yield
    for registry, cls in entries:
        registry._module_dict.pop(cls.__name__)


def run(work_dir, resume=False, by_epoch=True, **checkpoint):
    """Five epochs, or ten iterations: a checkpoint and a validation every two iterations."""
    data = dict(dataset=dict(type='Points'), batch_size=2, collate_fn=dict(type='default_collate'))
    checkpoint = dict(type='CheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 2, **checkpoint)
    loop = dict(max_epochs=5) if by_epoch else dict(max_iters=10, val_interval=2)
    runner = Runner.from_cfg(
        Config(
            dict(
                model=dict(type='LineModel'),
                work_dir=str(work_dir),
                train_dataloader=dict(data, sampler=dict(type='DefaultSampler', shuffle=False)),
                val_dataloader=dict(data, sampler=dict(type='DefaultSampler', shuffle=False)),
                val_evaluator=dict(type='Scripted'),
                train_cfg=dict(by_epoch=by_epoch, **loop),
                val_cfg=dict(),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
                default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=checkpoint),
                custom_hooks=[dict(type='PendingValidationHook')],
                randomness=dict(seed=0),
                resume=resume,
                experiment_name=f'{work_dir}_{resume}',
                log_level='ERROR',
            )
        )
    )
    runner.train()
    return runner


@pytest.mark.parametrize('by_epoch, end', [(True, 'train_cfg.max_epochs is 5'), (False, 'train_cfg.max_iters is 10')])
def test_a_resumed_run_that_has_nothing_left_to_train_says_so(tmp_path, monkeypatch, by_epoch, end):
    said = []
    monkeypatch.setattr(MMLogger, 'warning', lambda self, text, *args, **kwargs: said.append(str(text)))
    run(tmp_path, by_epoch=by_epoch)
    assert not any('left to train' in text for text in said)
    run(tmp_path, resume=True, by_epoch=by_epoch)
    (text,) = [text for text in said if 'left to train' in text]
    assert end in text and 'iteration 10' in text


def in_a_child(function, *args, **kwargs):
    """Call it in a forked process; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*args, **kwargs)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_and_be_killed(work_dir, at, **options):
    """Die by SIGKILL at the file operation of that number; without one, write their number to a file."""
    done = 0

    def counted(function):
        def operation(*args, **kwargs):
            nonlocal done
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return operation

    def half(function):
        def write(path, content):
            if done + 1 == at:  # half a file is there when the signal comes
                function(path, content[: len(content) // 2])
            return counted(function)(path, content)

        return write

    files.os.replace = counted(os.replace)
    files.Path.write_bytes = half(Path.write_bytes)
    LocalBackend.remove = counted(LocalBackend.remove)
    run(work_dir, **options)
    (Path(work_dir) / 'operations').write_text(str(done))


def state_of(path):
    checkpoint = torch.load(path)
    buffer = io.BytesIO()
    torch.save([checkpoint['state_dict'], checkpoint['optimizer'], checkpoint['meta']['iter']], buffer)
    return buffer.getvalue(), checkpoint['message_hub']['runtime_info']['best_score']


def checkpoints_in(folder):
    return sorted(path.name for path in folder.glob('*.pth') if not path.name.startswith('.'))


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_a_kill_at_any_file_operation_loses_nothing(tmp_path, by_epoch):
    options = dict(by_epoch=by_epoch, max_keep_ckpts=1, save_best='acc')
    assert in_a_child(run_and_be_killed, tmp_path / 'whole', 0, **options) == 0
    operations = int((tmp_path / 'whole' / 'operations').read_text())
    last = 'epoch_5.pth' if by_epoch else 'iter_10.pth'
    expected = checkpoints_in(tmp_path / 'whole')
    assert len(expected) == 2 and last in expected and operations > 40
    for at in range(10 if by_epoch else 15, operations + 1, 11):  # tools/kill_test.py is for more
        folder = tmp_path / f'killed_{at}'
        assert in_a_child(run_and_be_killed, folder, at, **options) == -signal.SIGKILL
        for name in checkpoints_in(folder):
            torch.load(folder / name)  # whole, whatever it is
        if (folder / 'last_checkpoint').exists():
            assert Path((folder / 'last_checkpoint').read_text()).is_file()
            steps = [name for name in checkpoints_in(folder) if not name.startswith('best')]
            assert 1 <= len(steps) <= 2
        assert in_a_child(run, folder, resume=True, **options) == 0
        assert checkpoints_in(folder) == expected, f'killed at operation {at}'
        assert state_of(folder / last) == state_of(tmp_path / 'whole' / last), f'killed at operation {at}'
        shutil.rmtree(folder)


def test_a_checkpoint_goes_when_the_next_one_is_there_and_named(tmp_path, monkeypatch):
    """The order of things, by what lies on the disk at every step."""
    seen = []

    def look(function):
        def operation(*args):
            seen.append((checkpoints_in(tmp_path), (tmp_path / 'last_checkpoint').exists()))
            return function(*args)

        return operation

    monkeypatch.setattr(LocalBackend, 'put', look(LocalBackend.put))
    monkeypatch.setattr(LocalBackend, 'remove', look(LocalBackend.remove))
    run(tmp_path, max_keep_ckpts=1, save_best='acc')
    after_the_first = [names for names, named in seen if named]
    assert len(after_the_first) > 10
    for names in after_the_first:
        assert any(name.startswith('epoch') for name in names)
    scored = [names for names in after_the_first if 'best_acc_epoch_1.pth' in names]
    scored = after_the_first[after_the_first.index(scored[0]) :]
    assert all(any(name.startswith('best') for name in names) for names in scored)


def test_several_best_checkpoints_are_kept_apart(tmp_path):
    run(tmp_path, max_keep_ckpts=2, save_best=['acc', 'loss'], rule=['greater', 'less'])
    assert checkpoints_in(tmp_path) == ['best_acc_epoch_4.pth', 'best_loss_epoch_1.pth', 'epoch_4.pth', 'epoch_5.pth']


def test_a_score_of_another_metric_is_not_the_best_of_this_one(tmp_path):
    """The best loss, 0.1 of the first epoch, is better than any accuracy to come."""
    assert in_a_child(run_and_be_killed, tmp_path, 26, save_best='loss', rule='less') == -signal.SIGKILL
    run(tmp_path, resume=True, save_best='acc', rule='less')
    best = [name for name in checkpoints_in(tmp_path) if name.startswith('best')]
    assert best == ['best_acc_epoch_5.pth', 'best_loss_epoch_1.pth']  # of epochs 4 and 5, which are yet to come


@pytest.mark.parametrize('kind', ['copied', 'moved', 'resumed elsewhere'])
def test_the_best_checkpoint_of_another_folder_is_not_deleted(tmp_path, kind):
    """Its path is in the checkpoint, as an absolute one."""
    first, second = tmp_path / 'first', tmp_path / 'second'
    assert in_a_child(run_and_be_killed, first, 26, save_best='acc') == -signal.SIGKILL
    before = checkpoints_in(first)
    assert 'best_acc_epoch_2.pth' in before and 'best_acc_epoch_4.pth' not in before
    if kind == 'resumed elsewhere':
        second.mkdir()
        (second / 'last_checkpoint').write_text(str(first / 'epoch_2.pth'))
    else:
        (shutil.copytree if kind == 'copied' else shutil.move)(first, second)
        (second / 'last_checkpoint').write_text(str(second / 'epoch_2.pth'))
    run(second, resume=True, save_best='acc')
    assert [name for name in checkpoints_in(second) if name.startswith('best')] == ['best_acc_epoch_4.pth']
    if kind != 'moved':
        assert checkpoints_in(first) == before


@pytest.mark.parametrize('name', ['a.pth', 'a.json', 'a.pkl', 'a.py', 'a.yaml'])
def test_what_mmengine_writes_is_whole_or_not_there(tmp_path, monkeypatch, name):
    from mmengine.fileio import dump

    target = tmp_path / name
    target.write_text('old')

    def write():
        if name.endswith(('.py', '.yaml')):
            Config(dict(a=1)).dump(target)
        elif name.endswith('.pth'):
            torch.save(dict(a=1), buffer := io.BytesIO())
            LocalBackend().put(buffer.getvalue(), target)
        else:
            dump(dict(a=1), target)

    def broken(*args):
        assert target.read_text() == 'old'
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, 'replace', broken)
        write()
    assert target.read_text() == 'old' and os.listdir(tmp_path) == [name]
    write()
    assert target.read_bytes() != b'old' and os.listdir(tmp_path) == [name]


def test_mmengine_is_what_was_changed():
    """A canary: what compat/safe_files.py replaces does in this mmengine what it did in the one it was written for."""
    source = inspect.getsource(safe_files._stock_save)
    assert list(inspect.signature(safe_files._stock_save).parameters) == ['self', 'runner', 'step', 'meta']
    for line in ('self.keep_ckpt_ids.popleft()', "open(save_file, 'w')", 'runner.save_checkpoint(', '**self.args)'):
        assert line in source, line
    assert 'self.file_backend.remove(best_ckpt_path)' in inspect.getsource(safe_files._stock_save_best)
    assert "open(file, 'w'" in inspect.getsource(safe_files._stock_dump)
    assert CheckpointHook._save_checkpoint_with_step is safe_files.save_checkpoint_with_step
    assert "open(filepath, 'wb')" in inspect.getsource(inspect.getmodule(LocalBackend))
