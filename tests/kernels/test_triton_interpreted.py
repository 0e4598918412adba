"""The Triton kernels on machines without a GPU: by Triton's interpreter, in a process of its own.

Triton decides at import whether it interprets, for all kernels of a process.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec('triton') is None, reason='no Triton here; it is for Linux only')
@pytest.mark.parametrize('cases', ['depthwise', 'map_ops'])
def test_the_kernels_compute_what_their_formulas_say(cases):
    command = [sys.executable, '-m', 'pytest', '-q', '--noconftest', '-p', 'no:cacheprovider']
    command += [str(HERE / f'interpreted_{cases}.py')]
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'MMDET_NORMS_TRITON': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
