"""The matrix as a whole; its rows are tests of their own. ``docs/matrix.md`` shows the result."""

import importlib.util

import pytest

from mmdet_norms.layers import NORMS as OURS

from . import rendering
from .exceptions import EXCEPTIONS
from .harness import ROOT, build
from .norms import NORMS
from .situation import SITUATIONS
from .test_references import require_test

DOCUMENT = ROOT / 'docs' / 'matrix.md'


def test_exceptions_are_of_norms_and_situations_that_exist_and_have_one_way_to_be_tested():
    for (norm, situation), other in EXCEPTIONS.items():
        assert norm in NORMS and situation in SITUATIONS and other.reason
        assert not (other.error and other.check)


def test_every_norm_of_the_package_is_in_the_matrix():
    made = {type(build(norm).norm).__name__ for norm in NORMS}
    assert set(OURS) <= made | {norm.cfg['type'] for norm in NORMS.values()}


def test_a_reference_to_a_test_that_is_gone_fails():
    with pytest.raises(AssertionError, match='there is no'):
        require_test('tests/layers/test_bnet.py::TestMaths::test_that_nobody_wrote')


def test_the_document_shows_these_norms_situations_and_exceptions():
    assert DOCUMENT.read_text(encoding='utf-8') == rendering.render(), 'run: python tools/make_matrix.py'


def test_a_cell_that_fails_is_marked_and_makes_the_command_fail(monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location('make_matrix', ROOT / 'tools' / 'make_matrix.py')
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)

    def fail(norm):
        raise AssertionError('as it should')

    group_norm = NORMS['GN']
    for table, content in ((NORMS, {'GN': group_norm}), (SITUATIONS, {'good': lambda norm: None, 'bad': fail})):
        for key in list(table):
            monkeypatch.delitem(table, key)
        for key, value in content.items():
            monkeypatch.setitem(table, key, value)
    document = tmp_path / 'matrix.md'
    assert command.main(['--out', str(document)]) == 1
    assert '| good | ✓ |\n| bad | ✗ |' in document.read_text(encoding='utf-8')
    assert 'GN, bad: AssertionError: as it should' in capsys.readouterr().err
    monkeypatch.setitem(SITUATIONS, 'bad', lambda norm: None)
    assert command.main(['--out', str(document), '--check']) == 1
    assert command.main(['--out', str(document)]) == 0 == command.main(['--out', str(document), '--check'])
