"""tools/launch.py: processes that fail or are stopped end in one message, and their status is that of the launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import warm

LAUNCH = Path(__file__).resolve().parents[2] / 'tools' / 'launch.py'
SCRIPT = """
import os, signal, sys, time
what = sys.argv[1]
print('ready', flush=True)
if what == 'sleep':
    time.sleep(100)
elif what == 'kill':
    os.kill(os.getpid(), signal.SIGKILL)
elif what == 'raise':
    raise RuntimeError('a bug')
sys.exit(int(what))
"""


def start(folder, what, popen=warm.Popen):
    (folder / 'script.py').write_text(SCRIPT)
    torchrun = ['--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1', '--master_port=0', '--nproc_per_node=1']
    command = [sys.executable, str(LAUNCH), *torchrun, 'script.py', what]  # but for the port, as launch.sh does
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return popen(command, cwd=folder, env=dict(os.environ, OMP_NUM_THREADS='1'), **pipes)


@pytest.mark.parametrize(
    'what, status, said',
    [
        ('0', 0, None),
        ('2', 2, None),
        ('kill', 1, 'error: process 0 was ended by SIGKILL, as the system does when memory runs out'),
        ('raise', 1, 'error: process 0 ended with status 1, see above'),
    ],
)
def test_the_status_is_that_of_the_processes(tmp_path, what, status, said):
    process = start(tmp_path, what, subprocess.Popen if what == 'kill' else warm.Popen)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert errors.count('Traceback') == (what == 'raise') and 'elastic/multiprocessing/errors' not in errors
    assert [line for line in errors.splitlines() if line.startswith('error: ')] == (
        [f'{said}; the others were stopped'] if said else []
    )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_processes_without_a_traceback(tmp_path, number):
    process = start(tmp_path, 'sleep')
    assert process.stdout.readline() == 'ready\n'
    time.sleep(0.2)  # the launcher may still be on its way to waiting
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert ('stopped by SIGTERM' in errors) == (number == signal.SIGTERM)
    launchers = [part for part in errors.split('Traceback')[1:] if 'SignalException' in part]
    assert not launchers
