"""An import that fails for what is installed beside the package says in one message what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet_norms_start import doctor_is_asked_for, requirements

ROOT = Path(__file__).resolve().parents[2]


# Each in a process forked from one that has imported torch and nothing that needs it.
BEGINNINGS = {
    'mmengine': "sys.modules['mmengine'] = None; import mmdet_norms",
    'mmcv': "sys.modules['mmcv'] = None; import mmdet_norms",
    'mmdet': "sys.modules['mmdet'] = None; from mmdet_norms import apply_norm",
    'pycocotools': "sys.modules['pycocotools'] = None; import mmdet_norms",
    'old mmcv': "import mmcv; mmcv.__version__ = '2.2.0'; import mmdet_norms",
}
FORK = """
import json, os, sys
import torch
for name, code in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 2)
        exec(code)
        sys.exit()
    open(name + '.status', 'w').write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


@pytest.fixture(scope='module')
def last_lines(tmp_path_factory):
    """What Python writes to stderr when each of them ends with status 1."""
    folder = tmp_path_factory.mktemp('imports')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    subprocess.run([sys.executable, '-c', FORK, json.dumps(BEGINNINGS)], cwd=folder, env=env, check=True)
    assert [(folder / f'{name}.status').read_text() for name in BEGINNINGS] == ['1'] * len(BEGINNINGS)
    return {name: (folder / name).read_text() for name in BEGINNINGS}


@pytest.mark.parametrize('missing', ['mmengine', 'mmcv', 'mmdet'])
def test_without_a_stack_the_import_names_the_three(missing, last_lines):
    said = last_lines[missing]
    said = said[said.rindex('ImportError') :]
    assert f'there is no {missing}' in said
    for extra in ('lite', 'mmcv', 'onedl'):
        assert f"pip install 'mmdet_norms[{extra}]'" in said
    assert 'python -m mmdet_norms.check_env' in said


def test_another_package_that_is_missing_is_named(last_lines):
    said = last_lines['pycocotools']
    assert 'mmdet_norms needs pycocotools, which is missing' in said and 'check_env' in said


def test_mmdet_that_refuses_mmcv_is_not_a_bare_assertion(last_lines):
    said = last_lines['old mmcv']
    assert 'ImportError: what mmdet_norms needs cannot be imported: MMCV==2.2.0 is used but incompatible' in said
    assert 'check_env' in said


def test_what_our_own_modules_lack_keeps_its_traceback():
    assert requirements.why_no_import(ModuleNotFoundError('no', name='mmdet_norms.layers.nothing')) is None


@pytest.mark.parametrize(
    ('line', 'asked'),
    [
        ('python -m mmdet_norms.check_env --json', True),
        ('python -X dev -W error -u -m mmdet_norms.check_env', True),
        ('python -m mmdet_norms tools/test.py', False),
        ('python tools/train.py -m mmdet_norms.check_env', False),
        ('python -c pass -m mmdet_norms.check_env', False),
        ('python', False),
    ],
)
def test_who_asks_for_the_doctor(line, asked):
    assert doctor_is_asked_for(line.split()) is asked
