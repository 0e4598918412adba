"""The documentation: what tools/check_docs.py finds without running a command, and that it would find it."""

import importlib.util
import re
import sys
import time
from pathlib import Path

import pytest
import yaml

import mmdet_norms

ROOT = Path(__file__).resolve().parents[1]


def _tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_docs, chart = _tool('check_docs'), _tool('make_cost_chart')


@pytest.mark.slow
def test_links_files_options_and_marks_of_every_page(capsys):
    status = check_docs.main(['--quick'])
    assert status == 0, capsys.readouterr().out


def problems(text, others=()):
    """What is said of a page, beside an index and a README that name it."""
    names = {'docs/index.md': '[it](page.md) [front](../README.md)', 'README.md': '[all](docs/index.md)'}
    pages = [check_docs.read_page(name, own) for name, own in (names | dict(others)).items()]
    page = check_docs.read_page('docs/page.md', text)
    return list(check_docs.static_problems(ROOT, [*pages, page]))


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('[x](nowhere.md)', 'nowhere.md, which does not exist'),
        ('[x](../README.md#no-such-heading)', 'README.md has no such heading'),
        ('[x](../../outside.md)', 'does not exist'),
        ('    python tools/train.py CONFIG --no-such', 'unrecognized arguments: --no-such'),
        ('```bash\npython tools/test.py CONFIG\n```', 'required: checkpoint'),
        ('    python tools/train.py configs/bnet/no_such.py', 'configs/bnet/no_such.py does not exist'),
        ('    tools/dist_train.sh configs/bnet/no_such.py 8', 'configs/bnet/no_such.py does not exist'),
        ('    python tools/train.py mmdet::retinanet/no_such.py', 'no_such.py'),
        ('    python tools/train.py CONFIG --norm bnt5', "norm 'bnt5' is unknown"),
        ('    python tools/train.py CONFIG --cfg-options model.bakbone.depth=5', 'bakbone'),
        ('    mmdet-norms trian CONFIG', 'no command trian'),
        ('    torchrun --nproc-per-node 2 -m mmdet_norms test CONFIG', 'required: checkpoint'),
        ('    make everything', 'the Makefile has no everything'),
        ('    pytest tests/layers/test_no_such.py', 'test_no_such.py does not exist'),
        ('<!-- needs: coco -->\n\n    python tools/train.py CONFIG --no-such', '--no-such'),
        ('    pip install mmdet', 'needs: network'),
        ('<!-- needs: luck -->\n\n    make bench', 'needs: luck?'),
        ('```python\nprint(nobody_says_what)\n```', 'where do nobody_says_what come from?'),
        ('```python\nx = (\n```', 'was never closed'),
        ('    y = K x + b,  with K of k x k', 'neither begins with a command nor is Python'),
        ('```perl\nx\n```', "a fence of 'perl'"),
        ('Ask `tools/train.py --no-such`.', 'tools/train.py has no option --no-such'),
        ('It is in `docs/no_such.md`.', 'docs/no_such.md does not exist'),
    ],
)
def test_what_is_wrong_is_found(text, said):
    found = problems(text)
    assert len(found) == 1
    assert said in found[0] and found[0].startswith('docs/page.md:')


@pytest.mark.parametrize(
    'text',
    [
        '# A `b`, c: d\n\n[x](#a-b-c-d) [y](../README.md) [z](https://example.org/nowhere)',
        '# A\n\n# A\n\n[x](#a-1)',
        '    python tools/check.py CONFIG [CHECKPOINT] [--data-root DIR] [--full]   # comment',
        '    python tools/train.py CONFIG \\\n        --norm bnet5 --work-dir work_dirs/other',
        '<!-- needs: network -->\n\n    pip install mmdet',
        '```python\nfrom mmdet_norms import fuse\nmodel = fuse(model)\nprint([m for m in model.modules()])\n```',
        '    model = dict(backbone=dict(type="NormResNet"))',
        '```text\nanything at all\n```',
        '- in a list\n\n  <!-- needs: coco -->\n\n      python tools/train.py CONFIG',
    ],
)
def test_what_is_right_passes(text):
    assert problems(text) == []


def test_pages_that_the_index_does_not_name():
    assert problems('', {'docs/other.md': ''}) == ['docs/index.md: does not name docs/other.md']
    assert problems('', {'README.md': ''}) == ['README.md: no link to docs/index.md']


def test_synopses_are_tried_without_and_with_their_options():
    assert check_docs.variants('a [B] --x c|d [--y Z]') == ['a  --x c ', 'a B --x c --y Z']
    assert check_docs.variants("pip install '.[lite]'") == ["pip install '.[lite]'"]
    demo = check_docs.PLACEHOLDERS['CONFIG']
    assert check_docs.variants('x CONFIG MY_CONFIG CONFIG=1') == [f'x {demo} MY_CONFIG CONFIG=1']


def block(kind, text):
    return check_docs.Block('docs/page.md', 1, kind, text)


def test_blocks_run_and_fail_and_are_stopped(tmp_path, monkeypatch):
    assert check_docs.run_block(block('shell', 'echo here\npwd'), tmp_path)[:2] == (0, f'here\n{tmp_path}\n')
    rc, output, _ = check_docs.run_block(block('shell', 'false\necho not reached'), tmp_path)
    assert rc == 1 and 'not reached' not in output
    assert check_docs.run_block(block('shell', 'pip install x'), tmp_path)[0] == 97  # whose environment would it be?
    assert check_docs.run_block(block('shell', 'make test'), tmp_path)[0] == 97
    assert check_docs.run_block(block('python', 'raise SystemExit(3)'), tmp_path)[0] == 3
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(check_docs, 'LIMIT', 0.5)
    start = time.monotonic()
    rc, output, _ = check_docs.run_block(block('shell', 'sleep 60 | cat'), tmp_path)
    assert rc == 124 and 'stopped' in output and time.monotonic() - start < 30


def test_published_numbers_of_the_front_page():
    rows = {}
    for name in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        for model in yaml.safe_load((ROOT / name).read_text())['Models']:
            metrics = [result['Metrics'] for result in model.get('Results', [])]  # of pretraining there may be none
            rows[model.get('Published', {}).get('Row')] = next((m['box AP'] for m in metrics if 'box AP' in m), None)
    compared = {
        'bnet3': ('faster-r50-bnet3-1x', 'faster-r50-bn-1x'),
        'bnet5': ('faster-r50-bnet5-1x', 'faster-r50-bn-1x'),
        'bnet7': ('faster-r50-bnet7-1x', 'faster-r50-bn-1x'),
        'cbn': ('mask-r50-cbn-1x', 'mask-r50-none-1x'),
        'gn': ('mask-r50-gn-1x', 'mask-r50-none-1x'),
        'syncbn': ('mask-r50-syncbn-1x', 'mask-r50-none-1x'),
        'mabn': ('mask-r50-mabn-2x-scratch', 'mask-r50-bn-2x-scratch'),
        'brn': ('mask-r50-brn-2x-scratch', 'mask-r50-bn-2x-scratch'),
        'an': ('mask-r50-an', 'mask-r50-bn'),
        'an-gn-head': ('mask-r50-an-angn', 'mask-r50-bn'),
    }
    table = re.findall(r'^\| (`[a-z].*) \|$', (ROOT / 'README.md').read_text(), re.MULTILINE)
    assert {name for row in table for name in re.findall(r'`([\w-]+)`', row.split('|')[0])} == {*mmdet_norms.PLACEMENTS}
    for row in table:
        cells = [cell.strip() for cell in row.split('|')]
        names = [name for name in re.findall(r'`([\w-]+)`', cells[0]) if name in compared]
        expected = [compared[name] for name in names]
        values = ', '.join(f'{rows[own]:.1f}' for own, _ in expected)
        gains = ', '.join(f'+{rows[own] - rows[base]:.1f}' for own, base in expected)
        cited = f'{values} over {rows[expected[0][1]]:.1f} ({gains})' if names else ''
        assert cells[3].split(' <sup>')[0] == cited, cells[0]


def test_every_room_of_the_package_is_named():
    named = set(re.findall(r'[\w-]+(?=/`|\.py`)', (ROOT / 'CONTRIBUTING.md').read_text()))
    rooms = {path.stem for path in (ROOT / 'mmdet_norms').iterdir() if path.suffix == '.py' or any(path.glob('*.py'))}
    assert {room for room in rooms - named if not room.startswith('__')} == set()


def test_chart_of_the_front_page_is_the_table_it_is_drawn_from(tmp_path):
    bars = chart.chart.pairs(chart.read((ROOT / 'docs' / 'performance.md').read_text()))
    assert len(bars) == 7
    chart.main(['--out', str(tmp_path / 'cost.svg')])
    for file in (ROOT / 'docs' / 'cost.svg', tmp_path / 'cost.svg'):
        shown = re.findall(r'>([^<>]+)</text>', file.read_text())
        assert {label for label, _, _ in bars} < {*shown}
        numbers = [f'{ratio:.2f}' for _, *ratios in bars for ratio in ratios]
        assert [text for text in shown if re.fullmatch(r'\d+\.\d+', text)] == numbers


def test_versions_that_stand_in_two_files():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == mmdet_norms.__version__
    assert mmdet_norms.__version__ in (ROOT / 'CHANGELOG.md').read_text()
    hooks = {
        repo['repo']: repo['rev'] for repo in yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    }
    ruff = re.search(r'^ruff==(\S+)', (ROOT / 'requirements' / 'constraints.txt').read_text(), re.MULTILINE)
    assert hooks['https://github.com/astral-sh/ruff-pre-commit'] == f'v{ruff[1]}'
