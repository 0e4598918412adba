"""How many threads a run takes, who has the last word, and that a resumed run takes those of the stopped one."""

import logging

import pytest
import torch

from mmdet_norms import cores
from mmdet_norms.engine import rng, threads
from mmdet_norms.engine.dist import processes_here
from mmdet_norms.engine.threads import fixed_by, take_threads, use_threads


@pytest.fixture
def machine(monkeypatch):
    """A machine on which nobody has said anything about threads; torch's number is put back."""
    before = torch.get_num_threads()
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', threads._MEASURED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, '_chosen', None)

    def make(number, others, of_torch=None):
        monkeypatch.setattr(cores, 'allowed', lambda: frozenset(range(number)))
        monkeypatch.setattr(cores, 'quota', lambda: None)
        monkeypatch.setattr(cores, 'load_since_begin', lambda: cores.Load(float(number), others))
        torch.set_num_threads(of_torch or number)

    yield make
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    'number, others, workers, chosen',
    [(2, 0.0, 0, 2), (2, 1.0, 0, 1), (2, 0.0, 1, 1), (2, 2.0, 4, 1), (8, 0.1, 4, 7), (8, 2.0, 5, 4), (8, None, 0, 8)],
)
def test_it_takes_the_cores_that_neighbours_and_the_loader_leave(machine, number, others, workers, chosen):
    machine(number, others)
    choice = use_threads(workers=workers, device='cpu')
    assert torch.get_num_threads() == choice.number == chosen and choice.by is None
    line = str(choice)
    assert line.startswith(f'CPU threads: {chosen} ({number} cores') and '\n' not in line and '--threads' in line
    assert (f'{workers} worker' in line) == (workers > 0)


def test_it_takes_no_more_than_torch_would(machine):
    machine(16, 0.0, of_torch=8)  # cores that share an arithmetic unit
    assert use_threads(device='cpu').number == 8


def test_who_says_a_number_gets_it(machine, monkeypatch):
    machine(4, 3.0, of_torch=3)
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    assert str(use_threads(device='cpu')) == 'CPU threads: 3 (OMP_NUM_THREADS)' and torch.get_num_threads() == 3
    assert str(use_threads(5, device='cpu')) == 'CPU threads: 5 (--threads)' and torch.get_num_threads() == 5
    monkeypatch.delenv('OMP_NUM_THREADS')
    monkeypatch.setenv('MKL_NUM_THREADS', '3')
    assert use_threads(device='cpu').by == 'MKL_NUM_THREADS'


def test_nothing_changes_where_a_gpu_computes(machine):
    machine(4, 4.0)
    assert use_threads(1, device='cuda:0') is None and torch.get_num_threads() == 4


def test_processes_share_the_cores(machine, monkeypatch):
    machine(8, 7.0)  # they themselves, starting
    assert use_threads(processes=2, device='cpu').number == 4
    assert use_threads(processes=2, workers=2, device='cpu').number == 3
    assert use_threads(processes=64, device='cpu').number == 1
    torch.set_num_threads(3)
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    monkeypatch.setenv(threads._MEASURED, '1')  # tools/launch.sh has measured before it started them
    choice = use_threads(processes=2, device='cpu')
    assert choice.number == 3 and choice.by is None and 'shared by 2 processes' in str(choice)


@pytest.mark.parametrize(
    'launcher, variables, number',
    [
        ('none', {'LOCAL_WORLD_SIZE': '4'}, 1),
        ('pytorch', {'LOCAL_WORLD_SIZE': '4', 'WORLD_SIZE': '8'}, 4),
        ('pytorch', {'WORLD_SIZE': '2'}, 2),
        ('slurm', {'SLURM_NTASKS_PER_NODE': '8', 'SLURM_NTASKS': '16'}, 8),
        ('mpi', {'OMPI_COMM_WORLD_LOCAL_SIZE': '3'}, 3),
        ('mpi', {}, 1),
    ],
)
def test_the_launcher_knows_how_many_processes_are_here(monkeypatch, launcher, variables, number):
    for name in ('LOCAL_WORLD_SIZE', 'WORLD_SIZE', 'SLURM_NTASKS_PER_NODE', 'SLURM_NTASKS',
                 'OMPI_COMM_WORLD_LOCAL_SIZE', 'OMPI_COMM_WORLD_SIZE'):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes_here(launcher) == number


def test_a_number_of_a_checkpoint_is_taken_unless_the_user_or_the_machine_says_otherwise(machine, monkeypatch):
    machine(4, 0.0)
    assert take_threads(2) is None and torch.get_num_threads() == 2
    assert '16 CPU threads, and this run has 2, as there are 4 cores' in take_threads(16)
    use_threads(1, device='cpu')
    assert take_threads(3) == 'it was computed with 3 CPU threads, and this run has 1 (--threads)'
    use_threads(device='cpu', processes=2)
    assert take_threads(2) is None and take_threads(3) is not None  # each of two
    monkeypatch.setattr(threads, '_chosen', None)
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    assert fixed_by() == 'OMP_NUM_THREADS' and '(OMP_NUM_THREADS)' in take_threads(4) and torch.get_num_threads() == 2


class Stopped:
    """What the hook asks of a runner, before one is resumed."""

    _resume, optim_wrapper, param_schedulers, hooks = True, None, [], []

    def __init__(self):
        self.logger = logging.getLogger('test_threads')


def test_a_resumed_run_computes_with_as_many_threads_as_the_one_that_was_stopped(machine, monkeypatch, caplog):
    machine(4, 0.0)
    state = dict(rng=rng.pack(rng.random_state()), images={}, gradients={}, sizes={}, threads=3)
    monkeypatch.setattr(rng, 'get_device', lambda: 'cpu')
    hook = rng.RandomStateHook()
    caplog.set_level('INFO')
    hook.after_load_checkpoint(Stopped(), {rng.KEY: dict(version=1, processes=[state])})
    assert torch.get_num_threads() == 3 and not hook._differences
    assert 'CPU threads: 3, as in the run that was stopped' in caplog.text
    use_threads(2, device='cpu')
    hook.after_load_checkpoint(Stopped(), {rng.KEY: dict(version=1, processes=[state])})
    assert torch.get_num_threads() == 2 and '(--threads)' in hook._differences[0]  # the log says so
    monkeypatch.setattr(rng, 'get_device', lambda: 'cuda')
    hook.after_load_checkpoint(Stopped(), {rng.KEY: dict(version=1, processes=[state])})
    assert torch.get_num_threads() == 2 and not hook._differences
    monkeypatch.setattr(rng, 'get_device', lambda: 'cpu')
    for earlier in ([dict(state, threads='many')], [{k: v for k, v in state.items() if k != 'threads'}], [state] * 2):
        hook.after_load_checkpoint(Stopped(), {rng.KEY: dict(version=1, processes=earlier)})
        assert torch.get_num_threads() == 2 and not hook._differences


@pytest.mark.parametrize(
    'value, counts', [('2', True), (' 3', True), ('4,2', True), ('0', False), ('all', False), ('', False)]
)
def test_what_is_no_number_of_threads_says_nothing(monkeypatch, value, counts):
    monkeypatch.setenv('OMP_NUM_THREADS', value)
    assert fixed_by() == ('OMP_NUM_THREADS' if counts else None)
