"""A grid of trainings: each cell is a process of ``train`` with a work dir of its own.

Whatever stops the grid, the same call goes on with it: finished cells are kept, one that was killed resumes from its
newest checkpoint, one that failed is tried again.
"""

import functools
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config

from ..engine.results import read_json, write_json
from ..engine.work_dir import FINISHED, RESULTS, claimed
from ..errors import UserError
from ..files import explain
from .executors import LOG, Executor, Job, Processes

CELL = 'cell.json'
"""In the folder of a cell: what it is."""

TRAIN = (sys.executable, '-m', 'mmdet_norms', 'train')

_LOCK = '.grid'
_POLL = 0.2  # seconds between two looks
_TAIL = 1 << 16  # bytes of a log that are looked at
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        name: of its folder below that of the grid.
        config: as ``train`` takes it.
        options: further arguments of ``train``, such as ``('--seed', '0')``.
        labels: what the cell is in tables and figures, such as ``dict(norm='BN', seed=0)``; not looked at here.
        processes: of the training, one for each GPU.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    labels: dict = field(default_factory=dict, compare=False)
    processes: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        cell: which one.
        result: its results.json; None if it failed.
        error: the last line that a failed one printed.
        seconds: that its process ran in this call; 0 if it was finished before.
    """

    cell: Cell
    result: dict | None
    error: str | None = None
    seconds: float = 0.0


def run(
    cells: Sequence[Cell],
    folder: str | os.PathLike,
    jobs: int = 1,
    more: Sequence[str] = (),
    on_end: Callable[[Outcome], None] = lambda outcome: None,
    read: Callable[[str], Config] = Config.fromfile,
    on_start: Callable[[Cell], None] = lambda cell: None,
    on_look: Callable[[], None] = lambda: None,
    executor: Executor | None = None,
    data: Callable[[Cell], Mapping[str, str]] = lambda cell: {},
) -> list[Outcome]:
    """Train the cells that are not finished, ``jobs`` at a time. One that fails does not keep the others from going on.

    Args:
        cells: what to train.
        folder: of the grid. One call at a time may work in it.
        jobs: processes at a time.
        more: arguments of ``train`` that change no result, such as ``('--threads', '1')``.
        on_end: told each outcome when it is there; those of finished cells first.
        read: how ``train`` finds a config.
        on_start: told each cell that is trained from now on, or still.
        on_look: called again and again while there is nothing to do. Whatever the three are kept from writing (a disk
            that is full) stays unsaid, and the trainings go on.
        executor: where they are trained; default: in processes of this one.
        data: what a cell is trained with, as :func:`.data.fingerprint` gives it.

    Returns:
        The outcomes in the order of the cells.

    Raises:
        UserError: another call works in the folder, or a cell's folder holds another training, or data have been
            replaced since one in the folder was trained; before any starts.
    """
    folder, on_end, on_start, on_look = Path(folder), *map(_in_any_case, (on_end, on_start, on_look))
    on_wait = _in_any_case(functools.cache(_say_that_it_waits))
    with claimed(folder, _LOCK, '--out'), _ended_by_signals():
        descriptions = _descriptions(cells, read)
        for cell in cells:
            _require_same(folder / cell.name, descriptions[cell.name])
            descriptions[cell.name]['data'] = dict(data(cell))
        _require_same_data(folder, descriptions)
        outcomes = {cell.name: Outcome(cell, result) for cell in cells if (result := finished(folder / cell.name))}
        for outcome in outcomes.values():
            on_end(outcome)
        waiting = deque(cell for cell in cells if cell.name not in outcomes)
        with _Trainings(folder, descriptions, more, executor or Processes()) as trainings:
            while waiting or trainings.running:
                ended = [*_start_some(waiting, trainings, jobs, on_start, on_wait), *trainings.ended()]
                for outcome in ended:
                    outcomes[outcome.cell.name] = outcome
                    on_end(outcome)
                if not ended:
                    on_look()
                    time.sleep(_POLL)
    return [outcomes[cell.name] for cell in cells]


def finished(folder: str | os.PathLike) -> dict | None:
    """The results of a cell that was trained to its end; None otherwise."""
    folder = Path(folder)
    return (read_json(folder / RESULTS) or None) if (folder / FINISHED).is_file() else None


def _in_any_case(tell: Callable[..., None]) -> Callable[..., None]:
    """``tell``, in which an error of the disk ends no grid; a reader who has gone does."""

    def told(*what) -> None:
        try:
            tell(*what)
        except BrokenPipeError:
            raise
        except OSError:
            pass

    return told


def _say_that_it_waits(folder: Path) -> None:
    said = f'{folder.name}: waiting for a process of an earlier command that is still at work there'
    print(f'{said} (what it prints is in {folder / LOG})', file=sys.stderr)


def _start_some(
    waiting: deque[Cell],
    trainings: '_Trainings',
    jobs: int,
    on_start: Callable[[Cell], None],
    on_wait: Callable[[Path], None],
) -> Iterator[Outcome]:
    """Start what there is room for; tell what another grid has finished, and what could not be started.

    A cell that is still trained for a grid that was killed goes to the end of the line.
    """
    for _ in range(len(waiting)):
        if len(trainings.running) >= jobs:
            return
        cell = waiting.popleft()
        if not trainings.executor.is_free(trainings.folder / cell.name):
            on_wait(trainings.folder / cell.name)
            on_start(cell)
            waiting.append(cell)
        elif result := finished(trainings.folder / cell.name):
            yield Outcome(cell, result)
        else:
            on_start(cell)
            try:
                trainings.start(cell)
            except OSError as error:
                yield Outcome(cell, None, explain(error) or str(error))
            except UserError as error:  # of who does not take it, such as Slurm
                yield Outcome(cell, None, str(error))


class _Trainings:
    """Those that are running; leaving the context ends them, unless they are to outlive the grid."""

    def __init__(self, folder: Path, descriptions: dict[str, dict], more: Sequence[str], executor: Executor) -> None:
        self.folder, self.descriptions, self.more, self.executor = folder, descriptions, tuple(more), executor
        self.running: dict[str, tuple[Cell, Job, float, int]] = {}

    def __enter__(self) -> '_Trainings':
        return self

    def __exit__(self, *_) -> None:
        self.executor.stop([job for _, job, _, _ in self.running.values()])

    def start(self, cell: Cell) -> None:
        folder = self.folder / cell.name
        description = self.descriptions[cell.name]
        data = {**_learnt_from(folder), **description['data']}  # the earlier ones, where they cannot be read now
        write_json(folder / CELL, {**description, 'data': data})
        log = folder / LOG
        begin = log.stat().st_size if log.exists() else 0
        paths = [str(_ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
        environment = {'PYTHONPATH': os.pathsep.join(paths), 'PYTHONUNBUFFERED': '1'}
        job = self.executor.start(folder, command_of(cell, folder, self.more), environment)
        self.running[cell.name] = cell, job, time.monotonic(), begin

    def ended(self) -> Iterator[Outcome]:
        for name, (cell, job, start, begin) in list(self.running.items()):
            status = job.status()
            if status is not None:
                del self.running[name]
                result = finished(self.folder / name) if status == 0 else None
                error = None if result else _why(status, self.folder / name / LOG, begin)
                yield Outcome(cell, result, error, time.monotonic() - start)


def command_of(cell: Cell, folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The command that trains a cell in a folder, or goes on with it."""
    arguments = [cell.config, '--work-dir', str(folder), '--resume', *cell.options, *more]
    if cell.processes == 1:
        return [*TRAIN, *arguments]
    several = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(cell.processes)]
    return [TRAIN[0], *several, *TRAIN[1:], *arguments, '--launcher', 'pytorch']


def last_line(log: Path, begin: int = 0) -> str | None:
    """Of a log, from byte ``begin`` on: the last error that it tells of, else its last line.

    What torchrun prints when a process has failed comes after the error that says why.
    """
    with suppress(OSError), open(log, 'rb') as file:
        file.seek(max(begin, log.stat().st_size - _TAIL))
        lines = [line.strip() for line in file.read().decode('utf-8', 'replace').splitlines()]
        errors = [line for line in lines if _ERROR.match(line) and 'ChildFailedError' not in line]
        said = errors[-1:] or [line for line in lines if line][-1:]
        return re.sub(r'^\[rank\d+\]:\s*', '', said[0]) if said else None
    return None


_ERROR = re.compile(r'(\[rank\d+\]:\s*)?(error: |[A-Za-z_][\w.]*(Error|Exception|Interrupt)(: |$))')


def _why(status: int | str, log: Path, begin: int) -> str:
    """Of a failed training: the signal that ended it, or what it printed."""
    if isinstance(status, str):
        return status
    if status < 0:
        return f'ended by {signal.Signals(-status).name}'
    return last_line(log, begin) or f'ended with status {status}'


def _descriptions(cells: Sequence[Cell], read: Callable[[str], Config]) -> dict[str, dict]:
    """What the results of each cell depend on, for its folder. A config by its content: results of two are no table."""
    digests = {}
    for config in dict.fromkeys(cell.config for cell in cells):
        content = json.dumps(read(config).to_dict(), sort_keys=True, default=repr)
        digests[config] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return {
        cell.name: dict(
            config=cell.config, content=digests[cell.config], options=list(cell.options), labels=cell.labels
        )
        for cell in cells
    }


def _require_same(folder: Path, description: dict) -> None:
    found = read_json(folder / CELL)
    for key, value in description.items() if found else ():
        if key not in ('config', 'labels') and found.get(key) != value:
            what = f'another content of {description["config"]}' if key == 'content' else f'{found.get(key)}'
            raise UserError(
                f'{folder} holds a training with {what}, which does not belong in a table with '
                f'{"that of now" if key == "content" else value}: choose another --out, or delete that folder'
            )


def _require_same_data(folder: Path, descriptions: dict[str, dict]) -> None:
    """Of all trainings in the folder: those that are named now and the others come into one table."""
    now = defaultdict(set)
    for description in descriptions.values():
        for path, digest in description['data'].items():
            now[path].add(digest)
    for place in sorted(described.parent for described in folder.glob(f'*/{CELL}')):
        before, own = _learnt_from(place), descriptions.get(place.name, {}).get('data', {})
        there = {**now, **{path: {digest} for path, digest in own.items()}}
        what = [
            f'another content of {path} than' for path in before if before[path] not in there.get(path, {before[path]})
        ]
        what += [f'other data than {path}, which' for path in own if path not in before] if before else []
        if what:
            raise UserError(
                f'{place} was trained with {what[0]} there is now: that does not belong in one table. Choose another '
                '--out, delete that folder, or put the earlier data back'
            )


def _learnt_from(folder: Path) -> dict[str, str]:
    """The data that a training noted, if it has learnt of them; one that failed at once may go on with mended ones."""
    noted = read_json(folder / CELL).get('data')
    has_learnt = isinstance(noted, dict) and (finished(folder) or any(folder.glob('*.pth')))
    return noted if has_learnt else {}


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end the processes too, as Ctrl-C does. Those of a killed grid go on, and the next one waits."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
