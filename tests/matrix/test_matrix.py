"""Every norm in every situation; see ``cells.py``. ``docs/matrix.md`` shows the result."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cells

DOCUMENT = cells.ROOT / 'docs' / 'matrix.md'


@pytest.mark.parametrize('situation', cells.SITUATIONS)
@pytest.mark.parametrize('norm', cells.NORMS)
def test_cell(norm, situation):
    if cells.SITUATIONS[situation] is cells.onnx_runtime:
        for package in cells.ONNX_NEEDS:
            pytest.importorskip(package)
    cells.run_cell(norm, situation)


def test_exceptions_are_of_norms_and_situations_that_exist_and_have_one_way_to_be_tested():
    for (norm, situation), other in cells.EXCEPTIONS.items():
        assert norm in cells.NORMS and situation in cells.SITUATIONS and other.reason
        assert not (other.error and other.check)


def test_every_norm_of_the_package_is_in_the_matrix():
    from mmdet_norms.layers import NORMS

    made = {type(cells.build(norm).norm).__name__ for norm in cells.NORMS}
    assert set(NORMS) <= made | {norm.cfg['type'] for norm in cells.NORMS.values()}


def test_a_reference_to_a_test_that_is_gone_fails():
    with pytest.raises(AssertionError, match='there is no'):
        cells._test_exists('tests/layers/test_bnet.py::TestMaths::test_that_nobody_wrote')


def test_the_document_shows_these_norms_situations_and_exceptions():
    assert DOCUMENT.read_text(encoding='utf-8') == cells.render(), 'run: python tools/make_matrix.py'


def test_a_cell_that_fails_is_marked_and_makes_the_command_fail(monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location('make_matrix', cells.ROOT / 'tools' / 'make_matrix.py')
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)

    def fail(norm):
        raise AssertionError('as it should')

    monkeypatch.setattr(cells, 'NORMS', {'GN': cells.NORMS['GN']})
    monkeypatch.setattr(cells, 'SITUATIONS', {'good': lambda norm: None, 'bad': fail})
    document = tmp_path / 'matrix.md'
    assert command.main(['--out', str(document)]) == 1
    assert '| good | ✓ |\n| bad | ✗ |' in document.read_text(encoding='utf-8')
    assert 'GN, bad: AssertionError: as it should' in capsys.readouterr().err
    monkeypatch.setitem(cells.SITUATIONS, 'bad', lambda norm: None)
    assert command.main(['--out', str(document), '--check']) == 1
    assert command.main(['--out', str(document)]) == 0 == command.main(['--out', str(document), '--check'])
