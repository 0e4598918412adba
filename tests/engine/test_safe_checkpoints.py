"""Which checkpoint a run goes on from, whatever a kill, a full disk or a move left behind."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

import mmdet_norms  # noqa: F401
from mmdet_norms.engine.course import validates_after
from mmdet_norms.engine.safe_checkpoints import CheckpointFolder, newest_checkpoint
from mmdet_norms.errors import UserError


def checkpoint(path, number, **more):
    content = dict(meta=dict(epoch=number, iter=10 * number), state_dict=dict(w=torch.arange(5000.0)), message_hub={})
    torch.save(dict(content, **more), path)
    os.utime(path, ns=(10**18 + number * 10**9,) * 2)
    return path


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    'half': halve,
    'flipped bit': flip_a_bit,
    'empty': lambda path: path.write_bytes(b''),
    'garbage': lambda path: path.write_bytes(os.urandom(3000)),
    'html': lambda path: path.write_text('<html>not found</html>'),
    'list': lambda path: torch.save([1, 2], path),
    'weights alone': lambda path: torch.save(dict(w=torch.zeros(2)), path),
    'no epoch': lambda path: torch.save(dict(meta={}, state_dict={}, message_hub={}), path),
    'gone': Path.unlink,
}


@pytest.fixture
def run(tmp_path):
    """A work dir of five epochs."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for number in range(1, 6):
        checkpoint(folder / f'epoch_{number}.pth', number)
    checkpoint(folder / 'best_bbox_mAP_epoch_4.pth', 4)
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_5.pth'))
    return folder


def newest(run, folder=None, **options):
    return CheckpointFolder(run, folder or run, **options).newest()


def test_the_one_that_was_saved_last_without_a_word(run):
    found = newest(run)
    assert (found.path, found.epoch, found.iter, found.notes) == (run / 'epoch_5.pth', 5, 50, [])


@pytest.mark.parametrize('damage', DAMAGES)
def test_the_newest_that_can_be_read_and_why(run, damage):
    DAMAGES[damage](run / 'epoch_5.pth')
    found = newest(run)
    assert found.path == run / 'epoch_4.pth'
    assert 'epoch_5.pth' in found.notes[0] and 'going on from' in found.notes[-1] and 'epoch_4.pth' in found.notes[-1]


def test_several_damaged_ones_are_all_named(run):
    halve(run / 'epoch_5.pth')
    flip_a_bit(run / 'epoch_4.pth')
    found = newest(run)
    assert found.path == run / 'epoch_3.pth' and len(found.notes) == 3


@pytest.mark.parametrize('content', ['', '\n', None, '/nowhere/epoch_9.pth', b'\xff\xfe'])
def test_a_last_checkpoint_file_that_says_nothing(run, content):
    last = run / 'last_checkpoint'
    last.unlink()
    if content is not None:
        last.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = newest(run)
    assert found.path == run / 'epoch_5.pth' and bool(found.notes) == (content is not None)


def test_a_run_that_was_killed_before_it_named_its_newest(run):
    (run / 'last_checkpoint').write_text(str(run / 'epoch_4.pth'))
    found = newest(run)
    assert found.path == run / 'epoch_5.pth' and 'epoch_5.pth' in found.notes[-1]


def test_a_run_that_was_taken_back_goes_on_from_there(run):
    """--resume epoch_2.pth: numbers 4 and 5 are of the branch that was left."""
    for number in (4, 5):
        os.utime(run / f'epoch_{number}.pth', ns=(10**17,) * 2)
    (run / 'last_checkpoint').write_text(str(run / 'epoch_3.pth'))
    assert newest(run).path == run / 'epoch_3.pth'
    halve(run / 'epoch_3.pth')
    assert newest(run).path == run / 'epoch_2.pth'


@pytest.mark.parametrize('kind', ['moved', 'copied', 'copied without times'])
def test_a_work_dir_in_another_place_has_its_own(run, tmp_path, kind):
    there = tmp_path / 'there'
    if kind == 'moved':
        shutil.move(run, there)
    else:
        shutil.copytree(run, there, copy_function=shutil.copy2 if kind == 'copied' else shutil.copyfile)
    assert newest(there).path == there / 'epoch_5.pth'
    halve(there / 'epoch_5.pth')
    assert newest(there).path == there / 'epoch_4.pth'


def test_iterations_of_ten_and_more_compare_as_numbers(tmp_path):
    for number in (900, 1000, 90):
        checkpoint(tmp_path / f'iter_{number}.pth', number)
    assert newest(tmp_path).path.name == 'iter_1000.pth'


def test_other_names_and_another_folder(run, tmp_path):
    out = tmp_path / 'out' / 'run'
    out.mkdir(parents=True)
    for number in (1, 2):
        checkpoint(out / f'state-{number}.pth', number)
    (run / 'last_checkpoint').write_text(str(out / 'state-2.pth'))
    halve(out / 'state-2.pth')
    found = newest(run, out, templates=('state-{}.pth', 'epoch_{}.pth'))
    assert found.path == out / 'state-1.pth'


@pytest.mark.parametrize('template', ['ckpt_{:04d}.pth', 'm{0}.pth', 'run_{}', 'a[{}].{{x}}.pth', 'my model {}.pth'])
def test_names_are_known_by_any_template_that_python_formats(template, tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=dict(filename_tmpl=template))))
    paths = [checkpoint(tmp_path / template.format(number), number) for number in (1, 2, 12)]
    checkpoint(tmp_path / f'best_score_{template.format(2)}', 2)
    (tmp_path / 'mine.pth').write_text('mine')
    folder = CheckpointFolder.of(cfg)
    assert len(folder.all()) == 4 and folder.newest().path == paths[2]
    halve(paths[2])
    assert folder.newest().path == paths[1]


def test_a_run_is_known_by_what_it_named_last_whatever_its_name(run):
    checkpoint(run / 'ckpt_0007.pth', 7)
    (run / 'last_checkpoint').write_text(str(run / 'ckpt_0007.pth'))
    assert run / 'ckpt_0007.pth' in CheckpointFolder(run, run).all()


@pytest.mark.parametrize('template', ['model_{epoch}.pth', 'a_{}_{}.pth', 'a_{', '{:q}'])
def test_a_template_that_cannot_be_formatted_is_an_error_before_training(template, tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=dict(filename_tmpl=template))))
    with pytest.raises(UserError, match=r'filename_tmpl=.* must have one \{\}'):
        CheckpointFolder.of(cfg)


def test_a_folder_for_checkpoints_that_is_the_work_dir_has_no_folder_of_its_name_in_it(tmp_path):
    for out, folder in ((str(tmp_path), tmp_path), (str(tmp_path / 'b'), tmp_path / 'b' / tmp_path.name)):
        cfg = Config(dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=dict(out_dir=out))))
        assert CheckpointFolder.of(cfg).folder == folder


def test_nothing_there_is_no_error_but_nothing_readable_is(run, tmp_path):
    assert newest(tmp_path / 'new').path is None and newest_checkpoint(str(tmp_path / 'new')) is None
    for path in run.glob('*.pth'):
        halve(path)
    with pytest.raises(UserError, match=r'--resume: .* no checkpoint that can be read') as error:
        newest(run)
    assert str(error.value).count('is not used') == 5 and '--overwrite' in str(error.value)
    for path in run.glob('*.pth'):
        path.unlink()
    with pytest.raises(UserError, match='which is not there'):
        newest(run)


def test_what_is_being_written_is_no_checkpoint(run):
    shutil.copy(run / 'epoch_5.pth', run / '.epoch_6.part-12-abcdef.pth')
    shutil.copy(run / 'epoch_5.pth', run / 'pretrained.pth')
    names = {path.name for path in CheckpointFolder(run, run).all()}
    assert names == {f'epoch_{i}.pth' for i in range(1, 6)} | {'best_bbox_mAP_epoch_4.pth'}
    assert newest(run).path == run / 'epoch_5.pth'


def test_the_stock_runner_asks_the_same_question(run, capsys):
    from mmengine.runner import runner

    halve(run / 'epoch_5.pth')
    assert runner.find_latest_checkpoint(str(run)) == str(run / 'epoch_4.pth')
    assert 'epoch_5.pth' in capsys.readouterr().out


@pytest.mark.parametrize('kind, end', [(EpochBasedTrainLoop, '_max_epochs'), (IterBasedTrainLoop, '_max_iters')])
def test_a_validation_is_due_where_the_loops_have_one(kind, end):
    loop = kind.__new__(kind)
    loop.val_begin, loop.dynamic_milestones, loop.dynamic_intervals = 2, [0, 7], [3, 2]
    setattr(loop, end, 11)
    assert [step for step in range(1, 12) if validates_after(loop, step)] == [3, 6, 8, 10, 11]
