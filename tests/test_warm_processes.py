"""Warm processes of the tests' helpers live and end as those of ``subprocess`` do."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from helpers import warm


def both(code, *arguments, **options):
    """What a new Python and a warm one do with the code, which needs no package."""
    command = [sys.executable, '-c', code, *arguments]
    options = dict(dict(capture_output=True, text=True, timeout=60), **options)
    return [run(command, **options) for run in (subprocess.run, warm.run)]


@pytest.mark.parametrize(
    'code',
    [
        'print(1)',
        'import sys; print(sys.argv, __name__); print("é", file=sys.stderr); sys.exit(7)',
        'raise SystemExit("error: no")',
        'import sys; sys.exit(300)',
        'import os; os.kill(os.getpid(), 9)',
        'import os, sys; print("lost"); os._exit(3)',
        'print(sorted(line for line in open("here")), input())',
        'import atexit; atexit.register(print, "at the end")',
        'import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()',
        'import warnings; warnings.warn("w"); warnings.warn("d", DeprecationWarning); print(1)',
        'import os; print(os.environ["MINE"], "PYTEST_CURRENT_TEST" in os.environ, os.path.basename(os.getcwd()))',
        'import multiprocessing as m; p = m.get_context("fork").Process(target=print, args=(5,)); p.start(); p.join()',
        'import logging; logging.warning("logged")',
        'import sys; sys.stdout.close()',
    ],
)
def test_they_do_what_a_new_python_does(code, tmp_path):
    (tmp_path / 'here').write_text('a\nb\n')
    env = {key: value for key, value in os.environ.items() if not key.startswith('PYTEST')}
    new, ours = both(code, 'a', '--b', input='typed\n', cwd=tmp_path, env={**env, 'MINE': 'x'})
    assert (ours.returncode, ours.stdout, ours.stderr) == (new.returncode, new.stdout, new.stderr)


def test_an_error_is_shown_as_ever():
    new, ours = both('def f():\n    raise RuntimeError("no")\nf()')
    assert ours.returncode == new.returncode == 1
    assert ours.stderr.splitlines()[-1] == new.stderr.splitlines()[-1] == 'RuntimeError: no'


def test_scripts_and_modules(tmp_path):
    (tmp_path / 'beside.py').write_text('x = 3')
    (tmp_path / 'script.py').write_text('import sys, beside; print(beside.x, sys.argv, __file__, __name__)')
    for command in (['script.py', '1'], ['-W', 'ignore', '-m', 'script', '1'], ['-u', tmp_path / 'script.py']):
        new, ours = (
            run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
            for run in (subprocess.run, warm.run)
        )
        assert (ours.returncode, ours.stdout) == (new.returncode, new.stdout) == (0, ours.stdout)


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_they_are_killed(number):
    code = 'import time; print("ready", flush=True); time.sleep(60)'
    with warm.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b'ready\n' and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(number)
        assert process.wait(10) == process.poll() == -number
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_several_at_once_draw_other_numbers_and_start_in_a_moment():
    code = 'import random, numpy, mmdet_norms.cli.train; print(random.random(), numpy.random.rand())'
    random.seed(0)
    began = time.process_time()
    started = [warm.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) for _ in range(3)]
    said = {process.communicate()[0] for process in started}
    assert len(said) == 3 and b'' not in said and time.process_time() - began < 2


RANKS = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group('gloo')
total = torch.ones(1) * (1 + dist.get_rank())
dist.all_reduce(total)
line = ' '.join(map(str, (os.environ['LOCAL_RANK'], 'of', dist.get_world_size(), 'sums', total.item())))
os.write(1, f'{line}\\n'.encode())  # at once, since both write into the same pipe
sys.exit(int(sys.argv[1]) * dist.get_rank())
"""


def test_two_of_one_group():
    command = [sys.executable, '-c', RANKS]
    assert sorted(warm.run_together([*command, '0']).splitlines()) == ['0 of 2 sums 3.0', '1 of 2 sums 3.0']
    with pytest.raises(AssertionError, match=r'ended with \[0, 4\]'):
        warm.run_together([*command, '4'])
