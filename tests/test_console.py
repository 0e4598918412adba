"""What a user named is shown as text, whatever rich, matplotlib or a terminal would make of it."""

import re
from pathlib import Path

import pytest

from mmdet_norms.benchmark.report import draw
from mmdet_norms.cli import compare
from mmdet_norms.console import as_text
from mmdet_norms.engine.results import results_table, write_json

NAMES = [
    'car [side]',
    '[/b] box',
    '[bold]',
    ':car:',
    '[link=x]y[/link]',
    'a\\[b]',
    '$x_{',
    '中文',
    "it's",
    '50%',
    '{0}',
]


@pytest.mark.parametrize('name', NAMES)
def test_tables_show_names_of_classes_and_runs_as_they_are(name, tmp_path, capsys):
    text = results_table({'bbox_mAP': 0.5, f'bbox_{name}_precision': 0.25}, title=f'{name} (test)')
    assert text.count(name) == 2
    write_json(tmp_path / name / 'results.json', {'bbox_mAP': 0.5, f'{name}/accuracy': 1.0})
    compare.main([str(tmp_path / name)])
    shown = capsys.readouterr().out
    assert shown.count(f'/{name} ') == 2 and f'{name}/accuracy' in shown


def test_a_name_with_control_characters_stays_one_line():
    assert as_text('a\nb\x1b[31m') == r'a\nb\x1b[31m'
    assert as_text(3) == '3'


def test_the_chart_of_a_benchmark_takes_a_dollar_for_a_dollar(tmp_path):
    row = dict(name='$x_{', over=None, ms=1.0)
    machine = dict(cpu='', gpu='', cores=1, threads=1, torch='', python='', system='', load='')
    result = dict(command='$x_{', date='', machine=machine, groups=[dict(title='$x_{', rows=[row])])
    draw(result, tmp_path / 'chart.png')
    assert (tmp_path / 'chart.png').stat().st_size > 0


def test_nothing_else_makes_a_console_or_a_column_of_text():
    package = Path(compare.__file__).parents[1]
    own = re.compile(r'(?<!plain_)(?:\bConsole\(|\bTextColumn\(|\brich\.print|from rich import print)')
    found = [str(path) for path in package.rglob('*.py') if path.name != 'console.py' and own.search(path.read_text())]
    assert found == []
