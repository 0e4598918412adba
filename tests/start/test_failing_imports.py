"""An import that fails for what is installed beside the package says in one message what to do."""

import subprocess
import sys

import pytest

from mmdet_norms_start import doctor_is_asked_for, requirements


def last_line(code):
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize('missing', ['mmengine', 'mmcv', 'mmdet'])
def test_without_a_stack_the_import_names_the_three(missing):
    asked = 'from mmdet_norms import apply_norm' if missing == 'mmdet' else 'import mmdet_norms'
    said = last_line(f"import sys; sys.modules['{missing}'] = None; {asked}")
    said = said[said.rindex('ImportError') :]
    assert f'there is no {missing}' in said
    for extra in ('lite', 'mmcv', 'onedl'):
        assert f"pip install 'mmdet_norms[{extra}]'" in said
    assert 'python -m mmdet_norms.check_env' in said


def test_another_package_that_is_missing_is_named():
    said = last_line("import sys; sys.modules['pycocotools'] = None; import mmdet_norms")
    assert 'mmdet_norms needs pycocotools, which is missing' in said and 'check_env' in said


def test_mmdet_that_refuses_mmcv_is_not_a_bare_assertion():
    said = last_line("import mmcv; mmcv.__version__ = '2.2.0'; import mmdet_norms")
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
