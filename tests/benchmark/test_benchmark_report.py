"""The written result: json with every time, markdown tables, a picture; each with its command, machine and date."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from mmdet_norms.benchmark import report

MACHINE = dict(
    cpu='A processor', cores=2, threads=1, load=0.5, gpu=None, cuda=None, torch='2.0', python='3.11', system='Linux'
)


def row(name, ms, over='bn', **more):
    ratio = {} if over is None else dict(ratio=ms / 2, ratio_q1=ms / 2 - 0.1, ratio_q3=ms / 2 + 0.1)
    return dict(name=name, over=over, ms=ms, ms_q1=ms - 1, ms_q3=ms + 1, times_ms=[ms], **ratio, **more)


def make_result(**more):
    rows = [
        row('bn', 2.0, None, saved_bytes=1_000_000),
        row('bnet5', 6.0, saved_bytes=2_500_000, saved_ratio=2.5),
        row('bnet5 (reference)', 9.0),
        dict(name='an', over='bn', note='ValueError: a | b'),
    ]
    group = dict(level='layer', mode='forward', size=[2, 4, 5, 6], title='layer, forward, 2x4x5x6', rows=rows)
    return dict(
        command='python tools/benchmark.py --quick',
        date='2026-01-02T03:04:05+00:00',
        machine=MACHINE,
        settings={},
        groups=[dict(group, **more)],
    )


def test_every_file_records_command_machine_and_date(tmp_path):
    result = make_result()
    paths = report.write(result, tmp_path / 'new' / 'folder')
    assert [path.name for path in paths] == ['benchmark.json', 'benchmark.md', 'benchmark.png']
    assert json.loads(paths[0].read_text()) == result
    text = paths[1].read_text()
    for fact in (result['command'], '2026-01-02T03:04:05+00:00', 'A processor', '1 threads', 'torch 2.0'):
        assert fact in text
    with Image.open(paths[2]) as picture:
        assert picture.width > 300 and picture.text['Description'] == 'python tools/benchmark.py --quick'
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)


def test_the_markdown_table_has_a_dash_for_what_a_row_lacks():
    lines = [line for line in report.markdown(make_result()).splitlines() if line.startswith('|')]
    assert lines[0] == '|  | ms | ms spread | ratio | ratio spread | over | saved MB | saved ratio | note |'
    assert lines[2] == '| bn | 2.00 | 1.00-3.00 | - | - | - | 1.0 | - | - |'
    assert lines[3] == '| bnet5 | 6.00 | 5.00-7.00 | 3.00 | 2.90-3.10 | bn | 2.5 | 2.50 | - |'
    assert lines[5] == '| an | - | - | - | - | - | - | - | ValueError: a \\| b |'


def test_every_column_is_explained():
    words = report.LEGEND.replace('\n', ' ')
    unexplained = {name for name in report.COLUMNS if f'`{name}`' not in words}
    assert unexplained == {'images/s', 'parameters M', 'note'}  # these say it themselves


def test_a_terminal_of_100_columns_shows_every_number_whole():
    console = Console(file=io.StringIO(), width=100)
    report.print_group(make_result()['groups'][0], console)
    text = console.file.getvalue()
    assert '…' not in text and '2.90-3.10' in text and 'an: ValueError: a | b' in text
    assert 'over' not in text  # all over the same


def test_nothing_measured_is_still_a_report(tmp_path):
    failed = [dict(name='bn', over=None, note='RuntimeError: no')]
    for result in (make_result(rows=failed), dict(make_result(), groups=[])):
        paths = report.write(result, tmp_path)
        assert all(path.stat().st_size > 0 for path in paths)


def test_a_failure_leaves_the_old_files_whole(tmp_path, monkeypatch):
    report.write(make_result(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path, *_):
        path.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(report, 'draw', lambda result, path: fail(path))
    with pytest.raises(OSError):
        report.write(make_result(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
