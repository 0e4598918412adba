"""sdist and wheel: built, looked into, installed beside the packages of this environment, used outside the clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import mmdet_norms

ROOT = Path(mmdet_norms.__file__).resolve().parents[1]
DEMO = 'mmdet_norms::demo/mask-rcnn_r50_fpn_bnet5_shapes.py'
BUILD = 'import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))'
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
# Imports the package once. For each list of arguments on its stdin: runs the command in a process forked from it, and
# answers with how that ended and what it said.
COMMANDS = """
import contextlib, json, os, sys, tempfile
{before}
import mmdet_norms
from mmdet_norms_start import commands
print(json.dumps(mmdet_norms.__file__), flush=True)
for line in sys.stdin:
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            commands.main(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        print(json.dumps([status, said.read().decode()]), flush=True)
"""
BEFORE = """
from mmengine.config import Config
from mmengine.hub import get_config
Config.fromfile('mine.py', import_custom_modules=False)
first = 'mmdet_norms' in sys.modules
print(json.dumps([first, get_config('mmdet_norms::bnet/faster-rcnn_r50_fpn_bnet5_1x_coco.py').filename]), flush=True)
"""
QUICK = [
    'train_cfg.max_epochs=1',
    'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first test waits for the wheel to be built and a detector to be trained
    pytest.mark.skipif(not (ROOT / 'setup.py').is_file(), reason='no checkout or unpacked sdist'),
]


def environment(**variables):
    """That of a process which finds neither this checkout nor a home."""
    kept = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'HOME', 'GOMP_SPINCOUNT')}
    return {**kept, **variables}


def build(what, source, out, **variables):
    """Call a hook of setuptools, as pip does without build isolation, which would need the network."""
    command = [sys.executable, '-c', BUILD, what, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment(**variables))
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    """The sdist, unpacked; made of a copy, since building writes into the sources."""
    folder = tmp_path_factory.mktemp('sources of the sdist')
    shutil.copytree(ROOT, folder / 'copy', ignore=left_out)
    (folder / 'copy' / 'mmdet_norms' / 'kernels' / '_cpu.of-another-platform.so').touch()
    file = build('build_sdist', folder / 'copy', folder)
    with tarfile.open(file) as packed:
        packed.extractall(folder, filter='data')
    return folder / file.name.removesuffix('.tar.gz')


def left_out(path, names):
    """Of a copy of the repository: what git ignores, all of it large."""
    patterns = ('.git', '.venv', 'work_dirs', 'build', 'dist', '*.egg-info', '__pycache__', '.*_cache')
    left = shutil.ignore_patterns(*patterns)(path, names)
    return left | ({'data'} & set(names) if Path(path) == ROOT else set())


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    return build('build_wheel', sdist, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def names(wheel):
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """The ``bin`` of a fresh environment with the wheel, in which all else is what the running environment has."""
    folder = tmp_path_factory.mktemp('environment') / 'of somebody'
    venv.create(folder, symlinks=os.name != 'nt')
    bin_ = folder / ('Scripts' if os.name == 'nt' else 'bin')
    pip = [sys.executable, '-m', 'pip', '--python', str(bin_ / 'python'), '--disable-pip-version-check', '--quiet']
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', str(wheel)], check=True, env=environment())
    # Afterwards, or pip would find this package among them.
    site = subprocess.run([bin_ / 'python', '-c', SITE], capture_output=True, text=True, check=True).stdout.strip()
    others = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
    Path(site, 'zz_others.pth').write_text('\n'.join(others))
    return bin_


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An empty one: no clone."""
    folder = tmp_path_factory.mktemp('elsewhere') / 'my experiments'
    folder.mkdir()
    return folder


@pytest.fixture(scope='module')
def run(installed, folder):
    """Run a program of that environment there, without a home."""

    def run(program, *arguments):
        command = [str(installed / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope='module')
def python(installed, folder):
    """A Python of that environment, which reads our configs, imports the package, and runs commands from then on."""
    (folder / 'mine.py').write_text(f"_base_ = '{DEMO}'\n")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [str(installed / 'python'), '-W', 'ignore', '-c', COMMANDS.format(before=BEFORE)]
    with subprocess.Popen(command, cwd=folder, env=environment(), **pipes) as process:
        process.first, process.package = json.loads(process.stdout.readline()), json.loads(process.stdout.readline())
        yield process
        process.stdin.close()


@pytest.fixture(scope='module')
def mmdet_norms_of(python):
    """``mmdet-norms ...`` there; what it says."""

    def run(*arguments, status=0):
        print(json.dumps([str(argument) for argument in arguments]), file=python.stdin, flush=True)
        ended, said = json.loads(python.stdout.readline())
        assert ended == status, said
        return said

    return run


@pytest.fixture(scope='module')
def trained(run, mmdet_norms_of, folder):
    """A work dir of the demo, trained by name with the console script."""
    mmdet_norms_of('shapes', '--out', 'my data', '--train', 8, '--val', 4, '--size', 64)
    command = ('mmdet-norms', 'train', DEMO, '--data-root', 'my data', '--work-dir', 'a run')
    run(*command, '--cfg-options', *QUICK)
    return folder / 'a run'


def test_the_sdist_is_the_repository(sdist):
    if not (ROOT / '.git').exists():
        pytest.skip('no clone: nothing says what belongs to the repository')
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packed = {path.relative_to(sdist).as_posix() for path in sdist.rglob('*') if path.is_file()}
    assert set(listed.splitlines()) - packed == set()
    assert {name for name in packed if name.endswith(('.so', '.pyc'))} == set()
    assert os.access(sdist / 'tools' / 'dist_train.sh', os.X_OK)


def test_the_wheel_is_for_every_python(wheel, names):
    libraries = [name for name in names if name.endswith(('.so', '.pyd'))]
    platform = sysconfig.get_platform().replace('-', '_').replace('.', '_')
    if libraries:
        assert len(libraries) == 1 and wheel.stem.endswith(f'-py3-none-{platform}')
    else:
        assert wheel.stem.endswith('-py3-none-any')
    assert bool(libraries) == (shutil.which(sysconfig.get_config_var('CC').split()[0]) is not None)


def test_without_a_compiler_the_wheel_is_for_every_machine(sdist, tmp_path):
    wheel = build('build_wheel', sdist, tmp_path, CC='no-such-compiler')
    with zipfile.ZipFile(wheel) as packed:
        assert wheel.stem.endswith('-py3-none-any')
        assert not any(name.endswith(('.so', '.pyd')) or '.data/' in name for name in packed.namelist())


def test_the_wheel_has_the_package_and_nothing_else(names):
    info = f'mmdet_norms-{mmdet_norms.__version__}.dist-info'
    assert {name.partition('/')[0] for name in names} == {'mmdet_norms', 'mmdet_norms_start', 'mmdet_norms.pth', info}
    assert {'mmdet_norms/py.typed', 'mmdet_norms/.mim/model-index.yml', f'{info}/licenses/LICENSE'} <= names
    modules = {name for name in names if name.endswith('.py') and name.startswith('mmdet_norms/')}
    tools = {name for name in names if '/.mim/tools/' in name}
    assert tools == {'mmdet_norms/.mim/tools/train.py', 'mmdet_norms/.mim/tools/test.py'}  # of mim
    configs = {name for name in names if '/.mim/configs/' in name}
    assert configs == {f'mmdet_norms/.mim/{name}' for name in files('configs')}
    assert modules - configs - tools == {name for name in files('mmdet_norms') if name.endswith('.py')}


def files(folder):
    """The files of a folder of the repository."""
    found = (path for path in (ROOT / folder).rglob('*') if path.is_file() and '__pycache__' not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_page_of_the_package_has_no_dead_links(wheel):
    with zipfile.ZipFile(wheel) as packed:
        metadata = packed.read(f'mmdet_norms-{mmdet_norms.__version__}.dist-info/METADATA').decode()
    text = Parser().parsestr(metadata).get_payload()
    assert text.startswith('# mmdet_norms') and '](http' in text
    assert not [line for line in text.splitlines() if '](docs/' in line or '](configs/' in line or 'src="docs' in line]


def test_the_console_script_trains_and_tests_a_config_of_the_package(run, mmdet_norms_of, trained):
    checkpoint = (trained / 'last_checkpoint').read_text()
    assert (trained / 'results.json').is_file()
    config = trained / Path(DEMO).name  # as dumped: a whole config, wherever it lies
    # torchrun, which this environment has only as a module: several processes, without tools/dist_test.sh
    torchrun = ('python', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m')
    run(
        *torchrun,
        'mmdet_norms',
        'test',
        config,
        checkpoint,
        '--data-root',
        'my data',
        '--launcher',
        'pytorch',
        '--work-dir',
        'tested',
    )
    assert 'bbox' in mmdet_norms_of('compare', 'a run', 'tested')


def test_outside_of_a_clone_messages_name_the_console_script(mmdet_norms_of):
    said = mmdet_norms_of('train', DEMO, status=2)
    assert 'mmdet-norms shapes generates them' in said and 'tools/' not in said


def test_other_programs_find_the_configs(python):
    imported, config = python.first
    assert imported is False and config.startswith(f'{Path(python.package).parent}/.mim/configs/')
    assert ROOT not in Path(python.package).parents
