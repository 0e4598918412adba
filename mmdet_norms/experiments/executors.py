"""Where the trainings of a grid run: processes of it, or jobs of submitit, here or under Slurm."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from mmdet_norms_start.requirements import optional

from ..engine.results import read_json, write_json
from ..engine.work_dir import require_unclaimed
from ..errors import UserError, did_you_mean

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

LOG = 'output.txt'
"""In the folder of a cell: everything that its process printed."""

JOB = 'job.json'
"""There, too: the job of submitit that trains it."""

PROCESS, LOCAL, SLURM = 'process', 'local', 'slurm'

_GRACE = 20  # seconds that a process has to end by itself
_GRACE_OF_OTHERS = 6  # of those that it has begun: a loader's worker looks every five whether it is there
_YOUNG = 60  # seconds in which a job that was started here has opened its log
_SUBMITIT = 'submitit'  # folder with its files, in that of the cell


class Job(Protocol):
    """A training that was started."""

    def status(self) -> int | str | None:
        """None while it is running; then the status that it ended with (negative: by a signal), or why in words."""


class Executor(Protocol):
    """Where trainings run."""

    outlives: bool
    """Whether they go on when the process of the grid ends."""

    def is_free(self, folder: Path) -> bool:
        """Whether nobody trains in a folder, or is going to, such as a job of a grid that was killed."""

    def start(self, folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> Job:
        """Run a command that trains there.

        Raises:
            OSError, UserError: it cannot be started; others may be.
        """

    def stop(self, jobs: Iterable[Job]) -> None:
        """End trainings, unless they outlive the grid."""


class Gpus:
    """Which GPUs of this machine a training gets, of those that are to run at a time.

    Args:
        number: for each training; 0: none; None: nothing is decided here.
        jobs: trainings at a time.
    """

    def __init__(self, number: int | None = None, jobs: int = 1) -> None:
        self.number, self.visible = number, _visible_gpus() if number or jobs > 1 else []
        if number and self.visible and number > len(self.visible):
            raise UserError(f'--gpus {number}: this machine has {len(self.visible)}')
        self._in_use: dict[int, int] = {}
        self._decides = number == 0 or (bool(self.visible) and (jobs > 1 or number not in (None, 1)))

    def take(self) -> list[str] | None:
        """The least used ones; None: those that this process has."""
        if not self._decides:
            return None
        order = sorted(range(len(self.visible)), key=lambda i: self._in_use.get(i, 0))
        taken = sorted(order[: 1 if self.number is None else self.number])
        for i in taken:
            self._in_use[i] = self._in_use.get(i, 0) + 1
        return [self.visible[i] for i in taken]

    def give_back(self, names: list[str] | None) -> None:
        """They are free again."""
        for name in names or ():
            self._in_use[self.visible.index(name)] -= 1


class Processes:
    """Child processes of this one. They hold a lock on their log, by which the next grid knows that they live."""

    outlives = False

    def __init__(self, gpus: Gpus | None = None) -> None:
        self.gpus = gpus or Gpus()

    def is_free(self, folder: Path) -> bool:
        """See :class:`Executor`."""
        return _is_free(folder)

    def start(self, folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> 'Process':
        """See :class:`Executor`."""
        with ExitStack() as on_error, open(folder / LOG, 'ab') as log:
            gpus = self.gpus.take()
            on_error.callback(self.gpus.give_back, gpus)
            visible = {} if gpus is None else {'CUDA_VISIBLE_DEVICES': ','.join(gpus)}
            if fcntl is not None:
                with suppress(OSError):  # not every disk has locks
                    # it belongs to the open file, so the child has it, and its workers
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            popen = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, **visible},
            )
            on_error.pop_all()
        return Process(popen, lambda: self.gpus.give_back(gpus))

    def stop(self, jobs: Iterable['Process']) -> None:
        """See :class:`Executor`."""
        processes = [job.popen for job in jobs]
        _end(processes, lambda: [process.terminate() for process in processes])


class Process:
    """Of :class:`Processes`."""

    def __init__(self, popen: subprocess.Popen, when_ended) -> None:
        self.popen, self._when_ended = popen, when_ended

    def status(self) -> int | None:
        """See :class:`Job`."""
        status = self.popen.poll()
        if status is not None:
            self._when_ended()
        return status


class Submitit:
    """Jobs of submitit: processes of this machine that go through it, or jobs of Slurm.

    A job of Slurm that is preempted or comes to the end of its time is queued again, and goes on from its checkpoint.

    Args:
        cluster: :data:`LOCAL` or :data:`SLURM`.
        gpus: of each training; None is one under Slurm, as without it.
        jobs: trainings at a time, by which the GPUs of this machine are shared.
        parameters: of Slurm and submitit, such as ``dict(partition='gpu', timeout_min=600, cpus_per_task=8)``.
    """

    def __init__(
        self, cluster: str, gpus: int | None = None, jobs: int = 1, parameters: Mapping[str, Any] | None = None
    ) -> None:
        self.cluster, self.outlives = cluster, cluster == SLURM
        self.submitit = _submitit(cluster)
        self.gpus = Gpus(gpus, jobs) if cluster == LOCAL else None
        if cluster == LOCAL:
            self.parameters = dict(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
        else:
            self.parameters = dict(timeout_min=60 * 24, stderr_to_stdout=True)
            self.parameters.update(_of_slurm(self.submitit, parameters or {}))
            if gpus != 0:
                self.parameters['gpus_per_node'] = gpus or 1
            if self.submitit.SlurmExecutor.affinity() <= 0:
                raise UserError(f'--executor {SLURM}: there is no srun here; start it where jobs are submitted')

    def is_free(self, folder: Path) -> bool:
        """See :class:`Executor`."""
        known = read_json(folder / JOB)
        if known.get('executor') == SLURM:
            # as queued jobs, and those of other machines, hold no lock here
            job = self.submitit.SlurmJob(folder / _SUBMITIT, str(known.get('job')))
            return job.done() and _is_free(folder)
        return _is_free(folder)

    def start(self, folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> 'SubmittedJob':
        """See :class:`Executor`."""
        with ExitStack() as on_error:
            gpus = self.gpus.take() if self.gpus else None
            if self.gpus:
                on_error.callback(self.gpus.give_back, gpus)
            here = {**environment}
            if self.cluster == LOCAL:  # submitit would hide all GPUs of which it knows nothing
                mine = os.environ.get('CUDA_VISIBLE_DEVICES') if gpus is None else ','.join(gpus)
                here['CUDA_VISIBLE_DEVICES'] = mine
            training = _training_class()(list(command), str((folder / LOG).resolve()), here, os.getcwd())
            job = self._submit(folder, training)
            on_error.callback(lambda: job.cancel())  # the next grid would not know of it
            write_json(folder / JOB, dict(executor=self.cluster, job=job.job_id, time=time.time()))
            on_error.pop_all()
        return SubmittedJob(job, lambda: self.gpus and self.gpus.give_back(gpus))

    def _submit(self, folder: Path, training: object) -> Any:
        try:
            executor = self.submitit.AutoExecutor(folder / _SUBMITIT, self.cluster, slurm_max_num_timeout=1000)
            executor.update_parameters(name=folder.name, **self.parameters)
            with _interruptible():
                return executor.submit(training)
        except OSError:
            raise
        except Exception as error:  # sbatch refuses, as beyond a limit of jobs: submitit has several types for that
            why = ' '.join(str(error).split()) or type(error).__name__
            raise UserError(f'could not be submitted: {why}') from error

    def stop(self, jobs: Iterable['SubmittedJob']) -> None:
        """See :class:`Executor`."""
        if self.cluster == LOCAL:
            jobs = [job.job for job in jobs]
            _end([job._process for job in jobs], lambda: [job.cancel() for job in jobs])


class SubmittedJob:
    """Of :class:`Submitit`."""

    def __init__(self, job: Any, when_ended) -> None:
        self.job, self._when_ended = job, when_ended

    def status(self) -> int | str | None:
        """See :class:`Job`."""
        if not self.job.done():
            return None
        self._when_ended()
        try:
            return self.job.result()
        except Exception:  # whatever became of the job, its log and that of submitit have more
            return f'job {self.job.job_id} ended without a result ({self.job.state}); see {self.job.paths.stdout}'


def make(
    name: str, gpus: int | None = None, jobs: int = 1, parameters: Mapping[str, Any] | None = None
) -> Processes | Submitit:
    """The executor of that name: :data:`PROCESS`, :data:`LOCAL` or :data:`SLURM`; see :class:`Submitit`."""
    return Processes(Gpus(gpus, jobs)) if name == PROCESS else Submitit(name, gpus, jobs, parameters)


def _training_class() -> type:
    """What a job does. A class of this function's own, so that the job takes it along instead of importing this file,
    and all that this file needs."""

    class Training:
        def __init__(self, command: list, log: str, environment: dict, folder: str) -> None:
            self.command, self.log, self.environment, self.folder = command, log, environment, folder

        def __call__(self) -> int:
            import os
            import signal
            import subprocess

            environment = {**os.environ, **self.environment}
            environment = {key: value for key, value in environment.items() if value is not None}
            with open(self.log, 'ab') as log:
                try:
                    import fcntl

                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (ImportError, OSError):
                    pass
                child = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=self.folder,
                    # with which Slurm says that the time is over: submitit queues the job again, it trains until then
                    preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
                )
            try:
                return child.wait()
            except BaseException:  # Ctrl-C, and the exit with which submitit queues the job again
                child.terminate()
                try:
                    child.wait(0.8)  # submitit waits for a second
                except subprocess.TimeoutExpired:
                    child.kill()
                raise

        def checkpoint(self) -> object:
            from submitit.helpers import DelayedSubmission

            return DelayedSubmission(self)

    return Training


def _is_free(folder: Path) -> bool:
    """Whether no training of this machine, or one that can be seen from it, is at work in a folder."""
    known = read_json(folder / JOB)
    if known.get('executor') == LOCAL and time.time() - known.get('time', 0) < _YOUNG and _lives(known.get('job')):
        return False
    if fcntl is not None and (folder / LOG).exists():
        with open(folder / LOG, 'rb') as log:
            try:
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # not every disk has locks
                pass
    try:
        require_unclaimed(folder)
    except UserError as error:
        return isinstance(error.__cause__, OSError)  # on a disk that is full: to begin there tells why it cannot
    return True


def _lives(pid: object) -> bool:
    try:
        os.kill(int(pid), 0)
    except (TypeError, ValueError, OSError):
        return False
    return True


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let processes that begin inside end by SIGINT, by which submitit cancels, also where a shell has it ignored."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(processes: Sequence[subprocess.Popen], tell: Callable[[], object]) -> None:
    """End processes, then those that they have begun: a loader's worker may hang without them, and holds the log.

    Args:
        tell: asks the processes to end.
    """
    begun = _begun_by(processes)
    tell()
    end = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            begun |= _begun_by([process])
            process.kill()
            process.wait()
    end = time.monotonic() + _GRACE_OF_OTHERS
    while left := [pid for pid, start in begun.items() if _start_of(pid) == start]:  # a number is used again
        if time.monotonic() > end:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def _begun_by(processes: Iterable[subprocess.Popen]) -> dict[int, str]:
    """Living processes that some have begun, and those of these, with their start times; none where is no /proc."""
    found: dict[int, str] = {}
    waiting = [process.pid for process in processes]
    while waiting:
        with suppress(OSError):  # one that has just gone
            for path in Path(f'/proc/{waiting.pop()}/task').glob('*/children'):
                children = [int(word) for word in path.read_text().split()]
                waiting += children
                found |= {child: start for child in children if (start := _start_of(child)) is not None}
    return found


def _start_of(pid: int) -> str | None:
    """When a process began, as the system counts; None if it is gone, or ended and nobody has asked how."""
    try:
        state, *rest = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        return None if state == 'Z' else rest[18]
    except (OSError, IndexError):
        return None


def _visible_gpus() -> list[str]:
    number, said = torch.cuda.device_count(), os.environ.get('CUDA_VISIBLE_DEVICES')
    return [name.strip() for name in said.split(',')][:number] if said else [str(i) for i in range(number)]


def _submitit(cluster: str) -> Any:
    try:
        return importlib.import_module('submitit')
    except ImportError as error:
        raise UserError(
            f'--executor {cluster} needs submitit, which is not installed: {sys.executable} -m pip install '
            f'{optional("slurm")}'
        ) from error


def _of_slurm(submitit: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """As submitit's AutoExecutor takes them: its own by their names, those of Slurm behind ``slurm_``."""
    own, slurm = submitit.AutoExecutor._typed_parameters(), submitit.SlurmExecutor._valid_parameters()
    found = {}
    for key, value in parameters.items():
        if key in ('nodes', 'tasks_per_node', 'gpus_per_node', 'ntasks_per_node', 'gpus_per_task', 'num_gpus'):
            raise UserError(f'--slurm {key}={value}: a training is one task on one node; --gpus N says how many GPUs')
        if key not in own and key not in slurm:
            known = sorted({*own, *slurm})
            raise UserError(
                f'--slurm {key}={value}: there is no {key}{did_you_mean(key, known)}; known are {", ".join(known)}'
            )
        if key in own and not isinstance(value, (int, float) if own[key] is float else own[key]):
            raise UserError(f'--slurm {key}={value}: must be a number')
        found[key if key in own else f'slurm_{key}'] = value
    return found
