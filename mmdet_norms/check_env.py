"""The doctor: ``python -m mmdet_norms.check_env`` says what is installed, what does not fit, and what mends it.

It needs the standard library only, and tries every import in another process: it is there for when they fail.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from glob import glob
from importlib import metadata, util
from pathlib import Path

from mmdet_norms_start.commands import reader_may_leave, typed
from mmdet_norms_start.requirements import NEEDED, OPTIONAL, PYTHON, STACK_IS, STACK_NEEDS, STACKS, extra

from .version import __version__

_SECONDS = 180  # of one import: the first one of torch after an installation reads a gigabyte
_ROOT = Path(__file__).resolve().parents[1]
_OPENCV = ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python', 'opencv-contrib-python-headless')
_SHOWN = ('torch', 'torchvision', 'triton', *(name for name in NEEDED if name != 'torch'), 'setuptools')
_ONNX = ('onnx', 'onnxscript', 'onnxruntime')
_PROBES = {  # what is asked of a process, and the distribution without which there is nothing to ask
    'torch': 'torch',
    'numpy': 'numpy',
    'cv2': None,
    **{name: name for name in NEEDED if name not in ('torch', 'numpy')},
    'torchvision': 'torchvision',
    'pytorch-optimizer': 'pytorch-optimizer',
    'mmengine': None,
    'mmcv': None,
    'mmcv ops': None,
    'mmdet': None,
    'config': None,
    'triton': 'triton',
    'mmdet_norms': None,
}


@dataclass(frozen=True)
class Problem:
    """Something that does not fit.

    Args:
        what: one or two sentences.
        mend: commands for a shell, in order.
        fatal: whether something does not work; otherwise it is slower or less than it could be.
    """

    what: str
    mend: list[str] = field(default_factory=list)
    fatal: bool = True


@dataclass(frozen=True)
class Facts:
    """What is known of an environment.

    Args:
        packages: version by distribution, of what is installed.
        probes: by name, what ``mmdet_norms_start/probe.py`` found: ``error`` if an import failed.
        python: its version.
        executable: what runs it.
        has_pip: whether it has pip; otherwise the commands are those of uv.
        has_nvidia: whether the machine has an NVIDIA GPU.
        has_hook: whether ``mmdet_norms.pth`` was read at the start.
    """

    packages: Mapping[str, str]
    probes: Mapping[str, Mapping]
    python: str = '.'.join(map(str, sys.version_info[:3]))
    executable: str = sys.executable
    has_pip: bool = True
    has_nvidia: bool = False
    has_hook: bool = True

    def error(self, probe: str) -> str:
        """Why an import failed; nothing if it did not."""
        return self.probes.get(probe, {}).get('error', '')

    def install(self, *packages: str, options: str = '') -> str:
        """The command that installs packages into this environment."""
        names = ' '.join(map(shlex.quote, packages))
        return f'{self._pip("install")} {options + " " if options else ""}{names}'

    def uninstall(self, *packages: str) -> str:
        """The command that removes packages from this environment."""
        return f'{self._pip("uninstall")} {"-y " if self.has_pip else ""}{" ".join(packages)}'

    def _pip(self, command: str) -> str:
        python = shlex.quote(self.executable)
        return f'{python} -m pip {command}' if self.has_pip else f'uv pip {command} --python {python}'

    def stack(self) -> str | None:
        """The set of mm* packages that is meant: the one that most is installed of."""
        count = {name: sum(dist in self.packages for dist, _ in of.values()) for name, of in STACKS.items()}
        best = max(count, key=count.get)
        return best if count[best] else None


# -------------------------------------------------------------------------------------------------------------- rules


def problems(facts: Facts) -> list[Problem]:
    """What does not fit, the causes before what they cause."""
    if not fits(facts.python, PYTHON):
        mend = [f'python3.12 -m venv .venv && . .venv/bin/activate && pip install {shlex.quote("mmdet_norms[lite]")}']
        return [Problem(f'Python is {facts.python}, and mmdet_norms needs {PYTHON}', mend)]
    found = [*_missing(facts), *_torch(facts), *_needed(facts), *_opencv(facts), *_stack(facts)]
    if not any(problem.fatal for problem in found):
        found += _configs(facts)
    found += _less_than_could_be(facts)
    if not any(problem.fatal for problem in found) and facts.error('mmdet_norms'):
        found.append(_own_import(facts))
    return found


def _missing(facts: Facts) -> list[Problem]:
    names = [name for name in NEEDED if name not in facts.packages]
    if not names:
        return []
    said = f'{", ".join(names[:-1])} and {names[-1]} are' if names[1:] else f'{names[0]} is'
    return [Problem(f'{said} not installed', [facts.install(*(name + NEEDED[name] for name in names))])]


def _torch(facts: Facts) -> list[Problem]:
    version, error = facts.packages.get('torch'), facts.error('torch')
    if version is None:
        return []
    if not fits(version, NEEDED['torch']):
        what = f'torch is {version}, and mmdet_norms needs {NEEDED["torch"]}'
        return [Problem(what, [facts.install(f'torch{NEEDED["torch"]}', options='--upgrade')])]
    if error:
        mend = [facts.install(f'torch=={_public(version)}', options='--force-reinstall --no-cache-dir')]
        return [Problem(f'torch {version} is installed and cannot be imported: {error}', mend)]
    probe = facts.probes.get('torch', {})
    if facts.has_nvidia and probe and not probe['gpus']:
        if probe['build'] == 'CPU':
            mend = [facts.uninstall('torch'), facts.install(f'torch=={_public(version)}')]
            return [Problem(f'There is an NVIDIA GPU, and torch {version} is a build for CPUs', mend, fatal=False)]
        why = f': {probe["why_no_gpu"]}' if probe['why_no_gpu'] else ''
        what = (
            f'There is an NVIDIA GPU, and torch {version} ({probe["build"]}) cannot use it{why}. The driver may be '
            "too old for this build (upper right in nvidia-smi's table: the newest CUDA that it knows)"
        )
        return [Problem(what, ['nvidia-smi'], fatal=False)]
    return []


def _needed(facts: Facts) -> list[Problem]:
    found, torch_works = [], not facts.error('torch') and 'torch' in facts.packages
    for name, versions in NEEDED.items():
        if name == 'torch' or name not in facts.packages:
            continue
        version, error = facts.packages[name], facts.error(name)
        if not fits(version, versions):
            what = f'{name} is {version}, and mmdet_norms needs {versions}'
            found.append(Problem(what, [facts.install(name + versions)]))
        elif error and name == 'numpy' and 'umpy is not available' in error:
            what = f'torch {facts.packages.get("torch")} was built for numpy 1, and numpy is {version}'
            found.append(Problem(what, [facts.install('numpy<2')]))
        elif error and (name != 'numpy' or torch_works):
            what = f'{name} {version} is installed and cannot be imported: {error}'
            found.append(Problem(what, [facts.install(name, options='--force-reinstall --no-deps --no-cache-dir')]))
    return found


def _opencv(facts: Facts) -> list[Problem]:
    installed, error = [name for name in _OPENCV if name in facts.packages], facts.error('cv2')
    if not installed:
        return [Problem('OpenCV is not installed', [facts.install('opencv-python-headless')])]
    if not error:
        return []
    mend = [facts.uninstall(*installed), facts.install('opencv-python-headless')]
    if re.search(r'lib(GL|EGL|gthread|glib|xcb|X11|SM|ICE)', error):
        what = (
            f'{" and ".join(installed)} needs a library for windows that this machine lacks ({error}). The headless '
            'build is the same module without them'
        )
        return [Problem(what, mend)]
    return [Problem(f'{" and ".join(installed)} is installed and cannot be imported: {error}', mend)]


def _stack(facts: Facts) -> list[Problem]:
    """The mm* packages: one set of them, whole, in versions that fit each other."""
    stack = facts.stack()
    if stack is None:
        what = 'There is no mmengine, mmcv and mmdet. They come in three sets, of which to install one: ' + '; '.join(
            f'[{name}], {STACK_IS[name]}' for name in STACKS
        )
        return [Problem(f'{what}. For [lite]:', [facts.install(*extra('lite'))])]
    mixed = _mixed(facts, stack)
    if mixed:
        return [mixed]
    found = []
    for module, (dist, versions) in STACKS[stack].items():
        version, error = facts.packages.get(dist), facts.error(module)
        if version is None:
            found.append(Problem(f'{dist} is not installed', [facts.install(dist + versions)]))
        elif not fits(version, versions):
            what = f'{dist} is {version}, and mmdet_norms needs {versions}'
            if module == 'mmcv':
                what += f'; mmdet {facts.packages.get(STACKS[stack]["mmdet"][0], "")} refuses others'
            found.append(
                Problem(what, _install_mmcv(facts, stack) if module == 'mmcv' else [facts.install(dist + versions)])
            )
        elif error and not found and not facts.error('torch') and not facts.error('cv2'):
            what = f'{dist} {version} is installed and cannot be imported: {error}'
            found.append(Problem(what, [facts.install(dist + versions, options='--force-reinstall --no-deps')]))
    return found or _mmcv_ops(facts, stack)


def _mixed(facts: Facts, stack: str) -> Problem | None:
    """Distributions whose modules overwrite each other: whichever came last, parts of the other are left."""
    both = []
    for module in STACKS['lite']:
        names = dict.fromkeys(of[module][0] for of in STACKS.values())
        installed = [name for name in names if name in facts.packages]
        if len(installed) > 1:
            both.append((module, installed))
    kinds = {('onedl' if 'onedl' in name else 'upstream') for name in _all_of_stacks() if name in facts.packages}
    if not both and len(kinds) < 2:
        return None
    there = [name for name in _all_of_stacks() if name in facts.packages]
    if both:
        said = '; '.join(f'{" and ".join(names)} are both the module {module}' for module, names in both)
        what = f'{said}: one overwrites files of the other'
    else:
        what = f'{", ".join(there)} are of two sets: upstream and its forks are not made for each other'
    if len(kinds) < 2:  # so it is mmcv and mmcv-lite
        stack = 'mmcv' if facts.probes.get('mmcv ops', {}).get('there') else 'lite'
        mend = [facts.uninstall('mmcv', 'mmcv-lite'), *_install_mmcv(facts, stack)]
        others = (
            'mmcv-lite, which needs no compiler' if stack == 'mmcv' else 'mmcv, whose compiled ops do not load here'
        )
        return Problem(f'{what}. Remove both, and install one: {STACKS[stack]["mmcv"][0]} here, or {others}', mend)
    whole = [name for name, of in STACKS.items() if all(dist in facts.packages for dist, _ in of.values())]
    if 'onedl' in whole and len(whole) > 1:  # the files are those of the set that was installed last
        version = facts.probes.get('mmcv', {}).get('version') or '0'
        stack = 'onedl' if fits(version, STACKS['onedl']['mmcv'][1]) else whole[0]
    mend = [facts.uninstall(*there), facts.install(*extra(stack))]
    if stack == 'mmcv':
        mend = [facts.uninstall(*there), *_install_mmcv(facts, stack), facts.install(*extra(stack))]
    others = [name for name in STACKS if name != stack]
    return Problem(f'{what}. Remove them all, and install one set: [{stack}] here, or [{"], [".join(others)}]', mend)


def _all_of_stacks() -> list[str]:
    return list(dict.fromkeys(dist for of in STACKS.values() for dist, _ in of.values()))


def _install_mmcv(facts: Facts, stack: str) -> list[str]:
    dist, versions = STACKS[stack]['mmcv']
    if stack != 'mmcv':
        return [facts.install(dist + versions)]
    # Its build reads pkg_resources and torch, and leaves the ops out where it finds no torch.
    return [
        facts.install('setuptools<82', 'wheel'),
        facts.install(dist + versions, options='--no-cache-dir --no-build-isolation'),
    ]


def _mmcv_ops(facts: Facts, stack: str) -> list[Problem]:
    ops, dist = facts.probes.get('mmcv ops', {}), STACKS[stack]['mmcv'][0]
    version = facts.packages.get(dist)
    lite = [facts.uninstall(dist), facts.install(''.join(STACKS['lite']['mmcv']))]
    if ops.get('error') and not facts.error('torch'):
        what = (
            f'The compiled ops of {dist} {version} do not load: {ops["error"]}. They were built for another torch than '
            f'{facts.packages.get("torch")}, or another CUDA: build them for this one'
        )
        if stack == 'mmcv':
            what += '; or take mmcv-lite, which needs no compiler: ' + ' && '.join(lite)
        again = '--force-reinstall --no-deps --no-cache-dir --no-build-isolation'
        mend = [facts.install('setuptools<82', 'wheel'), facts.install(f'{dist}=={version}', options=again)]
        return [Problem(what, mend)]
    if ops.get('there') is False and stack == 'mmcv':
        what = (
            f'{dist} {version} was installed without its compiled ops, as its build does where it sees no torch. Those '
            'of this package are used, which are fewer. With mmcv-lite, which is the same, this is as it is meant; to '
            f'build the ops instead: {facts.install("setuptools<82", "wheel")} && MMCV_WITH_OPS=1 '
            + facts.install(
                f'{dist}=={version}', options='--force-reinstall --no-deps --no-cache-dir --no-build-isolation'
            )
        )
        return [Problem(what, lite, fatal=False)]
    return []


def _configs(facts: Facts) -> list[Problem]:
    error, stack = facts.error('config'), facts.stack()
    if not error:
        return []
    version, wanted = facts.packages.get('setuptools'), STACK_NEEDS[stack].get('setuptools', '')
    if 'pkg_resources' in error or version is None or not fits(version, wanted):
        what = (
            "`_base_ = 'mmdet::...'` in a config cannot be read: mmengine needs pkg_resources for it, which setuptools "
            f'82 removed; here it is {version or "not installed"}'
        )
        return [Problem(what, [facts.install(f'setuptools{wanted or "<82"}')])]
    dist, versions = STACKS[stack]['mmdet']
    what = f"`_base_ = 'mmdet::...'` in a config cannot be read: {error}"
    return [Problem(what, [facts.install(dist + versions, options='--force-reinstall --no-deps')])]


def _less_than_could_be(facts: Facts) -> list[Problem]:
    found = []
    if facts.error('torchvision') and not facts.error('torch') and 'torch' in facts.packages:
        torch = facts.packages['torch']
        match = matching_torchvision(torch)
        what = (
            f'torchvision {facts.packages.get("torchvision")} cannot be imported beside torch {torch}: '
            f'{facts.error("torchvision")}. Nothing here needs it; on a GPU its ops are faster'
        )
        mend = [facts.install(f'torchvision=={match}', f'torch=={_public(torch)}')] if match else []
        found.append(Problem(what, mend or [facts.uninstall('torchvision')], fatal=False))
    for name, versions in (item for needs in OPTIONAL.values() for item in needs.items()):
        version, error = facts.packages.get(name), facts.error(name)
        if version is None or facts.error('torch'):
            continue
        if not fits(version, versions):
            what = f'{name} is {version}, and what mmdet_norms takes from it needs {versions}'
            found.append(Problem(what, [facts.install(name + versions)], fatal=False))
        elif error:
            what = f'{name} {version} is installed and cannot be imported: {error}'
            mend = [facts.install(name, options='--force-reinstall --no-deps --no-cache-dir')]
            found.append(Problem(what, mend, fatal=False))
    if facts.probes.get('mmdet_norms', {}).get('no_kernels'):
        if (_ROOT / 'setup.py').is_file():
            mend = [facts.install(str(_ROOT), options='--no-deps --no-build-isolation -e')]
        else:
            mend = [facts.install(f'mmdet_norms=={__version__}', options='--no-deps --force-reinstall')]
        found.append(Problem(facts.probes['mmdet_norms']['no_kernels'], mend, fatal=False))
    return found


def _own_import(facts: Facts) -> Problem:
    error = facts.error('mmdet_norms')
    if 'MMDET_NORMS_OPS' in error:
        return Problem(error.partition(': ')[2], ['unset MMDET_NORMS_OPS'])
    missing = facts.probes['mmdet_norms'].get('missing', '').partition('.')[0]
    if facts.probes['mmdet_norms'].get('kind') == 'ModuleNotFoundError' and missing not in ('', 'mmdet_norms'):
        return Problem(f'mmdet_norms cannot be imported: {error}', [facts.install(missing)])
    what = f'mmdet_norms cannot be imported: {error}. All that it needs is there: please report this with what follows'
    return Problem(what, [f'{shlex.quote(facts.executable)} -c "import mmdet_norms"'])


def matching_torchvision(torch: str) -> str | None:
    """The torchvision that was made with a torch: 0.16 with 2.1, and so on."""
    major, minor = _numbers(torch)[:2]
    return f'0.{minor + 15}.{_numbers(torch)[2] if len(_numbers(torch)) > 2 else 0}' if major == 2 else None


def fits(version: str, versions: str) -> bool:
    """Whether a version is among ``'>=2.0.0,<2.2.0'``; numbers only, which is all that is used."""
    numbers = _numbers(version)
    for part in filter(None, versions.split(',')):
        relation, bound = re.match(r'(>=|<=|==|!=|<|>)\s*(.*)', part.strip()).groups()
        bound = _numbers(bound)
        width = max(len(numbers), len(bound))
        a, b = (x + (0,) * (width - len(x)) for x in (numbers, bound))
        if not {'>=': a >= b, '<=': a <= b, '==': a == b, '!=': a != b, '<': a < b, '>': a > b}[relation]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.match(r'\d+(\.\d+)*', version)[0].split('.'))) if version[:1].isdigit() else (0,)


def _public(version: str) -> str:
    return version.partition('+')[0]


# -------------------------------------------------------------------------------------------------------------- facts


def gather() -> Facts:
    """Look at the environment that runs this."""
    packages = {}
    for dist in metadata.distributions():
        if Path(str(getattr(dist, '_path', ''))).name.startswith('~'):  # left by a pip that was stopped
            continue
        with suppress(Exception):  # a folder without its METADATA
            name, version = dist.metadata['Name'], dist.metadata['Version']
            if name and version:
                packages.setdefault(name.lower().replace('_', '-'), version)
    names = [name for name, dist in _PROBES.items() if dist is None or dist in packages]
    return Facts(
        packages=packages,
        probes=probe(names),
        has_pip=util.find_spec('pip') is not None,
        has_nvidia=bool(glob('/dev/nvidia[0-9]*')) or shutil.which('nvidia-smi') is not None,
        has_hook='mmdet_norms_start.hook' in sys.modules,
    )


def probe(names: Sequence[str]) -> dict[str, dict]:
    """Try imports, in a process that may die of them; then the rest are tried in another one."""
    found, names = {}, list(names)
    code = (
        f'import sys; root = {str(_ROOT)!r}; sys.path[0:1] = [] if root in sys.path[1:] else [root]; '
        'from mmdet_norms_start.probe import main; main(sys.argv[1:])'
    )
    # The hook would find ops where mmcv has none. A library that warns is not what is asked for.
    env = {**os.environ, 'MMDET_NORMS_HOOK': '0', 'PYTHONWARNINGS': 'ignore', 'NO_ALBUMENTATIONS_UPDATE': '1'}
    while names:
        command = [sys.executable, '-c', code, *names]
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, errors='backslashreplace', timeout=_SECONDS
            )
            out, end = done.stdout, f'its process ended with status {done.returncode}'
            said = [line for line in (done.stderr or '').splitlines() if line.strip()]
            if done.returncode < 0:
                end = f'its process was killed by signal {-done.returncode}'
            if said and done.returncode:
                end += f' ({said[-1].strip()[:200]})'
        except subprocess.TimeoutExpired as error:
            out = error.stdout or ''
            out = out.decode(errors='backslashreplace') if isinstance(out, bytes) else out
            end = f'it took more than {_SECONDS} s'
        begun = None
        for line in out.splitlines():
            try:
                name, result = json.loads(line)
            except (TypeError, ValueError):  # printed by what runs at every start, such as sitecustomize.py
                continue
            if name not in names:
                continue
            begun = name if result is None else None
            if result is not None:
                found[name] = result
        if begun is None and not any(name in found for name in names):  # it did not even begin
            begun = names[0]
        if begun is not None:
            found[begun] = dict(error=end, kind='', missing='')
        names = [name for name in names if name not in found]
    return found


# ------------------------------------------------------------------------------------------------------------- report


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is installed and what does not fit; 1 if something cannot work, else 0."""
    args = parse_args(argv)
    facts = gather()
    found = problems(facts)
    if args.json:
        print(json.dumps(dict(**asdict(facts), problems=[asdict(problem) for problem in found]), indent=2))
    else:
        print('\n'.join([*_table(facts), *_said(found)]))
    return int(any(problem.fatal for problem in found))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=typed('doctor'),
        description='Print what is installed, what does not fit, and the commands that mend it. The exit status is 1 '
        'if something cannot work, else 0.',
    )
    parser.add_argument('--json', action='store_true', help='all of it as JSON')
    return parser.parse_args(argv)


def _table(facts: Facts) -> list[str]:
    own, torch = facts.probes.get('mmdet_norms', {}), facts.probes.get('torch', {})
    rows = [
        ('mmdet_norms', f'{__version__}, {Path(__file__).parent}'),
        ('Python', f'{facts.python}, {facts.executable}'),
    ]
    names = [*_SHOWN, *(name for name in _OPENCV if name in facts.packages)]
    names += [name for name in _all_of_stacks() if name in facts.packages]
    for name in [*names, *_ONNX, *(name for needs in OPTIONAL.values() for name in needs)]:
        rows.append((name, facts.packages.get(name, '-')))
        if name == 'torch' and 'build' in torch:
            gpus = ', '.join(torch['gpus']) or 'no GPU'
            rows[-1] = (name, f'{rows[-1][1]}, built for {torch["build"]}; {gpus}; {torch["threads"]} CPU threads')
    ops = facts.probes.get('mmcv ops', {})
    compiled = ops.get('there') and f'compiled, CUDA {ops["cuda"]}'
    broken = ops.get('error') and not facts.error('torch') and not facts.error('mmcv') and 'torch' in facts.packages
    rows.append(("mmcv's own ops", compiled or ('do not load' if broken else 'none')))
    words = {'mmcv': 'compiled mmcv', 'torchvision': 'torchvision, else PyTorch', 'torch': 'PyTorch, of mmdet_norms'}
    for device, kind in own.get('ops', {}).items():
        if device == 'cpu' or torch.get('build') != 'CPU':
            rows.append((f'ops used on {device}', words.get(kind, kind)))
    if own and 'error' not in own:
        rows.append(('CPU kernels', 'not compiled' if own.get('no_kernels') else 'compiled'))
    if not ops.get('there'):
        off = 'off: scripts of mmdet need `import mmdet_norms` first, or an installed mmdet_norms'
        rows.append(('import hook', 'on' if facts.has_hook else off))
    width = max(len(name) for name, _ in rows)
    return [f'{name:{width}}  {value}' for name, value in rows]


def _said(found: Sequence[Problem]) -> list[str]:
    fatal = [problem for problem in found if problem.fatal]
    lines = ['', 'Nothing is wrong.' if not fatal else f'{len(fatal)} thing{"s" * (len(fatal) > 1)} to mend:']
    for problem in [*fatal, *(problem for problem in found if not problem.fatal)]:
        lines.append('')
        start = '* ' if problem.fatal else '* could be better: '
        lines += textwrap.wrap(
            start + problem.what, 110, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False
        )
        lines += [f'    {command}' for command in problem.mend]
    return lines


if __name__ == '__main__':
    with reader_may_leave():
        sys.exit(main())
