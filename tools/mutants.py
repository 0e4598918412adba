#!/usr/bin/env python
"""Change the code in small ways, one at a time, and see whether the tests notice: ``python tools/mutants.py``.

Every mutant of ``tests/mutants.yml`` is applied to a copy of the checkout; its tests run there until the first one
fails, and that one is named. A mutant that survives is a hole in the tests. ``--unchanged`` runs the same tests in an
unchanged copy, where they must pass. By hand, not in CI: it takes about three quarters of an hour on two cores.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / 'tests' / 'mutants.yml'
_COPIED = ('mmdet_norms', 'mmdet_norms_start', 'configs', 'tools', 'tests', 'docs', 'requirements')
_LIMIT_S = 900


def main() -> None:
    """Run the chosen mutants and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', metavar='TEXT', default='', help='mutants whose file or change has this text')
    parser.add_argument('--jobs', type=int, default=2, help='mutants at a time; default 2')
    parser.add_argument('--unchanged', action='store_true', help='change nothing: every test has to pass')
    args = parser.parse_args()
    mutants = [m for m in read_table() if args.only in f'{m["file"]} {m["old"]} {m["new"]}']
    if args.unchanged:
        mutants = [dict(file='', old='', new='', tests=tests) for tests in dict.fromkeys(m['tests'] for m in mutants)]
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(report, mutants))
    counts = Counter(outcomes)
    print(f'{len(mutants)} mutants: {", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))}')
    sys.exit(set(counts) != {'survived' if args.unchanged else 'caught'})


def read_table() -> list[dict]:
    """``file``, ``old``, ``new`` and ``tests`` (arguments of pytest) of each mutant."""
    return yaml.safe_load(TABLE.read_text(encoding='utf-8'))


def report(mutant: dict) -> str:
    """Try one mutant, print a line, and return 'caught', 'survived' or 'broken'."""
    began = time.monotonic()
    outcome, why = attempt(mutant)
    change = f'{_one_line(mutant["old"])} -> {_one_line(mutant["new"]) or "(nothing)"}'
    print(f'{outcome:8} {time.monotonic() - began:4.0f} s  {mutant["file"]}: {change}\n{"":17}{why}', flush=True)
    return outcome


def attempt(mutant: dict) -> tuple[str, str]:
    """The outcome, and the test that failed, or what is wrong with the mutant."""
    with tempfile.TemporaryDirectory(prefix='mutant-') as folder:
        copy = Path(folder) / 'checkout'
        for name in _COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
        for path in ROOT.glob('*'):
            if path.is_file():
                shutil.copy(path, copy)
        changed = copy / mutant['file']
        if mutant['file']:
            text = changed.read_text(encoding='utf-8')
            if text.count(mutant['old']) != 1:
                return 'broken', f'the text to change is there {text.count(mutant["old"])} times'
            changed.write_text(text.replace(mutant['old'], mutant['new']), encoding='utf-8')
        env = dict(os.environ, PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1')
        if changed.suffix in ('.c', '.h'):
            built = _run([sys.executable, 'setup.py', '-q', 'build_ext', '--inplace', '--force'], copy, env)
            if built.returncode:
                return 'broken', f'does not compile: {built.stderr[-200:]}'
        pytest = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '--no-header']
        try:
            done = _run([*pytest, *shlex.split(mutant['tests'])], copy, env)
        except subprocess.TimeoutExpired:
            return 'caught', f'the tests did not end in {_LIMIT_S} s'
        if done.returncode == 0:
            return 'survived', f'pytest {mutant["tests"]} passed'
        if done.returncode < 0:  # as compiled code does that is handed a wrong address
            return 'caught', f'pytest {mutant["tests"]} was ended by {signal.Signals(-done.returncode).name}'
        failed = re.search(r'^(?:FAILED|ERROR) (.+?)(?: - .*)?$', done.stdout, re.MULTILINE)
        if done.returncode not in (1, 2) or not failed:  # 5: no test ran; 4: wrong arguments
            return 'broken', f'pytest {mutant["tests"]} ended with {done.returncode}: {done.stdout[-300:]}'
        return 'caught', failed[1]


def _run(command: list[str], folder: Path, env: dict) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=_LIMIT_S, check=False)


def _one_line(text: str) -> str:
    line = ' '.join(text.split())
    return line if len(line) <= 60 else f'{line[:57]}...'


if __name__ == '__main__':
    main()
