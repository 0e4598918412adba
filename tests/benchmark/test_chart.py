"""The chart of what a training step costs, from what the benchmark has written; and how busy the machine was."""

import json
from pathlib import Path

import pytest

from mmdet_norms.benchmark import chart, report
from mmdet_norms.benchmark.groups import doubt
from mmdet_norms.cli import benchmark
from mmdet_norms.cores import Load

ROOT = Path(__file__).resolve().parents[2]


def group(level, rows, mode='forward+backward'):
    rows = [dict(name=name, over=None if ratio is None else 'bn', ms=1.0) | (dict(ratio=ratio) if ratio else {}) for
            name, ratio in rows.items()]  # fmt: skip
    return dict(level=level, mode=mode, title=f'{level}, {mode}', rows=rows)


LAYERS = group('layer', {'bn': None, 'bnet5': 1.3, 'bnet5 (reference)': 6.1, 'gn': 1.2, 'BNET(9)': 2.0,
                         'BNET(9) (reference)': 14.0})  # fmt: skip
CONVS = group('conv', {'bn': None, 'bnet5': 1.0, 'bnet5 (reference)': 1.4, 'cbn': 1.35, 'cbn (reference)': 2.0})
EVAL = group('layer', {'bn': None, 'mabn': 0.9, 'mabn (reference)': 1.0}, 'eval')


def test_bars_are_training_steps_that_have_both_formulations_a_layer_by_itself_first():
    expected = [('BNET-5', 6.1, 1.3), ('BNET(9)', 14.0, 2.0), ('CBN and its convolution', 2.0, 1.35)]
    assert chart.pairs(dict(groups=[CONVS, EVAL, LAYERS])) == expected


def test_it_is_drawn_from_files_without_measuring(tmp_path, capsys):
    for name, groups in (('one', [LAYERS, EVAL]), ('two', [CONVS])):
        (tmp_path / f'{name}.json').write_text(json.dumps(dict(groups=groups)))
    files = [str(tmp_path / 'one.json'), str(tmp_path / 'two.json')]
    for suffix in ('.svg', '.png'):
        out = tmp_path / f'cost{suffix}'
        benchmark.main(['--redraw', *files, '--chart', str(out)])
        assert str(out) in capsys.readouterr().out
    text = (tmp_path / 'cost.svg').read_text()
    for said in ('BNET-5', 'CBN and its convolution', '>6.10<', '>1.30<', 'published formulation', 'mmdet_norms'):
        assert said in text
    before = (tmp_path / 'cost.svg').read_bytes()
    benchmark.main(['--redraw', *files, '--chart', str(tmp_path / 'cost.svg')])
    assert (tmp_path / 'cost.svg').read_bytes() == before  # of the same numbers
    assert (tmp_path / 'cost.png').read_bytes().startswith(b'\x89PNG') and len(before) < 60_000


@pytest.mark.parametrize(
    'content, out, said',
    [
        ('{"groups": []}', 'cost.svg', 'no training step of a layer was measured beside its published formulation'),
        ('[]', 'cost.svg', 'this is no benchmark.json'),
        ('{"groups": [1]}', 'cost.svg', 'this is no benchmark.json'),
        ('{', 'cost.svg', 'this is no benchmark.json'),
        (None, 'cost.svg', 'No such file'),
        ('{"groups": []}', 'cost.pdf', 'write FILE.svg or FILE.png'),
        ('{"groups": []}', None, 'say with --chart FILE.svg where to draw it'),
    ],
)
def test_what_cannot_be_drawn_is_one_message(tmp_path, capsys, content, out, said):
    if content is not None:
        (tmp_path / 'a.json').write_text(content)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(
            ['--redraw', str(tmp_path / 'a.json'), *([] if out is None else ['--chart', str(tmp_path / out)])]
        )
    assert ended.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / 'cost.svg').exists()


@pytest.mark.parametrize(
    'threads, cores, others, said',
    [
        (2, 2, 0.0, None), (2, 2, 0.2, None), (1, 2, 1.0, None), (2, 2, None, None), (4, 16, 8.0, None),
        (2, 2, 1.0, 'of which others kept 1.0 busy; measure again when they are done, with --threads 1'),
        (1, 2, 1.9, '1 thread on 2 cores, of which others kept 1.9 busy; measure again when they are done'),
    ],
)  # fmt: skip
def test_ratios_are_doubtful_where_threads_and_others_are_more_than_the_cores(threads, cores, others, said):
    found = doubt(Load(float(cores), others), threads)
    assert found is None if said is None else found.endswith(said) and found.startswith('ratios are doubtful')


def test_how_busy_it_was_is_said_below_a_table_and_in_the_files():
    busy = dict(LAYERS, load=dict(cores=2.0, others=1.04, threads=2), doubt='ratios are doubtful: ...')
    lines = ['others kept 1.0 of 2 cores busy meanwhile', 'WARNING: ratios are doubtful: ...']
    assert report.busyness(busy) == lines and report.busyness(LAYERS) == []
    machine = dict(gpu=None, cuda=None, cpu='', cores=2, threads=2, torch='', python='', system='', load=0)
    text = report.markdown(dict(command='', date='', machine=machine, groups=[busy]))
    assert all(f'{line}.' in text for line in lines)


def test_a_program_that_has_loaded_torch_before_is_told(monkeypatch):
    monkeypatch.delenv('GOMP_SPINCOUNT', raising=False)
    monkeypatch.setattr(benchmark.torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(benchmark.compiled, 'why_not', lambda: 'not compiled')
    assert [line.split()[0] for line in benchmark._notes('cpu')] == ['not', 'GOMP_SPINCOUNT']
    assert not list(benchmark._notes('cuda'))
