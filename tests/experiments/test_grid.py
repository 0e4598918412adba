"""A grid of trainings: what is finished is kept, what fails is shown, and nobody works on a cell twice."""

import errno
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import warm
from helpers.grids import cells, grid_of
from mmdet_norms.engine.work_dir import claimed
from mmdet_norms.errors import UserError
from mmdet_norms.experiments import grid, run

# In place of `train`: says what it was asked, and does what its seed says.
TRAIN = """
import json, os, sys, time
from pathlib import Path
folder, seed = Path(sys.argv[sys.argv.index('--work-dir') + 1]), int(sys.argv[sys.argv.index('--seed') + 1])
with open(folder.parent / 'ran', 'a') as file:
    file.write(f'{folder.name} {"--resume" in sys.argv}\\n')
print('hello', seed)
if seed == 13:
    sys.exit('error: seed 13 is unlucky')
if seed == 9:
    os.kill(os.getpid(), 9)
if seed == 60:
    time.sleep(60)
if seed != 404:
    (folder / 'results.json').write_text(json.dumps({'accuracy/top1': seed / 10}))
(folder / 'finished.json').write_text('{}')
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return grid_of(tmp_path, monkeypatch, TRAIN)


def ran(folder):
    return [line.split()[0] for line in (folder / 'ran').read_text().splitlines()]


def test_finished_cells_are_kept_and_told_first(folder):
    run(cells(folder, 2), folder)
    told = []
    outcomes = run(cells(folder, 1, 2, 3), folder, jobs=2, on_end=told.append)
    assert [o.cell.name for o in outcomes] == ['seed1', 'seed2', 'seed3'] and told[0].cell.name == 'seed2'
    assert [o.result['accuracy/top1'] for o in outcomes] == [0.1, 0.2, 0.3]
    assert sorted(ran(folder)) == ['seed1', 'seed2', 'seed3']
    assert outcomes[1].seconds == 0 < outcomes[0].seconds
    assert 'True' in (folder / 'ran').read_text()  # each with --resume, in case that it had begun


def test_what_fails_is_shown_with_its_last_line_and_tried_again_and_the_others_go_on(folder):
    outcomes = run(cells(folder, 13, 9, 404, 1), folder)
    assert [o.error for o in outcomes] == ['error: seed 13 is unlucky', 'ended by SIGKILL', 'hello 404', None]
    assert [bool(o.result) for o in outcomes] == [False, False, False, True]
    assert 'hello 13' in (folder / 'seed13' / grid.LOG).read_text()
    run(cells(folder, 13, 1), folder)
    assert ran(folder).count('seed13') == 2 and ran(folder).count('seed1') == 1


def test_results_of_a_validation_on_the_way_finish_nothing(folder):
    (folder / 'seed1').mkdir(parents=True)
    (folder / 'seed1' / 'results.json').write_text('{"accuracy/top1": 0.7}')
    assert run(cells(folder, 1), folder)[0].result == {'accuracy/top1': 0.1}


@pytest.mark.parametrize('change', ['options', 'config'])
def test_results_of_another_training_are_not_taken(folder, change):
    run(cells(folder, 1), folder)
    if change == 'config':
        (folder.parent / 'config.py').write_text('lr = 2')
    changed = cells(folder, 1, 2, more=('--amp',) if change == 'options' else ())
    with pytest.raises(UserError, match=r'seed1 holds a training with .* choose another --out'):
        run(changed, folder)
    assert ran(folder) == ['seed1']  # said before anything starts


def test_data_that_were_replaced_are_not_mixed_with_the_earlier_ones(folder):
    run(cells(folder, 1), folder)  # as of a version that noted no data
    run(cells(folder, 1, 2, 13), folder, data=lambda cell: {'a.json': 'old'})
    for seeds in ((1, 2), (3,)):  # also where the earlier ones are not named
        with pytest.raises(UserError, match=r'seed2 was trained with another content of a.json than .* another --out'):
            run(cells(folder, *seeds), folder, data=lambda cell: {'a.json': 'new', 'b.json': 'x'})
    assert ran(folder) == ['seed1', 'seed2', 'seed13']
    run(cells(folder, 3), folder, data=lambda cell: {'b.json': 'new'})
    run(cells(folder, 13), folder / 'other', data=lambda cell: {'a.json': 'wrong'})
    run(cells(folder, 1), folder / 'other', data=lambda cell: {'a.json': 'mended'})  # what failed had learnt nothing


def test_other_lists_of_one_folder_are_no_other_data(folder):
    """As of a dataset class with options of its own, which the hash of what it reads depends on."""
    lists = {f'seed{s}': {'train': f'list {s}'} for s in (1, 2)}
    for _ in range(2):
        run(cells(folder, 1, 2), folder, data=lambda cell: lists[cell.name])
    with pytest.raises(UserError, match='seed1 was trained with another content of train'):
        run(cells(folder, 1, 2), folder, data=lambda cell: lists['seed2' if cell.name == 'seed1' else 'seed1'])


def test_data_under_other_names_are_other_data(folder):
    run(cells(folder, 1, 2), folder, data=lambda cell: {'a.json': 'old', 'b.json': 'x'})
    run(cells(folder, 1), folder, data=lambda cell: {'b.json': 'x'})  # a.json is not there now: nothing is mixed
    run(cells(folder, 1), folder)
    with pytest.raises(UserError, match=r'seed1 was trained with other data than c.json, which there is now: .* --out'):
        run(cells(folder, 1), folder, data=lambda cell: {'b.json': 'x', 'c.json': 'new'})
    run(cells(folder, 3), folder, data=lambda cell: {'c.json': 'new'})  # as of a --data-root of its own


def test_data_that_cannot_be_read_for_a_while_stay_noted(folder):
    run(cells(folder, 13), folder, data=lambda cell: {'a.json': 'wrong', 'b.json': 'x'})
    run(cells(folder, 13), folder, data=lambda cell: {'a.json': 'old'})  # had learnt nothing
    (folder / 'seed13' / 'epoch_1.pth').touch()
    run(cells(folder, 13), folder)
    with pytest.raises(UserError, match=r'seed13 was trained with another content of a.json than there is now: '):
        run(cells(folder, 13), folder, data=lambda cell: {'a.json': 'new'})


@contextmanager
def held(*claim):
    """By another process, until that is told to end."""
    fork = multiprocessing.get_context('fork')  # a process that imports all of the package takes seconds
    is_held, over = fork.Event(), fork.Event()

    def hold():
        with claimed(*claim):
            is_held.set()
            over.wait(60)

    other = fork.Process(target=hold)
    other.start()
    assert is_held.wait(60)
    yield over.set
    over.set()
    other.join()


def test_two_grids_do_not_work_in_one_folder(folder):
    with held(folder, '.grid'), pytest.raises(UserError, match=r'another run is at work there.* choose another --out'):
        run(cells(folder, 1), folder)


def test_a_cell_that_is_still_trained_is_waited_for_while_others_go_on(folder, capsys):
    """A grid that was killed leaves its trainings alive: they hold their work dirs as any training does."""
    with held(folder / 'seed1') as end:
        run(cells(folder, 1, 2), folder, on_end=lambda outcome: end())
    assert ran(folder) == ['seed2', 'seed1']
    assert capsys.readouterr().err.count('seed1: waiting for a process of an earlier command') == 1


def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_full_disk_fails_what_cannot_begin_and_ends_no_grid(folder, monkeypatch):
    write = grid.write_json
    monkeypatch.setattr(grid, 'write_json', lambda path, what: (full if 'seed3' in str(path) else write)(path, what))
    outcomes = run(cells(folder, 13, 3, 1), folder, on_end=full, on_start=full, on_look=full)
    assert [o.error and o.error[:22] for o in outcomes] == ['error: seed 13 is unlu', 'No space left on devic', None]
    assert ran(folder) == ['seed13', 'seed1']


def test_a_full_disk_keeps_no_grid_from_waiting(folder, monkeypatch):
    monkeypatch.setattr(grid, '_say_that_it_waits', full)
    with held(folder / 'seed1') as end:
        run(cells(folder, 1, 2), folder, on_end=lambda outcome: end())
    assert ran(folder) == ['seed2', 'seed1']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_grid_that_is_stopped_ends_its_trainings(folder, number):
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background ignores
from mmdet_norms.experiments import Cell, grid, run
grid.TRAIN = {grid.TRAIN!r}
run([Cell('seed60', {str(folder.parent / 'config.py')!r}, ('--seed', '60'))], {str(folder)!r})
"""
    with warm.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not (folder / 'ran').exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(15) not in (0, -signal.SIGKILL)
    alive = subprocess.run(['pgrep', '-f', str(folder / 'seed60')], capture_output=True, text=True).stdout
    assert alive == ''
    assert grid.finished(folder / 'seed60') is None
    with claimed(folder, '.grid'):  # free again
        assert json.loads((folder / 'seed60' / grid.CELL).read_text())['options'] == ['--seed', '60']


def test_processes_import_this_package_wherever_they_are_started(folder, monkeypatch, tmp_path):
    (tmp_path / 'train.py').write_text('import mmdet_norms_start\nraise SystemExit(mmdet_norms_start.__file__)')
    monkeypatch.chdir(tmp_path)
    said = run(cells(folder, 1), folder)[0].error
    assert Path(said).resolve() == Path(grid.__file__).resolve().parents[2] / 'mmdet_norms_start' / '__init__.py'
