"""What is compared: cells and their names, grid.json, the table, and how far a grid is."""

import io
import json
from types import SimpleNamespace

import pytest

from mmdet_norms.console import plain_console
from mmdet_norms.experiments import progress
from mmdet_norms.experiments.comparison import Comparison, Record, in_words, table
from mmdet_norms.experiments.grid import LOG, Cell, Outcome, last_line
from mmdet_norms.experiments.progress import GridProgress, eta_of

GRID = Comparison('c.py', ['bn', 'mabn'], [2, 8], [0, 1], {'a.lr': ['1', '2']}, 'iters', ['--epochs', '3'], ['b=1'])


def test_cells_are_commands_of_train_all_norms_first():
    cells = list(GRID.cells())
    assert len(cells) == len({cell.name for cell in cells}) == 16
    assert [cell.name for cell in cells[:3]] == ['bn-b2-lr=1-s0', 'mabn-b2-lr=1-s0', 'bn-b8-lr=1-s0']
    assert cells[0].options == (
        *('--norm', 'bn', '--batch-size', '2', '--budget', 'iters', '--seed', '0', '--epochs', '3'),
        *('--cfg-options', 'b=1', 'a.lr=1'),
    )
    assert cells[-1].labels == {'norm': 'mabn', 'batch_size': 8, 'seed': 1, 'a.lr': '2'}


def test_names_stay_and_tell_cells_apart():
    def names(grid):
        return [cell.name for cell in Comparison('c.py', ['bn'], [2], [0], grid).cells()]

    assert names({'a.lr': ['1', '2']})[0] == names({'a.lr': ['1']})[0]
    assert names({'a.lr': ['1'], 'b.lr': ['2']}) == ['bn-b2-a.lr=1-b.lr=2-s0']
    odd = names({'k': ['(1, 2)', '(1,2)', '[1,2]', 'x' * 300]})
    assert len(set(odd)) == 4 and all(len(name) < 120 and set('/()[], ').isdisjoint(name) for name in odd)


def outcome(cell, result=None, error=None, seconds=10.0):
    return Outcome(cell, result, error, seconds)


@pytest.mark.parametrize('cells', ['[3, "x", {"name": 1}]', '5', '{"a": 1}', '[]'])
def test_a_damaged_grid_json_is_written_anew(cells, tmp_path):
    (tmp_path / 'grid.json').write_text(f'{{"cells": {cells}}}')
    record = Record(tmp_path, dict(command='run'), Comparison('c.py', ['bn'], [4], [0]))
    record.write()
    assert [cell['name'] for cell in json.loads((tmp_path / 'grid.json').read_text())['cells']] == ['bn-b4-s0']


def test_grid_json_says_what_every_cell_is(tmp_path):
    comparison = Comparison('c.py', ['bn', 'gn'], [2], [0, 1])
    cells = list(comparison.cells())
    folder = tmp_path / cells[1].name
    folder.mkdir()
    (folder / 'results.json').write_text('{"x": 1}')
    (folder / 'finished.json').write_text('{}')
    record = Record(tmp_path, dict(command='run'), comparison)

    def written():
        return json.loads((tmp_path / 'grid.json').read_text())

    record.stopped()
    assert not (tmp_path / 'grid.json').exists()  # another command may have it
    record.started(cells[0])
    assert [cell['status'] for cell in written()['cells']] == ['running', 'finished', 'waiting', 'waiting']
    record.ended(outcome(cells[0], error='error: no'))
    record.started(cells[2])
    record.stopped()
    first, *_, last = written()['cells']
    assert first == dict(
        name='bn-b2-s0',
        labels=dict(norm='bn', batch_size=2, seed=0),
        status='failed',
        error='error: no',
        log='bn-b2-s0/output.txt',
    )
    assert [cell['status'] for cell in written()['cells']] == ['failed', 'finished', 'waiting', 'waiting']
    keys = {'command', 'commands', 'config', 'norms', 'batch_sizes', 'seeds', 'grid', 'budget', 'cells'}
    assert set(written()) == keys and written()['norms'] == ['bn', 'gn'] and last['name'] == 'gn-b2-s1'
    other = Record(tmp_path, dict(command='more'), Comparison('c.py', ['bn'], [4], [0]))
    other.write()
    assert [cell['name'] for cell in written()['cells']] == ['bn-b4-s0', *(cell.name for cell in cells)]


def test_grid_json_keeps_every_command_once(tmp_path):
    """The report of a folder that three commands trained showed the last one."""

    def write(command, date):
        Record(tmp_path, dict(command=command, date=date), Comparison('c.py', ['bn'], [4], [0])).write()
        return json.loads((tmp_path / 'grid.json').read_text())

    (tmp_path / 'grid.json').write_text('{"command": "run a", "date": "1"}')  # of an earlier version
    write('run b', '2')
    written = write('run a', '3')  # which goes on
    assert written['commands'] == [dict(command='run a', date='1'), dict(command='run b', date='2')]
    assert (written['command'], written['date']) == ('run a', '3')
    for damaged in ('{"commands": 5}', '{"commands": [1, {}, {"command": 2}]}'):
        (tmp_path / 'grid.json').write_text(damaged)
        assert write('run b', '4')['commands'] == [dict(command='run b', date='4')]


def shown(rich_table):
    console = plain_console(file=io.StringIO(), width=120)
    console.print(rich_table)
    return [[part.strip() for part in line.split('│')[1:-1]] for line in console.file.getvalue().splitlines()]


def test_the_table_has_the_mean_of_the_seeds_and_what_failed():
    cells = list(Comparison('c.py', ['bn', 'gn'], [2], [0, 1]).cells())
    results = [{'bbox_mAP': 0.2, 'bbox_mAP_50': 0.5}, None, {'bbox_mAP': 0.3, 'bbox_mAP_50': 0.5}, None]
    errors = [None, 'error: no', None, 'error: no']
    rows = [row for row in shown(table([*map(outcome, cells, results, errors)])) if row]
    assert rows == [['bn', '2', '2', '0.250 ± 0.071', '0.500 ± 0.000'], ['gn', '2', '0 of 2', '-', '-']]
    assert in_words(outcome(cells[0], results[0])) == 'bbox AP 0.200'
    assert in_words(outcome(cells[0], {'accuracy/top1': 0.5, 'iter': 3})) == 'top-1 0.500'
    assert in_words(outcome(cells[0], {'pascal_voc/mAP': 0.5})) == 'pascal_voc/mAP 0.500'
    assert in_words(outcome(cells[1], error='error: no')) == 'failed: error: no'


def test_the_error_that_says_why_is_shown(tmp_path):
    log = tmp_path / LOG
    log.write_text('ValueError: of an earlier try\n')
    begin = log.stat().st_size
    log.write_text(log.read_text() + 'Epoch(train) 1\n')
    assert last_line(log, begin) == 'Epoch(train) 1'
    with open(log, 'a') as file:
        file.write(
            '[rank1]: torch.OutOfMemoryError: CUDA out of memory\ntorch...ChildFailedError: \n=====\n  time : 1\n'
        )
    assert last_line(log, begin) == 'torch.OutOfMemoryError: CUDA out of memory'
    assert last_line(tmp_path / 'none') is None


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now.time)
    return now


@pytest.mark.parametrize('terminal', [False, True])
def test_progress_says_how_long_the_rest_takes(tmp_path, clock, terminal):
    cells = list(Comparison('c.py', ['bn', 'gn', '[b]'], [2, 8], [0]).cells())
    console = plain_console(file=io.StringIO(), width=200, force_terminal=terminal)
    with GridProgress(cells, tmp_path, 2, in_words, console) as shown:
        assert shown.left() is None
        shown.ended(outcome(cells[0], {'x': 0.5}, seconds=0))  # it was there
        shown.started(cells[1])
        clock.time = 100
        shown.ended(outcome(cells[1], {'x': 0.5}, seconds=100))
        assert shown.left() == (100 + 3 * 100) / 2  # nothing is known of the larger batch
        shown.started(cells[3])
        log = tmp_path / cells[3].name / LOG
        log.parent.mkdir()
        log.write_text('Epoch(train) [1][1/9]  eta: 1 day, 0:00:00\nEpoch(train) [1][2/9]  eta: 0:05:00  time: 1\n')
        clock.time = 200
        assert eta_of(log) == 300
        assert shown.left() == (100 + 300 + 400 + 400) / 2
        shown.look()
        shown.ended(outcome(cells[3], error='error: [b] no', seconds=120))
    said = console.file.getvalue()
    assert '2/6, 1 of them kept: ' in said and '(100 s); about 3 min left' in said
    assert 'failed: error: [b] no (120 s)' in said
    assert ('━' in said) == terminal and ('\x1b' in said) == terminal


def test_cells_without_a_batch_size_are_alike(tmp_path, clock):
    cells = [Cell('a', 'c.py'), Cell('b', 'c.py')]
    progress = GridProgress(cells, tmp_path, 1, in_words, plain_console(file=io.StringIO()))
    progress.started(cells[0])
    progress.ended(outcome(cells[0], {'x': 1.0}, seconds=60))
    assert progress.left() == 60
