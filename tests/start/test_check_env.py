"""The doctor, in environments of stubs that are broken in every way that people have met."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mmdet_norms import check_env
from mmdet_norms.check_env import Facts, fits, matching_torchvision, problems
from mmdet_norms_start import requirements

ROOT = Path(__file__).resolve().parents[2]

TORCH = """
__version__ = '2.13.0'
class version: cuda = hip = None
class cuda:
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
class _Tensor: numpy = staticmethod(lambda: None)
class ops:
    class torchvision: nms = None
zeros = lambda *a: _Tensor
get_num_threads = lambda: 2
"""
MMDET = """
import mmcv
assert mmcv.__version__ < '2.2.0', f'MMCV=={mmcv.__version__} is used but incompatible. Please install mmcv<2.2.0.'
"""
VERSIONS = {
    'torch': '2.13.0',
    'numpy': '2.4.6',
    'matplotlib': '3.11.2',
    'pillow': '13.0.0',
    'pycocotools': '2.0.11',
    'rich': '15.0.0',
    'jinja2': '3.1.6',
    'scipy': '1.17.1',
    'opencv-python': '5.0.0.93',
    'setuptools': '81.0.0',
    'mmengine': '0.10.7',
    'mmcv-lite': '2.1.0',
    'mmdet': '3.3.0',
}
MODULES = {
    'torch': TORCH,
    'numpy': "__version__ = '2.4.6'",
    'matplotlib/pyplot': '',
    'PIL/Image': '',
    'pycocotools/mask': '',
    'rich/console': '',
    'jinja2': '',
    'scipy/stats': '',
    'cv2': '',
    'pkg_resources': '',
    'mmengine/config': 'class Config:\n    @staticmethod\n    def fromfile(path):\n        import pkg_resources',
    'mmcv/__init__': "__version__ = '2.1.0'",
    'mmdet': MMDET,
}


@pytest.fixture(scope='session')
def python(tmp_path_factory):
    """An environment without packages."""
    folder = tmp_path_factory.mktemp('python')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    return folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'


@pytest.fixture
def doctor(python, tmp_path):
    def ask(versions=(), modules=(), *options):
        """Status and words of the doctor where these stubs take the place of the usual ones, or None of them is."""
        for name, version in {**VERSIONS, **dict(versions)}.items():
            if version is not None:
                info = tmp_path / f'{name.replace("-", "_")}-{version}.dist-info'
                info.mkdir()
                (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        for name, code in {**MODULES, **dict(modules)}.items():
            if code is not None:
                path = tmp_path / f'{name}.py'
                path.parent.mkdir(exist_ok=True)
                path.write_text(code)
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(tmp_path)]), 'OMP_NUM_THREADS': '1'}
        command = [python, '-m', 'mmdet_norms.check_env', *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
        assert done.stderr == '' and 'Traceback' not in done.stdout
        return done.returncode, done.stdout

    return ask


def commands(said):
    return [line.strip() for line in said.splitlines() if line.startswith('    ')]


def test_with_nothing_installed_it_names_all(doctor):
    status, said = doctor(dict.fromkeys(VERSIONS), dict.fromkeys(MODULES))
    assert (
        status == 1
        and 'torch, numpy, matplotlib, pillow, pycocotools, rich, jinja2 and scipy are not inst' in said
        and 'OpenCV is not installed' in said
    )
    for extra in ('[lite]', '[mmcv]', '[onedl]'):
        assert extra in said
    assert any("'mmcv-lite>=2.0.0,<2.2.0'" in line and "'setuptools<82'" in line for line in commands(said))


@pytest.mark.parametrize(
    ('versions', 'modules', 'what', 'mend'),
    [
        pytest.param({'mmcv': '2.1.0'}, {}, 'mmcv-lite and mmcv are both', 'uninstall', id='both'),
        pytest.param({'mmcv': '2.1.0'}, {}, 'overwrites', "'mmcv-lite>=2.0.0,<2.2.0'", id='both, again'),
        pytest.param({'mmcv': '2.1.0'}, {'mmcv/_ext': 'get_compiling_cuda_version = lambda: 0'}, 'overwrites',
                     "--no-build-isolation 'mmcv>=2", id='both, with ops'),
        pytest.param(
            {'onedl-mmcv': '2.3.6', 'onedl-mmengine': '0.10.12', 'onedl-mmdetection': '3.5.1'}, {},
            'mmengine and onedl-mmengine are both', 'uninstall', id='forks over upstream',
        ),
        pytest.param(
            {'onedl-mmcv': '2.3.6', 'onedl-mmengine': '0.10.12', 'onedl-mmdetection': '3.5.1'},
            {'mmcv/__init__': "__version__ = '2.3.6'", 'mmdet': ''}, '[onedl] here', "'onedl-mmcv>=2.3.6,<3'",
            id='forks last',
        ),
        pytest.param(
            {'mmcv-lite': None, 'onedl-mmcv': '2.3.6'}, {}, 'of two sets', 'mmcv-lite>=2.0.0', id='a fork of three'
        ),
        pytest.param(
            {'mmcv-lite': '2.2.0'}, {'mmcv/__init__': "__version__ = '2.2.0'"}, 'mmdet 3.3.0 refuses', 'mmcv-lite>=2.0',
            id='mmcv 2.2',
        ),
        pytest.param(
            {'mmcv-lite': None, 'mmcv': '2.2.0'}, {'mmcv/__init__': "__version__ = '2.2.0'"}, 'mmcv is 2.2.0',
            '--no-build-isolation', id='compiled mmcv 2.2',
        ),
        pytest.param({'mmcv-lite': None}, {'mmcv/__init__': None}, 'mmcv-lite is not inst', 'mmcv-lite', id='no mmcv'),
        pytest.param({'mmdet': None}, {'mmdet': None}, 'mmdet is not installed', "'mmdet>=3.2,<4'", id='no mmdet'),
        pytest.param(
            {'setuptools': '82.0.1'}, {'pkg_resources': None}, 'setuptools 82', "'setuptools<82'", id='setuptools 82'
        ),
        pytest.param({'setuptools': None}, {'pkg_resources': None}, 'pkg_resources', 'setuptools<82', id='none'),
        pytest.param(
            {}, {'cv2': 'raise ImportError("libGL.so.1: cannot open shared object file")'}, 'headless',
            'opencv-python-headless', id='no libGL',
        ),
        pytest.param(
            {}, {'torch': 'raise OSError("libcudart.so.13: cannot open")'}, 'libcudart', 'torch==2.13.0', id='torch'
        ),
        pytest.param(
            {}, {'torch': 'import os; os.kill(os.getpid(), 11)'}, 'killed by signal 11', '--force-reinstall', id='crash'
        ),
        pytest.param({}, {'torch': 'import os; os._exit(3)'}, 'ended with status 3', 'torch==2.13.0', id='exit'),
        pytest.param(
            {}, {'torch': TORCH.replace('lambda: None', 'lambda: 1 / 0')}, 'numpy 2.4.6 is installed and cannot',
            'numpy', id='numpy',
        ),
        pytest.param(
            {'mmcv-lite': None, 'mmcv': '2.1.0'}, {'mmcv/_ext': 'raise ImportError("undefined symbol: _ZN3c10")'},
            'undefined symbol', 'mmcv==2.1.0', id='ops of another torch',
        ),
        pytest.param({'torch': '1.13.1'}, {}, 'torch is 1.13.1', '--upgrade', id='old torch'),
        pytest.param({'pycocotools': None}, {}, 'pycocotools is not installed', 'pycocotools', id='no pycocotools'),
    ],
)  # fmt: skip
def test_what_is_broken_is_named_with_the_command_that_mends_it(doctor, versions, modules, what, mend):
    status, said = doctor(versions, modules)
    assert status == 1 and what in ' '.join(said.split())
    assert any(mend in line for line in commands(said)), said


def test_mmcv_without_its_ops_works_and_could_be_better(doctor):
    said = doctor({'mmcv-lite': None, 'mmcv': '2.1.0'}, {}, '--json')[1]
    found = json.loads(said)['problems']
    (ours,) = [problem for problem in found if 'without its compiled ops' in problem['what']]
    assert not ours['fatal'] and 'mmcv-lite' in ours['mend'][1] and 'MMCV_WITH_OPS=1' in ours['what']
    assert json.loads(said)['packages']['mmcv'] == '2.1.0'


def test_what_others_print_at_the_start_is_passed_over(doctor):
    says = "print('hello'); print('[\"a\", null]'); print(5)\n"
    status, said = doctor((), {'sitecustomize': says, 'rich/console': r"import os; os.write(2, b'\xff'); os._exit(3)"})
    assert status == 1 and 'status 3' in said and '1 thing to mend' in said


def test_what_a_stopped_pip_left_is_not_installed(doctor, tmp_path):
    for name, content in {
        '~orch-1.0': 'Name: torch\nVersion: 1.0\n',
        'Torch_x': 'Name: torch\n',
        'none': None,
    }.items():
        (tmp_path / f'{name}.dist-info').mkdir()
        if content is not None:
            (tmp_path / f'{name}.dist-info' / 'METADATA').write_text(content)
    said = doctor()[1]
    assert re.search(r'^torch +2\.13\.0', said, re.M) and 'torch is' not in said, said


def test_a_process_that_hangs_is_given_up(monkeypatch, tmp_path):
    (tmp_path / 'cv2.py').write_text('import time; time.sleep(60)')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr(check_env, '_SECONDS', 3)
    found = check_env.probe(['cv2', 'rich'])
    assert 'more than 3 s' in found['cv2']['error'] and 'error' not in found['rich']


def healthy(**changes):
    probes = {'torch': dict(build='CUDA 13.0', gpus=['H100'], why_no_gpu='', threads=2), 'mmcv ops': dict(there=False)}
    return Facts(**{'packages': VERSIONS, 'probes': probes, 'executable': '/my env/bin/python', **changes})


def test_gpus_that_torch_cannot_use():
    cpu = dict(build='CPU', gpus=[], why_no_gpu='', threads=2)
    (found,) = problems(healthy(probes={'torch': cpu}, has_nvidia=True, packages={**VERSIONS, 'torch': '2.13.0+cpu'}))
    assert not found.fatal and 'a build for CPUs' in found.what and found.mend[1].endswith('install torch==2.13.0')
    old = dict(build='CUDA 13.0', gpus=[], why_no_gpu='The NVIDIA driver on your system is too old', threads=2)
    (found,) = problems(healthy(probes={'torch': old}, has_nvidia=True))
    assert not found.fatal and 'driver on your system is too old' in found.what
    assert problems(healthy(has_nvidia=True)) == [] == problems(healthy(probes={'torch': cpu}))


def test_a_torchvision_for_another_torch():
    probes = {**healthy().probes, 'torchvision': dict(error='RuntimeError: operator torchvision::nms does not exist')}
    (found,) = problems(healthy(probes=probes, packages={**VERSIONS, 'torchvision': '0.20.0'}))
    assert not found.fatal and found.mend == ["'/my env/bin/python' -m pip install torchvision==0.28.0 torch==2.13.0"]
    assert matching_torchvision('2.1.2+cu118') == '0.16.2'


def test_an_old_python_is_all_that_is_said():
    (found,) = problems(healthy(python='3.9.18', packages={}, probes={}))
    assert found.fatal and '3.9.18' in found.what


def test_without_pip_the_commands_are_those_of_uv():
    packages = {key: value for key, value in VERSIONS.items() if key != 'rich'}
    (found,) = problems(healthy(packages=packages, has_pip=False))
    assert found.mend == ["uv pip install --python '/my env/bin/python' rich"]


def test_what_some_configs_need_may_be_missing_but_not_broken():
    assert not problems(healthy())
    (found,) = problems(healthy(packages={**VERSIONS, 'pytorch-optimizer': '3.1.0'}))
    assert not found.fatal and '3.1.0' in found.what and "'pytorch-optimizer>=4.1'" in found.mend[0]
    probes = {**healthy().probes, 'pytorch-optimizer': dict(error='ImportError: no')}
    (found,) = problems(healthy(packages={**VERSIONS, 'pytorch-optimizer': '4.1.0'}, probes=probes))
    assert not found.fatal and 'ImportError: no' in found.what and '--force-reinstall' in found.mend[0]


def test_our_own_import_is_the_last_to_be_blamed():
    probes = {**healthy().probes, 'mmdet_norms': dict(error='TypeError: no', kind='TypeError', missing='')}
    (found,) = problems(healthy(probes=probes))
    assert 'please report' in found.what
    probes['mmdet_norms'] = dict(error="UserError: MMDET_NORMS_OPS='x': there are mmcv", kind='UserError', missing='')
    (found,) = problems(healthy(probes=probes))
    assert found.mend == ['unset MMDET_NORMS_OPS'] and found.what.startswith('MMDET_NORMS_OPS=')
    probes['torch'] = dict(error='OSError: no')
    (found,) = problems(healthy(probes=probes))
    assert 'torch' in found.what and 'MMDET_NORMS_OPS' not in found.what


def test_versions():
    assert fits('2.13.0+cpu', '>=2.1') and fits('2.1.0rc1', '>=2.0.0,<2.2.0') and fits('4', '')
    assert not fits('2.2.0', '>=2.0.0,<2.2.0') and not fits('82.0', '<82') and fits('81.9', '<82')
    for name, stack in requirements.STACKS.items():
        packages = {**VERSIONS, 'mmengine': None, 'mmcv-lite': None, 'mmdet': None}
        packages |= {dist: versions.split(',')[0][2:] for dist, versions in stack.values()}
        facts = healthy(packages={key: value for key, value in packages.items() if value})
        assert facts.stack() == name and not [problem for problem in problems(facts) if problem.fatal]


@pytest.mark.parametrize('command', ['tools/doctor.py', '-m mmdet_norms doctor'])
def test_every_way_to_call_it_needs_nothing(doctor, python, command):
    doctor()
    done = subprocess.run([python, *command.split(), '--help'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('usage: ') and done.stderr == ''


def test_this_environment_is_examined():
    """Where the tests run, all is well."""
    command = [sys.executable, 'tools/doctor.py', '--json']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert done.returncode == 0 == len([problem for problem in said['problems'] if problem['fatal']]), done.stdout
    assert said['probes']['mmdet_norms']['ops']['cpu'] in ('mmcv', 'torch') and said['packages']['torch']
    assert sysconfig.get_python_version() in said['python']
