"""How far a grid of trainings is: a bar for each on a terminal, a line for each elsewhere."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, Progress

from ..console import as_text, plain_column, plain_console
from .executors import LOG
from .grid import Cell, Outcome

_ETA = re.compile(r'\beta: (?:(\d+) days?, )?(\d+):(\d\d):(\d\d)')
_TAIL = 4096  # bytes of a log, in which mmengine's latest line is
_LOOK = 2.0  # seconds between two looks at the logs


class GridProgress:
    """Told what a grid does, it says so, with the time that the rest will take. A context manager.

    Args:
        cells: all of the grid.
        folder: of the grid.
        jobs: trainings at a time.
        in_words: what is said of a training that has ended.
        console: where to; default: standard output.
        alike: trainings that take about the same time have the same of it.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        folder: str | Path,
        jobs: int,
        in_words: Callable[[Outcome], str],
        console: Console | None = None,
        alike: Callable[[Cell], object] = lambda cell: cell.labels.get('batch_size'),
    ) -> None:
        self.cells, self.folder, self.jobs = list(cells), Path(folder), jobs
        self.in_words, self.alike = in_words, alike
        self.console = console or plain_console()
        self.kept = 0
        self._ended: dict[str, float] = {}  # cell -> seconds; 0 of those that were there
        self._running: dict[str, float] = {}  # cell -> when it started
        self._tasks: dict[str, int] = {}
        self._looked = float('-inf')
        self._bars = Progress(
            plain_column('{task.description}'),
            BarColumn(),
            plain_column('{task.fields[said]}'),
            console=self.console,
            disable=not self.console.is_terminal,
            get_time=time.monotonic,
        )
        self._all = self._bars.add_task('all', total=len(self.cells), said='')

    def __enter__(self) -> 'GridProgress':
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def started(self, cell: Cell) -> None:
        """It is trained from now on, or still is."""
        if cell.name not in self._running:
            self._running[cell.name] = time.monotonic()
            self._tasks[cell.name] = self._bars.add_task(as_text(cell.name), total=None, said='starting')

    def ended(self, outcome: Outcome) -> None:
        """It has been trained, or that failed, or it was there."""
        name = outcome.cell.name
        began = self._running.pop(name, None)
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
        self._ended[name] = outcome.seconds
        self._bars.update(self._all, completed=len(self._ended))
        if outcome.error is None and not outcome.seconds and began is None:
            self.kept += 1
            return
        kept = f', {self.kept} of them kept' if self.kept else ''
        line = f'{len(self._ended)}/{len(self.cells)}{kept}: {name}: {self.in_words(outcome)} ({outcome.seconds:.0f} s)'
        left = self.left()
        line += f'; about {_span(left)} left' if left and len(self._ended) < len(self.cells) else ''
        self._bars.console.print(as_text(line), soft_wrap=True)

    def look(self) -> None:
        """Show how far the running ones are; call it often."""
        if self._bars.disable or time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        for name, task in self._tasks.items():
            eta = eta_of(self.folder / name / LOG)
            passed = time.monotonic() - self._running[name]
            if eta is not None:
                self._bars.update(task, total=passed + eta, completed=passed, said=f'{_span(eta)} left')
        left = self.left()
        said = '' if left is None else f', about {_span(left)} left'
        self._bars.update(self._all, said=f'{len(self._ended)} of {len(self.cells)}{said}')

    def left(self) -> float | None:
        """Seconds until all are trained, as far as can be told from those that were and those that are."""
        now = time.monotonic()
        etas = {name: eta_of(self.folder / name / LOG) for name in self._running}
        known: dict[object, list[float]] = {}
        for cell in self.cells:
            if self._ended.get(cell.name):
                known.setdefault(self.alike(cell), []).append(self._ended[cell.name])
            elif etas.get(cell.name) is not None:
                known.setdefault(self.alike(cell), []).append(now - self._running[cell.name] + etas[cell.name])
        everything = [seconds for group in known.values() for seconds in group]
        if not everything:
            return None
        total = 0.0
        for cell in self.cells:
            if cell.name in self._ended:
                continue
            left = mean(known.get(self.alike(cell), everything))
            if etas.get(cell.name) is not None:
                left = etas[cell.name]
            elif cell.name in self._running:
                left = max(0.0, left - (now - self._running[cell.name]))
            total += left
        return total / self.jobs


def eta_of(log: Path) -> float | None:
    """Seconds that a training has still to go, as its latest line says."""
    with suppress(OSError), open(log, 'rb') as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        found = _ETA.findall(file.read().decode('utf-8', 'replace'))
        if found:
            days, hours, minutes, seconds = (int(part or 0) for part in found[-1])
            return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
    return None


def _span(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
