"""Several processes, and mixed precision, on a machine without GPUs.

mmengine's own set-up assumes CUDA in three places: ``init_dist`` selects a CUDA device, the runner
wraps the model with ``device_ids=[LOCAL_RANK]``, and ``AmpOptimWrapper`` wants a gradient scaler. This
module supplies the CPU answer to each, so that a distributed configuration can be tried and tested
anywhere. With a GPU present nothing here acts.
"""

import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as torch_dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn

from ..commands import several

# where each launcher leaves (rank, number of processes, rank on this node)
_LAUNCHER_ENV = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}
_STARTED_BY = {'slurm': 'srun sets them; without it, ', 'mpi': 'mpirun sets them; without it, '}
RANKS = {launcher: names[0] for launcher, names in _LAUNCHER_ENV.items()}
"""The environment variable with the number of the process, by launcher."""


# where each launcher leaves the number of processes on this machine
_PROCESSES_HERE = {
    'pytorch': 'LOCAL_WORLD_SIZE',
    'slurm': 'SLURM_NTASKS_PER_NODE',
    'mpi': 'OMPI_COMM_WORLD_LOCAL_SIZE',
}


# what gloo and NCCL say of a process that is gone
_LOST = ('onnection closed by peer', 'onnection reset by peer', 'Broken pipe', 'remote process exited')


def processes_here(launcher: str) -> int:
    """How many processes of this run share the cores of this machine, before they are connected."""
    if launcher == 'none':
        return 1
    for name in (_PROCESSES_HERE[launcher], _LAUNCHER_ENV[launcher][1]):
        if os.environ.get(name, '').isdigit():
            return max(1, int(os.environ[name]))
    return 1


def number_of_processes(launcher: str) -> int:
    """How many the launcher started, before they are connected; 1 without one."""
    _, name, _ = _LAUNCHER_ENV.get(launcher, ('', '', ''))
    return max(1, int(os.environ.get(name) or 1))


def start_cpu_processes(cfg: Config) -> None:
    """Join the other processes over gloo and make the runner's model wrapper fit for a CPU.

    Call it before the runner is built; the runner leaves an initialised process group alone. Does
    nothing without a launcher or with a GPU.

    Raises:
        RuntimeError: the launcher's environment variables are not there.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or get_device() != 'cpu':
        return
    _export_ranks(launcher)
    if not torch_dist.is_initialized():
        torch_dist.init_process_group(backend='gloo')
    cfg.model_wrapper_cfg = {
        'type': 'MMDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **(cfg.get('model_wrapper_cfg') or {}),
        'device_ids': None,  # the runner's default is a GPU number
    }


def end_processes() -> None:
    """Leave the process group, if there is one; torch warns about one left open at exit."""
    if torch_dist.is_available() and torch_dist.is_initialized():
        gc.collect()  # runner and model refer to each other; a DDP model freed after its group can hang
        torch_dist.destroy_process_group()


def explain_lost_process(error: RuntimeError) -> str | None:
    """What to say where another process of the run has ended; None for any other error.

    That process has said why. The traceback here would show the operation that waited for it.
    """
    if not any(words in str(error) for words in _LOST) or not os.environ.get('RANK'):
        return None
    return (
        f'process {os.environ["RANK"]} cannot go on: another process of this run has ended. Its own error says why; '
        'one that was killed, as for want of memory, leaves none'
    )


def _export_ranks(launcher: str) -> None:
    """Write what torch.distributed reads, from what the launcher wrote."""
    missing = [name for name in _LAUNCHER_ENV[launcher] if name not in os.environ]
    if missing:
        raise RuntimeError(
            f'--launcher {launcher} expects the environment variable(s) {", ".join(missing)}; '
            f'{_STARTED_BY.get(launcher, "")}start the processes so: {several("train", "CONFIG")} or '
            f'{several("test", "CONFIG CKPT")}'
        )
    for name, source in zip(_LAUNCHER_ENV['pytorch'], _LAUNCHER_ENV[launcher]):
        os.environ[name] = os.environ[source]
    os.environ.setdefault('MASTER_PORT', '29500')
    os.environ.setdefault('MASTER_ADDR', _first_node())


def _first_node() -> str:
    nodes = os.environ.get('SLURM_NODELIST')
    if nodes is None:
        return '127.0.0.1'
    command = ['scontrol', 'show', 'hostnames', nodes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on a CPU: bfloat16 autocast, which needs no loss scaling.

    The counterpart of mmengine's ``AmpOptimWrapper``, which runs on accelerators only.

    Args:
        kwargs: as for :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass under autocast."""
        with super().optim_context(model), autocast(device_type='cpu', dtype=torch.bfloat16):
            yield
