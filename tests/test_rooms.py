"""The rooms of the package: imports run downwards only, so a line's place says what it may know."""

import ast
import re
import sys
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mmdet_norms

PACKAGE = Path(mmdet_norms.__file__).parent


def imported_rooms(path):
    """Rooms (folders and files right below the package) that a file imports anywhere in it, its own left out."""
    parts = ('mmdet_norms', *path.relative_to(PACKAGE).with_suffix('').parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split('.') for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(parts[: len(parts) - node.level]) if node.level else []
            names = [[*above, *(node.module or '').split('.'), alias.name] for alias in node.names]
            names = [[part for part in name if part] for name in names]
        rooms |= {name[1] for name in names if name[0] == 'mmdet_norms' and len(name) > 1}
    return rooms & {room(p) for p in PACKAGE.rglob('*.py')} - {room(path)}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def test_no_import_runs_upwards():
    needs = defaultdict(set)
    for path in PACKAGE.rglob('*.py'):
        if room(path) not in ('__init__', '__main__'):
            needs[room(path)] |= imported_rooms(path) - {'__init__'}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        raise AssertionError(f'rooms that import each other: {" -> ".join(reversed(error.args[1]))}') from None
    assert needs['kernels'] <= {'compat'} and needs['layers'] <= {'kernels', 'compat'} and not needs['reference']
    assert 'cli' not in set().union(*needs.values())


def test_references_need_nothing_but_torch():
    lines = '\n'.join(path.read_text() for path in (PACKAGE / 'reference').glob('[!_]*.py'))
    assert set(re.findall(r'(?m)^\s*(?:import|from) (\w+)', lines)) <= {'math', 'torch'}


def test_layers_and_kernels_need_nothing_but_torch():
    needed = {
        name
        for part in ('layers', 'kernels')
        for path in (PACKAGE / part).rglob('*.py')
        for name in re.findall(r'compat\.?(\w*) import', path.read_text())
    }
    assert needed <= {'torch_versions', 'torch_internals'}
    for name in needed | {'torch_internals'}:
        text = (PACKAGE / 'compat' / f'{name}.py').read_text()
        imported = {name.split('.')[0] for name in re.findall(r'(?m)^\s*(?:import|from) (\S+)', text)}
        assert imported - sys.stdlib_module_names == {'torch'}


def test_files_of_tests_have_names_of_their_own():
    names = Counter(path.name for path in Path(__file__).parent.rglob('test_*.py'))
    assert {name for name, count in names.items() if count > 1} == set()  # pytest would import the first for both
