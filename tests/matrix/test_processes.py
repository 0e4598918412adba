"""The norms in other processes: resumed there, and in two that train together.

Run as a module, this file is the other process.
"""

import copy
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from helpers import warm

from .harness import ROOT, batch, build, gradients, loss_of, ready, same, sgd, state, train
from .norms import NORMS
from .situation import situation


def _start(job: str, folder: Path, *args) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    command = [sys.executable, '-m', 'matrix.test_processes', job, folder, *args]
    return warm.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finish(*processes) -> None:
    try:
        errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()  # nothing, where it has ended
    for process, error in zip(processes, errors):
        assert process.returncode == 0, error


@functools.cache
def _in_other_processes() -> dict:
    """All norms at once, since starting a process takes far longer than a cell: {job: {norm: error or None}}."""
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), {}
        for norm in NORMS:
            module = build(norm)
            optimizer = sgd(module)
            train(module, range(4), optimizer)
            torch.save(dict(model=module.state_dict(), optimizer=optimizer.state_dict()), folder / f'{norm}.pth')
            train(module, range(4, 8), optimizer)
            expected[norm] = state(module)
        torch.save(expected, folder / 'expected.pt')
        try:
            _finish(_start('resume', folder), *(_start('ddp', folder, rank) for rank in (0, 1)))
        except Exception as error:  # returned, so that each further cell does not try again
            return {job: dict.fromkeys(NORMS, f'{type(error).__name__}: {error}') for job in ('resume', 'ddp')}
        results = {job: torch.load(folder / f'{job}.pt') for job in ('resume', 'ddp-0', 'ddp-1')}
    return dict(resume=results['resume'], ddp={n: results['ddp-0'][n] or results['ddp-1'][n] for n in NORMS})


def _outcome(job, norm):
    error = _in_other_processes()[job][norm]
    assert error is None, error


@situation('resume in a new process, bit for bit')
def test_resume_in_new_process(norm):
    _outcome('resume', norm)


DISTRIBUTED = 'DDP, two gloo processes: gradients are averaged, statistics local'


@situation(DISTRIBUTED)
def test_distributed(norm):
    _outcome('ddp', norm)


def _resume_here(norm, folder):
    saved = torch.load(folder / f'{norm}.pth', weights_only=True)
    module = build(norm, seed=1)
    module.load_state_dict(saved['model'], strict=True)
    optimizer = sgd(module)
    optimizer.load_state_dict(saved['optimizer'])
    train(module, range(4, 8), optimizer)
    same(torch.load(folder / 'expected.pt', weights_only=True)[norm], state(module))


def _distribute_here(norm, rank):
    """One step of DDP against the same two steps made alone; the synchronized norm against BN on both batches."""
    # SyncBN shares BN's state; warmed up alone, so that the processes start equal
    module = ready('BN' if norm == 'SyncBN' else norm)
    alone = [copy.deepcopy(module) for _ in range(2)]
    if norm == 'SyncBN':
        synced = build(norm)
        synced.load_state_dict(module.state_dict(), strict=True)
        module = synced
        y = alone[0](torch.cat([batch(8), batch(9)]))
        (loss_of(y[:2]) + loss_of(y[2:])).div(2).backward()
        expected = {key: p.grad for key, p in alone[0].named_parameters()}
        expected_state = state(alone[0])
    else:
        steps = [gradients(twin, batch(8 + i)) for i, twin in enumerate(alone)]
        expected = {key: (steps[0][key] + steps[1][key]) / 2 for key in dict(module.named_parameters())}
        expected_state = state(alone[rank])
    wrapped = DistributedDataParallel(module, broadcast_buffers=False)
    loss_of(wrapped(batch(8 + rank))).backward()
    same({key: p.grad for key, p in module.named_parameters()}, expected, rtol=1e-4, atol=1e-6)
    same(state(module), expected_state, rtol=1e-5, atol=1e-6)
    if norm not in ('SyncBN', 'IN'):  # the statistics of all are another function, torch's IN refuses empty batches
        _one_gets_nothing(wrapped, alone, rank)


def _one_gets_nothing(wrapped, alone, rank):
    xs = batch(8), torch.zeros(0, 4, 6, 6)
    steps = [gradients(twin, x) for twin, x in zip(alone, xs)]
    ours = gradients(wrapped.module, xs[rank], wrapped)
    names = dict(wrapped.module.named_parameters())
    same({k: ours[k] for k in names}, {k: (steps[0][k] + steps[1][k]) / 2 for k in names}, rtol=1e-4, atol=1e-6)
    same(state(wrapped.module), state(alone[rank]), rtol=1e-5, atol=1e-6)


def _main(job, folder, rank='0'):
    torch.set_num_threads(1)
    folder, results = Path(folder), {}
    if job == 'ddp':
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/rendezvous', rank=int(rank), world_size=2
        )
        job = f'ddp-{rank}'
    for norm in NORMS:
        try:
            _resume_here(norm, folder) if job == 'resume' else _distribute_here(norm, int(rank))
            results[norm] = None
        except Exception as error:  # one cell's failure must not take the other norms along
            results[norm] = f'{type(error).__name__}: {error}'
    torch.save(results, folder / f'{job}.pt')
    if job != 'resume':
        torch.distributed.barrier()
        os._exit(0)  # freeing a DDP model and its gloo group at exit sometimes aborts


if __name__ == '__main__':
    _main(*sys.argv[1:])
