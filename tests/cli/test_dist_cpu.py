"""tools/dist_*.sh with two processes on a CPU."""

import io
import json
import os
import subprocess
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist

from helpers import tiny
from helpers.commands import run_tool, run_tool_in_two
from helpers.processes import run_in_two
from mmdet_norms.cli.common import command

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_cpu_processes_train_together_and_test_what_they_trained(tmp_path):
    config = tiny.write_config(tmp_path)
    work_dir = tmp_path / 'run'
    # the demo has batch norms, which torch's DDP refuses to synchronize on CPUs
    options = ['--seed', '0', '--norm', 'syncbn', '--cfg-options', 'train_cfg.max_epochs=8', 'train_cfg.val_interval=8']
    log = run_tool('dist_train.sh', config, 2, '--work-dir', work_dir, *options)
    assert 'GPU number: 0' not in log and '[8][1/1]' in log  # four images, two each: one iteration
    assert 'training is not distributed' not in log
    trained = json.loads((work_dir / 'results.json').read_text())
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    assert state['neck.fpn_convs.0.bn.num_batches_tracked'] == 8
    options = ['--eval', 'bbox', 'segm', '--norm', 'syncbn', '--work-dir', tmp_path / 'tested']
    run_tool_in_two('test', config, checkpoint, *options)
    tested = json.loads((tmp_path / 'tested' / 'results.json').read_text())
    aps = [key for key in trained if '_mAP' in key]
    assert trained['bbox_mAP_50'] > 0
    assert {key: tested[key] for key in aps} == {key: trained[key] for key in aps}


def lose_the_other(rank):
    """In process 0: status and message of a command that waits for process 1, which ends meanwhile."""
    torch_dist.all_reduce(torch.ones(1))
    if rank == 1:
        return None
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as ended:
        command(lambda argv: [torch_dist.all_reduce(torch.ones(1)) for _ in range(100)])()
    return ended.value.code, said.getvalue()


def test_where_another_process_has_ended_one_line_says_so(tmp_path):
    status, said = run_in_two(tmp_path, lose_the_other)[0]
    assert status == 1
    assert said.startswith('process 0 cannot go on: another process of this run has ended') and said.count('\n') == 1


def own_error(argv):
    raise RuntimeError('Broken pipe')


def test_without_other_processes_the_error_is_ones_own(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(RuntimeError):
        command(own_error)()


@pytest.mark.parametrize('tool', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_a_tool_without_arguments_shows_its_usage(tool):
    done = subprocess.run([str(ROOT / 'tools' / tool)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert 'usage:' in done.stderr


@pytest.mark.parametrize('tool, files', [('dist_train', ['a config.py']), ('dist_test', ['a config.py', 'a file.pth'])])
def test_torchrun_starts_so_many_processes_of_the_command(tool, files, tmp_path):
    """With a stand-in for Python that prints what it is asked to do."""
    (tmp_path / 'python').write_text('#!/usr/bin/env bash\n[ "$1" = -c ] && echo 29512 || printf "%s\\n" "$@"\n')
    (tmp_path / 'python').chmod(0o755)
    env = dict(os.environ, PYTHON=str(tmp_path / 'python'), OMP_NUM_THREADS='1')
    command = [str(ROOT / 'tools' / f'{tool}.sh'), *files, '3', '--work-dir', 'a b']
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    assert Path(said[0]) == ROOT / 'tools' / 'launch.py' and '--nproc_per_node=3' in said
    assert {'--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1', '--master_port=29512'} <= set(said)
    script = said.index(str(ROOT / 'tools' / f'{tool.removeprefix("dist_")}.py'))
    assert said[script + 1 :] == [*files, '--work-dir', 'a b', '--launcher', 'pytorch']


def test_slurm_starts_torchrun_once_per_node(tmp_path):
    """With a stand-in for Slurm and for Python that print what they are asked to do."""
    for name, text in {
        'srun': 'while [[ $1 == --* ]]; do echo "srun $1"; shift; done\nSLURM_NODEID=1 SLURM_JOB_NODELIST=n[1-2] "$@"',
        'scontrol': 'printf "n1\\nn2\\n"',
        'python': '[ "$1" = -c ] && echo True || echo python "$@"',
    }.items():
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (tmp_path / name).chmod(0o755)
    env = dict(
        os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', PYTHON=str(tmp_path / 'python'),
        NNODES='2', GPUS_PER_NODE='4', PORT='29511',
    )  # fmt: skip
    command = [str(ROOT / 'tools' / 'slurm_train.sh'), 'part', 'job', 'a.py', 'out', '--amp']
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True).stdout
    assert 'srun --ntasks-per-node=1' in said and 'srun --gres=gpu:4' in said
    launched = next(line for line in said.splitlines() if line.startswith('python'))
    for part in ('--nnodes=2', '--node_rank=1', '--master_addr=n1', '--master_port=29511', '--nproc_per_node=4'):
        assert part in launched
    assert launched.endswith('a.py --work-dir out --amp --launcher pytorch')


def test_ranks_of_slurm_and_mpi_become_those_of_torch(monkeypatch):
    from mmdet_norms.engine.dist import _export_ranks

    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_NODELIST'):
        monkeypatch.delenv(name, raising=False)
    for name, value in (('RANK', '3'), ('SIZE', '4'), ('LOCAL_RANK', '1')):
        monkeypatch.setenv(f'OMPI_COMM_WORLD_{name}', value)
    _export_ranks('mpi')
    assert [os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')] == ['3', '4', '1']
    assert os.environ['MASTER_ADDR'] == '127.0.0.1'
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        os.environ.pop(name)


def test_no_processes_are_started_without_a_launcher():
    from mmengine.config import Config

    from mmdet_norms.engine import start_cpu_processes

    cfg = Config(dict(launcher='none'))
    start_cpu_processes(cfg)
    assert 'model_wrapper_cfg' not in cfg
    assert not torch.distributed.is_initialized()
