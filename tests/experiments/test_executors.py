"""Where trainings run: processes with their GPUs, and jobs of submitit that no second grid starts again."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.grids import cells, grid_of
from mmdet_norms import files
from mmdet_norms.errors import UserError
from mmdet_norms.experiments import executors, grid, run
from mmdet_norms.experiments.executors import JOB, LOCAL, LOG, SLURM, Gpus, Processes, Submitit

# In place of `train`: says which GPUs it sees, and when it ran.
TRAIN = """
import json, os, sys, time
from pathlib import Path
folder, seed = Path(sys.argv[sys.argv.index('--work-dir') + 1]), int(sys.argv[sys.argv.index('--seed') + 1])
begin = time.time()
print('hello', seed, flush=True)
if seed == 13:
    sys.exit('error: seed 13 is unlucky')
end = time.time() + (60 if seed == 60 else 3)
while time.time() < end and len(list(folder.parent.glob('*/began'))) < 2:
    (folder / 'began').touch()
    time.sleep(0.05)
if seed == 60:
    time.sleep(60)
(folder / 'results.json').write_text(json.dumps({'seed': seed, 'gpus': os.environ.get('CUDA_VISIBLE_DEVICES')}))
(folder / 'finished.json').write_text('{}')
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return grid_of(tmp_path, monkeypatch, TRAIN)


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(executors, '_visible_gpus', lambda: ['4', '5', '6', '7'])


# A loader's worker that hangs when its training has gone, as it does with a full queue.
HANGS = """
import signal, subprocess, sys, time
from pathlib import Path
begin = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'
child = subprocess.Popen([sys.executable, '-c', begin])
Path(sys.argv[1], 'child').write_text(str(child.pid))
time.sleep(600)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='needs /proc')
@pytest.mark.parametrize('kind', ['process', LOCAL])
def test_what_a_stopped_training_has_begun_ends_with_it(kind, tmp_path, monkeypatch):
    """It holds the log, and the next command would wait for it, for ever."""
    if kind == LOCAL:
        pytest.importorskip('submitit')
    monkeypatch.setattr(executors, '_GRACE_OF_OTHERS', 0.2)
    executor = executors.make(kind)
    job = executor.start(tmp_path, [sys.executable, '-c', HANGS, str(tmp_path)], {})
    end = time.monotonic() + 30
    while not (tmp_path / 'child').is_file() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    assert not executor.is_free(tmp_path)
    executor.stop([job])
    end = time.monotonic() + 5
    while not executor.is_free(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    assert executor.is_free(tmp_path)


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='needs /proc')
def test_nobody_waits_for_what_has_ended_and_was_not_asked_how():
    code = 'import subprocess, time; child = subprocess.Popen(["true"]); print(flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        end = time.monotonic() + 10
        while executors._begun_by([process]) and time.monotonic() < end:
            time.sleep(0.05)
        (children,) = Path(f'/proc/{process.pid}/task').glob('*/children')
        assert children.read_text().split() and executors._begun_by([process]) == {}
        process.kill()


def test_trainings_at_a_time_have_gpus_of_their_own(gpus):
    two = Gpus(2, jobs=2)
    first, second = two.take(), two.take()
    assert (first, second) == (['4', '5'], ['6', '7'])
    two.give_back(first)
    assert two.take() == ['4', '5']
    assert Gpus().take() is None and Gpus(1).take() is None  # as any process has them
    assert Gpus(0).take() == []
    more = Gpus(None, jobs=6)
    assert [more.take() for _ in range(6)] == [['4'], ['5'], ['6'], ['7'], ['4'], ['5']]
    with pytest.raises(UserError, match='--gpus 5: this machine has 4'):
        Gpus(5)


def test_jobs_of_submitit_run_at_once_as_processes_do(folder, gpus):
    outcomes = run(cells(folder, 1, 2, 13), folder, jobs=2, executor=Submitit(LOCAL, 1, jobs=2))
    assert [outcome.error for outcome in outcomes] == [None, None, 'error: seed 13 is unlucky']
    assert [(folder / f'seed{s}' / 'began').exists() for s in (1, 2)] == [True, True]  # each saw the other
    assert sorted(outcome.result['gpus'] for outcome in outcomes[:2]) == ['4', '5']
    assert 'hello 1' in (folder / 'seed1' / LOG).read_text()
    assert json.loads((folder / 'seed1' / JOB).read_text())['executor'] == LOCAL


def test_a_job_that_is_not_taken_fails_alone_and_keeps_no_gpu(folder, gpus, monkeypatch):
    """As beyond a limit of jobs: submitit's errors are no OSError."""
    executor = Submitit(LOCAL, 1, jobs=2)
    update = executor.submitit.AutoExecutor.update_parameters

    def refuse(self, name, **parameters):
        if name != 'seed3':
            raise RuntimeError('sbatch: error: QOSMaxSubmit\n  sbatch: error: failed')
        update(self, name=name, **parameters)

    monkeypatch.setattr(executor.submitit.AutoExecutor, 'update_parameters', refuse)
    outcomes = run(cells(folder, 1, 13, 3), folder, executor=executor)
    why = 'could not be submitted: sbatch: error: QOSMaxSubmit sbatch: error: failed'
    assert [outcome.error for outcome in outcomes] == [why, why, None]
    assert outcomes[2].result['gpus'] == '4' and executor.gpus.take() == ['4']


@pytest.mark.parametrize('make', [Processes, lambda gpus: Submitit(LOCAL, 1, jobs=2)])
def test_what_cannot_be_noted_keeps_no_gpu_and_no_job(tmp_path, make, gpus, monkeypatch):
    """As on a disk that is full."""
    began = []

    def fails(*_, **__):
        raise OSError('full')

    executor = make(Gpus(1, jobs=2))
    if isinstance(executor, Submitit):
        submit = executor.submitit.AutoExecutor.submit
        monkeypatch.setattr(
            executor.submitit.AutoExecutor, 'submit', lambda self, what: began.append(submit(self, what)) or began[0]
        )
        monkeypatch.setattr(executors, 'write_json', fails)
    else:
        monkeypatch.setattr(executors.subprocess, 'Popen', fails)
    with pytest.raises(OSError, match='full'):
        executor.start(tmp_path, [sys.executable, '-c', 'import time; time.sleep(60)'], {})
    assert executor.gpus.take() == ['4']
    for job in began:
        assert job._process.wait(30) is not None


def test_a_folder_that_cannot_be_written_to_is_not_taken_for_one_in_use(tmp_path, monkeypatch):
    (tmp_path / '.training').touch()
    monkeypatch.setattr(files.Path, 'write_bytes', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))
    assert Processes().is_free(tmp_path)


@pytest.fixture
def in_the_background():
    """As a shell starts what is not to hear of Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('make', [Processes, lambda: Submitit(LOCAL)])
def test_a_training_whose_grid_is_gone_is_nobody_elses(folder, make, in_the_background):
    executor, place = make(), folder / 'seed60'
    place.mkdir(parents=True)
    assert executor.is_free(place)
    job = executor.start(place, grid.command_of(cells(folder, 60)[0], place), {})
    try:
        assert not executor.is_free(place)  # at once
        end = time.monotonic() + 30
        while not (place / 'began').exists() and time.monotonic() < end:
            time.sleep(0.05)
        if (place / JOB).exists():  # also when it is no longer young
            known = json.loads((place / JOB).read_text())
            (place / JOB).write_text(json.dumps(dict(known, time=0)))
        assert not Processes().is_free(place) and job.status() is None
    finally:
        executor.stop([job])
    (place / JOB).unlink(missing_ok=True)
    end = time.monotonic() + 30  # of submitit's, the process that it watched ends a moment after it
    while not Processes().is_free(place):
        assert time.monotonic() < end
        time.sleep(0.05)


class Slurm:
    """In place of submitit: jobs whose states the test sets."""

    states: dict
    SlurmExecutor = SimpleNamespace(affinity=lambda: 2, _valid_parameters=lambda: {'partition', 'setup', 'nodelist'})

    def __init__(self):
        self.states, self.submitted, slurm = {}, [], self

        class AutoExecutor:
            _typed_parameters = staticmethod(lambda: dict(name=str, timeout_min=int, mem_gb=float, gpus_per_node=int))

            def __init__(self, folder, cluster, **options):
                assert cluster == SLURM

            def update_parameters(self, **parameters):
                self.parameters = parameters

            def submit(self, training):
                slurm.submitted.append((training, self.parameters))
                return slurm.SlurmJob(None, str(len(slurm.submitted)))

        class SlurmJob:
            def __init__(self, folder, job_id):
                self.job_id, self.paths = job_id, SimpleNamespace(stdout='out')

            @property
            def state(self):
                return slurm.states.get(self.job_id, 'PENDING')

            def done(self):
                return self.state not in ('PENDING', 'RUNNING')

            def result(self):
                if self.state != 'COMPLETED':
                    raise RuntimeError(self.state)
                return 0

        self.AutoExecutor, self.SlurmJob = AutoExecutor, SlurmJob


@pytest.fixture
def slurm(monkeypatch):
    found = Slurm()
    monkeypatch.setattr(executors, '_submitit', lambda cluster: found)
    return found


def test_a_job_that_is_queued_is_not_submitted_again(folder, slurm):
    """The grid that submitted it was killed; the next one waits for the job, and runs what it did not finish."""
    place = folder / 'seed1'
    place.mkdir(parents=True)
    executor = Submitit(SLURM, parameters=dict(partition='gpu', timeout_min=600))
    assert executor.is_free(place)
    executor.start(place, ['python'], {})
    _, parameters = slurm.submitted[0]
    assert parameters['slurm_partition'] == 'gpu' and parameters['timeout_min'] == 600
    assert parameters['gpus_per_node'] == 1 and parameters['name'] == 'seed1'
    again = Submitit(SLURM)
    assert not again.is_free(place)
    looks = []

    def look():
        looks.append(1)
        if len(looks) == 2:  # the job ends
            (place / 'results.json').write_text('{"x": 1}')
            (place / 'finished.json').write_text('{}')
            slurm.states['1'] = 'COMPLETED'

    outcomes = run(cells(folder, 1), folder, executor=again, on_look=look)
    assert outcomes[0].result == {'x': 1} and len(slurm.submitted) == 1


def test_a_job_that_slurm_ends_is_a_failure_with_its_state(folder, slurm):
    executor = Submitit(SLURM, gpus=0)
    slurm.states['1'] = 'OUT_OF_MEMORY'
    outcomes = run(cells(folder, 1), folder, executor=executor)
    assert outcomes[0].error == 'job 1 ended without a result (OUT_OF_MEMORY); see out'
    assert 'gpus_per_node' not in slurm.submitted[0][1]


def test_a_job_that_is_queued_again_goes_on_with_the_same_command(tmp_path):
    pytest.importorskip('submitit')
    training = executors._training_class()(
        [sys.executable, '-c', 'import os; print(os.environ["A"], os.getcwd())'],
        str(tmp_path / 'log'),
        {'A': 'b', 'CUDA_VISIBLE_DEVICES': None},
        str(tmp_path),
    )
    assert training() == 0 and (tmp_path / 'log').read_text() == f'b {os.path.realpath(tmp_path)}\n'
    assert training.checkpoint().function is training


@pytest.mark.parametrize(
    'parameters, said',
    [
        (dict(partitoin='gpu'), r"there is no partitoin \(did you mean 'partition'\?\); known are "),
        (dict(gpus_per_node=2), '--slurm gpus_per_node=2: .* --gpus N says how many'),
        (dict(timeout_min='1h'), '--slurm timeout_min=1h: must be a number'),
    ],
)
def test_wrong_parameters_are_one_error(slurm, parameters, said):
    with pytest.raises(UserError, match=said):
        Submitit(SLURM, parameters=parameters)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(UserError, match=r"--executor local needs submitit, .* -m pip install 'submitit"):
        Submitit(LOCAL)
