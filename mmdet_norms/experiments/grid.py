"""A grid of trainings: each cell is a process of ``train`` with a work dir of its own.

Whatever stops the grid, the same call goes on with it: finished cells are kept, one that was killed resumes from its
newest checkpoint, one that failed is tried again.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config

from ..engine.results import read_json, write_json
from ..engine.work_dir import FINISHED, RESULTS, claimed, require_unclaimed
from ..errors import UserError

CELL, LOG = 'cell.json', 'output.txt'
"""In the folder of a cell: what it is, and everything that its process printed."""

TRAIN = (sys.executable, '-m', 'mmdet_norms', 'train')

_LOCK = '.grid'
_POLL, _GRACE = 0.2, 20  # seconds between two looks; that a process has to end by itself
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        name: of its folder below that of the grid.
        config: as ``train`` takes it.
        options: further arguments of ``train``, such as ``('--seed', '0')``.
        labels: what the cell is in tables and figures, such as ``dict(norm='BN', seed=0)``; not looked at here.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    labels: dict = field(default_factory=dict, compare=False)


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
) -> list[Outcome]:
    """Train the cells that are not finished, ``jobs`` at a time. One that fails does not keep the others from going on.

    Args:
        cells: what to train.
        folder: of the grid. One call at a time may work in it.
        jobs: processes at a time.
        more: arguments of ``train`` that change no result, such as ``('--threads', '1')``.
        on_end: told each outcome when it is there; those of finished cells first.
        read: how ``train`` finds a config.

    Returns:
        The outcomes in the order of the cells.

    Raises:
        UserError: another call works in the folder, or a cell's folder holds another training; before any starts.
    """
    folder = Path(folder)
    with claimed(folder, _LOCK), _ended_by_signals():
        descriptions = _descriptions(cells, read)
        for cell in cells:
            _require_same(folder / cell.name, descriptions[cell.name])
        outcomes = {cell.name: Outcome(cell, result) for cell in cells if (result := finished(folder / cell.name))}
        for outcome in outcomes.values():
            on_end(outcome)
        waiting = deque(cell for cell in cells if cell.name not in outcomes)
        with _Processes(folder, descriptions, more) as processes:
            while waiting or processes.running:
                _start_some(waiting, processes, jobs)
                time.sleep(_POLL)
                for outcome in processes.ended():
                    outcomes[outcome.cell.name] = outcome
                    on_end(outcome)
    return [outcomes[cell.name] for cell in cells]


def finished(folder: str | os.PathLike) -> dict | None:
    """The results of a cell that was trained to its end; None otherwise."""
    folder = Path(folder)
    return (read_json(folder / RESULTS) or None) if (folder / FINISHED).is_file() else None


def _start_some(waiting: deque[Cell], processes: '_Processes', jobs: int) -> None:
    """Start what there is room for. A cell that a process of a killed grid still trains goes to the end of the line."""
    for _ in range(len(waiting)):
        if len(processes.running) >= jobs:
            return
        cell = waiting.popleft()
        if processes.is_free(cell):
            processes.start(cell)
        else:
            waiting.append(cell)


class _Processes:
    """The trainings that are running; leaving the context ends them."""

    def __init__(self, folder: Path, descriptions: dict[str, dict], more: Sequence[str]) -> None:
        self.folder, self.descriptions, self.more = folder, descriptions, tuple(more)
        self.running: dict[str, tuple[Cell, subprocess.Popen, float]] = {}

    def __enter__(self) -> '_Processes':
        return self

    def __exit__(self, *_) -> None:
        for _, process, _ in self.running.values():
            process.terminate()
        end = time.monotonic() + _GRACE
        for _, process, _ in self.running.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def is_free(self, cell: Cell) -> bool:
        try:
            require_unclaimed(self.folder / cell.name)
        except UserError:
            return False
        return True

    def start(self, cell: Cell) -> None:
        folder = self.folder / cell.name
        write_json(folder / CELL, self.descriptions[cell.name])
        arguments = [cell.config, '--work-dir', str(folder), '--resume', *cell.options, *self.more]
        paths = [str(_ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
        with open(folder / LOG, 'ab') as log:
            process = subprocess.Popen(
                [*TRAIN, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'PYTHONUNBUFFERED': '1'},
            )
        self.running[cell.name] = cell, process, time.monotonic()

    def ended(self) -> Iterator[Outcome]:
        for name, (cell, process, start) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                result = finished(self.folder / name) if process.returncode == 0 else None
                error = None if result else _why(process.returncode, self.folder / name / LOG)
                yield Outcome(cell, result, error, time.monotonic() - start)


def _why(status: int, log: Path) -> str:
    """Of a failed process: the signal that ended it, or the last line that it printed."""
    if status < 0:
        return f'ended by {signal.Signals(-status).name}'
    with suppress(OSError):
        lines = log.read_bytes()[-(1 << 16) :].decode('utf-8', 'replace').splitlines()
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return said[-1]
    return f'ended with status {status}'


def _descriptions(cells: Sequence[Cell], read: Callable[[str], Config]) -> dict[str, dict]:
    """What the results of each cell depend on, for its folder. A config by its content: results of two are no table."""
    digests = {}
    for config in dict.fromkeys(cell.config for cell in cells):
        content = json.dumps(read(config).to_dict(), sort_keys=True, default=repr)
        digests[config] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return {
        cell.name: dict(config=cell.config, content=digests[cell.config], options=list(cell.options)) for cell in cells
    }


def _require_same(folder: Path, description: dict) -> None:
    found = read_json(folder / CELL)
    for key, value in description.items() if found else ():
        if key != 'config' and found.get(key) != value:
            what = f'another content of {description["config"]}' if key == 'content' else f'{found.get(key)}'
            raise UserError(
                f'{folder} holds a training with {what}, which does not belong in a table with '
                f'{"that of now" if key == "content" else value}: choose another --out, or delete that folder'
            )


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
