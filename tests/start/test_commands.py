"""The commands, however they are started."""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest

import mmdet_norms
from helpers import warm
from mmdet_norms.commands import runnable, several, typed
from mmdet_norms_start import commands

PACKAGE = commands._ROOT / 'mmdet_norms'
TOOLS = commands._ROOT / 'tools'
# Not written yet.
PENDING = {name for name in commands.COMMANDS if not (TOOLS / commands.COMMANDS[name].tool).exists()}
COMMANDS = [name for name in commands.COMMANDS if name not in PENDING]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setattr(commands, '_started_as', commands._started_as)
    monkeypatch.setattr('mmdet_norms_start.bare', False)


def start(*arguments, **environment):
    return subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(commands._ROOT), **environment},
    )


def test_names():
    assert typed('convert') == 'tools/convert_checkpoint.py' and runnable('train') == 'python tools/train.py'
    commands.started_as(commands.SCRIPT)
    assert typed('convert') == runnable('convert') == 'mmdet-norms convert'
    assert several('train', 'CONFIG').startswith(
        'torchrun --standalone --nproc-per-node GPUS -m mmdet_norms train CONFIG '
    )
    commands.started_as(commands.MODULE)
    assert typed('shapes') == runnable('shapes') == 'python -m mmdet_norms shapes'


@pytest.mark.parametrize('name', COMMANDS)
@pytest.mark.parametrize('how', [commands.SCRIPT, commands.MODULE, commands.TOOLS])
def test_help_names_what_was_typed(name, how, capsys):
    with pytest.raises(SystemExit) as end:
        if how == commands.TOOLS:
            commands.run(name, ['--help'])
        else:
            commands.main([name, '--help'], how)
    said = capsys.readouterr().out
    expected = f'tools/{commands.COMMANDS[name].tool}' if how == commands.TOOLS else f'{how} {name}'
    assert end.value.code == 0 and said.startswith(f'usage: {expected} ')
    assert how == commands.TOOLS or not re.search(r'tools/\w+\.(py|sh)', said)


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_has_its_tool_and_its_main(name):
    command = commands.COMMANDS[name]
    assert f'run({name!r})' in (TOOLS / command.tool).read_text(encoding='utf-8')
    assert callable(importlib.import_module(command.module).main)


def test_no_message_names_a_tool_by_itself():
    """Docstrings may: people read them in the sources, beside tools/."""
    found = []
    for path in PACKAGE.rglob('*.py'):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # of constants, too
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found += re.findall(r'.*tools/\w+\.\w+.*', node.value)
    assert found == []


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['trian'], 'there is no command trian; did you mean train?'),
        (['make_shapes.py'], 'did you mean shapes?'),
        (['predict'], 'did you mean infer?'),
        (['xyzzy'], 'there is no command xyzzy\n'),
        (['--amp'], 'there is no command --amp'),
    ],
)
def test_an_unknown_command_is_told_the_nearest(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and 'commands: train, test, ' in error


def test_help_and_version_do_not_wait_for_torch():
    code = 'import sys; from mmdet_norms_start.commands import main; main(sys.argv[1:]); print("torch" in sys.modules)'
    said = start('-c', code, '--version').stdout.split()
    assert said == ['mmdet_norms', mmdet_norms.__version__, 'False']
    said = start('-c', code, '--help').stdout
    assert said.startswith('usage: mmdet-norms COMMAND') and said.endswith('False\n')
    assert all(f'\n  {name} ' in said for name in commands.COMMANDS) and 'tools/' not in said


@pytest.mark.parametrize('arguments', [['--help'], ['doctor']])
def test_a_reader_that_leaves_ends_a_command_without_a_word(arguments):
    reads, writes = os.pipe()
    os.close(reads)
    no_probe = 'from mmdet_norms import check_env; check_env.probe = lambda names: {}'  # takes seconds
    made = warm.run(
        [
            sys.executable,
            '-W',
            'ignore',
            '-c',
            f'{no_probe}; from mmdet_norms_start.commands import main; main()',
            *arguments,
        ],
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(commands._ROOT)},
    )
    os.close(writes)
    assert (made.returncode, made.stderr) == (141, '')


def test_without_a_command_the_help_is_an_error():
    done = start('-c', 'from mmdet_norms_start.commands import main; main()')
    assert done.returncode == 1 and done.stderr.startswith('usage: mmdet-norms COMMAND')


# Ends the process when torch is about to be loaded, and says what it would read then.
TORCH = """
import os, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 'torch':
            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
    ('arguments', 'spins'),
    [
        *(([TOOLS / commands.COMMANDS[name].tool, '-h'], '10000') for name in COMMANDS if name != 'doctor'),
        (['-m', 'mmdet_norms', 'train', '-h'], '10000'),
        (['-m', 'mmdet_norms', 'benchmark', '-h'], '10000'),
        (['-m', 'mmdet_norms.cli.benchmark', '-h'], '10000'),
        (['-u', '-m', 'mmdet_norms', 'script.py'], '10000'),
        (['-c', 'from mmdet_norms_start.commands import main; main(["train"])'], '10000'),
        (['-c', 'import mmdet_norms'], 'None'),  # somebody's own program
    ],
)
def test_what_torch_reads_is_set_before_it_is_loaded(arguments, spins, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(TORCH)
    path = os.pathsep.join([str(tmp_path), str(commands._ROOT)])
    environment = {key: value for key, value in os.environ.items() if key != 'GOMP_SPINCOUNT'}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment, 'PYTHONPATH': path},
        cwd=tmp_path,
    )
    assert done.stdout.strip() == spins, done.stderr


def test_what_is_missing_is_one_message():
    code = "import sys; sys.modules['mmengine'] = None; from mmdet_norms_start.commands import main; main(['train'])"
    done = start('-c', code)
    assert done.returncode == 1 and done.stderr.startswith('error: mmdet_norms needs mmengine, mmcv and mmdet')
