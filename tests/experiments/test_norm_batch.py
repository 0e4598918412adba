"""Errors against normalization batch: cells, table, figure."""

import re

import pytest

from mmdet_norms.experiments import Outcome, norm_batch
from mmdet_norms.experiments.norm_batch import Errors, cells, draw, errors, markdown, order

CONFIGS = dict(BN='bn.py', MABN='mabn.py')
TOP1 = {('BN', 2): (0.5, 0.6), ('BN', 32): (0.8, None), ('MABN', 2): (0.8, 0.85), ('MABN', 32): (0.79, 0.9)}


@pytest.fixture
def table():
    outcomes = []
    for cell in cells(CONFIGS, (32, 2), (0, 1)):
        top1 = TOP1[cell.labels['norm'], cell.labels['batch']][cell.labels['seed']]
        result = None if top1 is None else {norm_batch.METRIC: top1}
        outcomes.append(Outcome(cell, result, None if result else 'error: no'))
    return errors(outcomes)


def test_a_cell_has_its_norm_batch_and_seed_in_what_it_is_trained_with():
    made = list(cells(CONFIGS, (2, 32), (0, 1), ['a.b=1']))
    assert len({cell.name for cell in made}) == len(made) == 8
    last = made[-1]
    assert (last.name, last.config) == ('mabn-32-seed1', 'mabn.py')
    assert last.options == ('--seed', '1', '--cfg-options', f'{norm_batch.KEY}=32', 'a.b=1')
    (cell,) = cells(dict(BN='bn.py'), (2,), (0,), data_root='mine')  # of other data, another training
    assert cell.options[2:4] == ('--data-root', 'mine')


def test_the_table_has_mean_and_spread_and_says_what_failed(table):
    text = markdown(table, 'python x.py', ['a machine'])
    assert text.startswith('    python x.py\n\n* a machine\n')
    rows = re.findall(r'^\| (.*) \|$', text, re.MULTILINE)
    assert rows[0] == 'images per group | BN | MABN'
    assert rows[2] == '2 | 45.0 (40.0-50.0) | 17.5 (15.0-20.0)'
    assert rows[3] == '32 | 20.0, 1 of 2 failed | 15.5 (10.0-21.0)'
    assert '* 2 images: MABN < BN\n* 32 images: MABN ~ BN\n' in text


def test_norms_are_told_apart_only_where_no_seeds_overlap():
    low, high = Errors('A', 2, {0: 1.0, 1: 3.0}, 2), Errors('B', 2, {0: 3.5, 1: 9.0}, 2)
    assert order([high, low]) == 'A < B'
    assert order([Errors('C', 2, {0: 2.9, 1: 9.9}, 2), low]) == 'A ~ C'
    assert order([low, Errors('D', 2, {}, 2)]) == 'A'


def test_one_seed_orders_nothing(table):
    text = markdown([Errors('BN', 2, {0: 50.0}, 1), Errors('MABN', 2, {0: 20.0}, 1)], 'x')
    assert '| 2 | 50.0 | 20.0 |' in text and '<' not in text and 'mean' not in text


def test_the_figure_is_text_and_lines_without_a_background_and_the_same_every_time(table, tmp_path):
    for name in ('a.svg', 'b.svg'):
        draw(table, tmp_path / name)
    svg = (tmp_path / 'a.svg').read_text()
    assert svg == (tmp_path / 'b.svg').read_text()
    assert all(f'>{word}<' in svg for word in ('BN', 'MABN', '2', '32', 'top-1 error, percent'))
    assert 'fill: #ffffff' not in svg and svg.count('LineCollection') >= 2  # bars of the spread
    draw([], tmp_path / 'nothing.svg')
    draw([Errors('BN', 2, {}, 1)], tmp_path / 'failed.svg')
