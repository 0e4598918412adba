"""The commands, called as functions and as scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import warm
from mmdet_norms.cli import train

ROOT = Path(__file__).resolve().parents[2]


def fails(capsys, main, *arguments) -> str:
    """Run a command that must end with status 2 and one message; return it."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1
    return lines[0]


def options_of(module, *arguments):
    """The config that ``train`` or ``test`` makes of its arguments."""
    args = module.parse_args([str(argument) for argument in arguments])
    return module.train_config(args) if module is train else module.test_config(args)


def run_tool_in_two(name, *arguments) -> str:
    """What ``tools/dist_{name}.sh ... 2`` prints, without waiting for torch and mmdet: from warm processes."""
    command = [sys.executable, str(ROOT / 'tools' / f'{name}.py'), *map(str, arguments), '--launcher', 'pytorch']
    return warm.run_together(command, env=dict(os.environ, CUDA_VISIBLE_DEVICES=''))


def run_tool(name, config, *arguments, **environment) -> str:
    """What a script of ``tools/`` prints, which must succeed, on a CPU."""
    env = dict(os.environ, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES='', **environment)
    command = [str(ROOT / 'tools' / name), *map(str, (config, *arguments))]
    cwd = config.parent  # mmengine leaves a .dist_test there
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout
