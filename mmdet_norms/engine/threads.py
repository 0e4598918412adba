"""How many threads torch computes with on a CPU: as many as there are cores that nobody else keeps busy.

Threads wait for the slowest of them. Beside one busy core of two, a training step of the demo takes three times longer
with two threads than with one, and where nothing else runs, a fifth less (docs/performance.md).
"""

import math
import os
import re
from dataclasses import dataclass, replace

import torch
from mmengine.device import get_device

from .. import cores

_VARIABLES = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')
_MEASURED = 'MMDET_NORMS_THREADS_MEASURED'
"""Set by ``tools/launch.sh``, which has measured what it writes into OMP_NUM_THREADS; nobody has asked for it."""
_WORKERS_PER_CORE = 4  # a worker of a data loader is busy for 2 to 6 percent of the time that a step takes on a CPU


@dataclass(frozen=True)
class Choice:
    """A number of threads.

    Args:
        number: of them.
        by: the option or variable with which the user has said so; None if it was chosen.
        why: what the choice was made from.
        processes: of this run on this machine.
    """

    number: int
    by: str | None
    why: str
    processes: int = 1

    def __str__(self) -> str:
        return f'CPU threads: {self.number} ({self.why})'


_chosen: Choice | None = None


def use_threads(
    asked: int | None = None, workers: int = 0, processes: int = 1, device: str | None = None
) -> Choice | None:
    """Let torch compute with a number of threads: what the user says, else what the machine has free.

    Args:
        asked: by ``--threads``, which goes before OMP_NUM_THREADS and MKL_NUM_THREADS.
        workers: of the data loader. Up to four of them count as one busy core.
        processes: of this run on this machine, which share its cores.
        device: where the model is; default: mmengine's choice.

    Returns:
        The :class:`Choice`; None on a GPU, where nothing changes.
    """
    if torch.device(device or get_device()).type != 'cpu':
        return None
    global _chosen
    _chosen = replace(_choose(asked, workers, processes), processes=processes)
    if _chosen.number != torch.get_num_threads():
        torch.set_num_threads(_chosen.number)
    return _chosen


def fixed_by() -> str | None:
    """The variable with which the user has said how many threads; None if nobody has."""
    if os.environ.get(_MEASURED) == '1':
        return None
    # what is no number, or 0, the libraries leave unheeded
    return next((name for name in _VARIABLES if re.match(r'\s*0*[1-9]', os.environ.get(name, ''))), None)


def _choose(asked: int | None, workers: int, processes: int) -> Choice:
    if asked is not None:
        return Choice(asked, '--threads', '--threads')
    variable, now = fixed_by(), torch.get_num_threads()
    if variable is not None:
        return Choice(now, variable, variable)
    reserved = math.ceil(workers / _WORKERS_PER_CORE)
    for_loader = f'; {reserved} left to {workers} worker{"s" * (workers > 1)} of the data loader' if reserved else ''
    hint = '; --threads N or OMP_NUM_THREADS=N says otherwise'
    if processes > 1:  # which are all starting: what they do says nothing about others
        share = now if os.environ.get(_MEASURED) == '1' else cores.threads_for(cores.Load(_cores(), None), processes)
        number = max(1, min(now, share) - reserved)
        return Choice(number, None, f'{_cores():g} cores, shared by {processes} processes{for_loader}{hint}')
    load = cores.load_since_begin()
    number = max(1, min(now, cores.threads_for(load) - reserved))
    busy = 'how busy they are is not known' if load.others is None else f'{load.others:.1f} of them busy with others'
    return Choice(number, None, f'{load.cores:g} cores, {busy}{for_loader}{hint}')


def _cores() -> float:
    return min(len(cores.allowed()), cores.quota() or math.inf)


def take_threads(number: int) -> str | None:
    """Compute with as many threads as a run that was stopped; with another number, last bits of sums are others.

    Returns:
        None if it is so now; else what is in the way: the user wants another number, or there are not so many cores.
    """
    now = torch.get_num_threads()
    if number == now:
        return None
    told = f'it was computed with {number} CPU thread{"s" * (number > 1)}, and this run has {now}'
    by, processes = (fixed_by(), 1) if _chosen is None else (_chosen.by, _chosen.processes)
    if by is not None:
        return f'{told} ({by})'
    if number * processes > math.ceil(_cores()):
        return f'{told}, as there are {_cores():g} cores for {processes} process{"es" * (processes > 1)}'
    torch.set_num_threads(number)
    return None
