"""Norm x batch size x seed: the cells of a comparison, and ``grid.json``, which says how far it has come."""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from ..console import as_text
from ..engine.results import COLUMNS, accuracies, coco_kinds, format_ap, read_json, write_json
from .executors import LOG
from .grid import Cell, Outcome, finished
from .runs import GRID, commands

WAITING, RUNNING, FINISHED, FAILED = 'waiting', 'running', 'finished', 'failed'

_LONGEST = 100  # characters of a folder's name


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        config: as ``train`` takes it.
        norms, batch_sizes, seeds: what is varied; batch sizes of all processes together.
        grid: key of the config -> values as typed, for what else is varied.
        budget: what is the same for all batch sizes, as ``train --budget`` has it.
        options: further arguments of ``train`` for every training, in front of ``--cfg-options``.
        cfg_options: ``KEY=VALUE`` for every training.
        processes: of each training.
        variants: more names beside the norms -> the norm that each is, and its own ``KEY=VALUE``.
    """

    config: str
    norms: Sequence[str]
    batch_sizes: Sequence[int]
    seeds: Sequence[int] = (0,)
    grid: Mapping[str, Sequence[str]] = field(default_factory=dict)
    budget: str = 'images'
    options: Sequence[str] = ()
    cfg_options: Sequence[str] = ()
    processes: int = 1
    variants: Mapping[str, tuple[str, Sequence[str]]] = field(default_factory=dict)

    def cells(self) -> Iterator[Cell]:
        """All norms of a batch size before the next one, all of a seed before the next one."""
        keys = list(self.grid)
        for seed in self.seeds:
            for values in itertools.product(*self.grid.values()):
                for batch in self.batch_sizes:
                    for norm in (*self.norms, *self.variants):
                        yield self._cell(norm, batch, seed, dict(zip(keys, values)))

    def _cell(self, name: str, batch: int, seed: int, chosen: dict[str, str]) -> Cell:
        norm, own = self.variants.get(name, (name, ()))
        options = [*self.cfg_options, *own, *(f'{key}={value}' for key, value in chosen.items())]
        return Cell(
            _name(name, batch, seed, chosen),
            self.config,
            (
                *('--norm', norm, '--batch-size', str(batch), '--budget', self.budget, '--seed', str(seed)),
                *self.options,
                *(('--cfg-options', *options) if options else ()),
            ),
            dict(norm=name, batch_size=batch, seed=seed, **chosen),
            self.processes,
        )


class Record:
    """``grid.json`` in the folder of a comparison, written anew whenever something changes.

    It describes the last command; ``commands`` and the cells are those of all.

    Args:
        folder: of the comparison.
        about: what it says beside the cells: command, date, machine, ...
        comparison: what is compared.
    """

    def __init__(self, folder: str | os.PathLike, about: Mapping[str, object], comparison: Comparison) -> None:
        self.path, self.cells = Path(folder) / GRID, list(comparison.cells())
        self._head = dict(
            about,
            config=comparison.config,
            norms=[*comparison.norms, *comparison.variants],
            batch_sizes=list(comparison.batch_sizes),
            seeds=list(comparison.seeds),
            grid={key: list(values) for key, values in comparison.grid.items()},
            budget=comparison.budget,
        )
        if comparison.variants:
            self._head['variants'] = {name: [norm, *own] for name, (norm, own) in comparison.variants.items()}
        earlier = read_json(self.path)
        said = commands(earlier)
        if about.get('command') not in [entry['command'] for entry in said]:
            said += commands(about)
        self._head['commands'] = said
        cells = earlier.get('cells')
        cells = cells if isinstance(cells, list) else []
        before = {cell['name']: cell for cell in cells if isinstance(cell, dict) and isinstance(cell.get('name'), str)}
        names = {cell.name for cell in self.cells}
        self._others = [entry for name, entry in before.items() if name not in names]
        for entry in self._others:
            if entry.get('status') == RUNNING:  # of a command that was killed
                entry['status'] = WAITING
        self._entries: dict[str, dict] = {}
        self._is_written = False
        for cell in self.cells:
            done = bool(finished(self.path.parent / cell.name))
            self._set(cell, FINISHED if done else WAITING)

    def started(self, cell: Cell) -> None:
        """It is trained now."""
        if self._entries[cell.name]['status'] != RUNNING:
            self._set(cell, RUNNING)
            self.write()

    def ended(self, outcome: Outcome) -> None:
        """It has been trained, or that failed."""
        self._set(outcome.cell, FINISHED if outcome.error is None else FAILED, outcome.error)
        self.write()

    def stopped(self) -> None:
        """Nothing is trained any more; unless nothing was, as where another command has the folder."""
        if not self._is_written:
            return
        for cell in self.cells:
            if self._entries[cell.name]['status'] == RUNNING:
                self._set(cell, WAITING)
        self.write()

    def write(self) -> None:
        """Cells of earlier commands in the same folder stay in it."""
        self._is_written = True
        write_json(self.path, dict(self._head, cells=[*self._entries.values(), *self._others]))

    def _set(self, cell: Cell, status: str, error: str | None = None) -> None:
        log = str(Path(cell.name) / LOG)
        self._entries[cell.name] = dict(name=cell.name, labels=cell.labels, status=status, error=error, log=log)


def table(outcomes: Sequence[Outcome]) -> Table:
    """The mean over the seeds, and how far they are apart, of what the trainings were evaluated by."""
    keys = [key for key in outcomes[0].cell.labels if key != 'seed'] if outcomes else []
    groups: dict[tuple, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(tuple(str(outcome.cell.labels[key]) for key in keys), []).append(outcome)
    columns = headline([outcome.result for outcome in outcomes if outcome.result])
    shown = Table(title='mean of the seeds, and their standard deviation', title_justify='left')
    for key in keys:
        shown.add_column(as_text({'batch_size': 'batch'}.get(key, key)))
    shown.add_column('seeds', justify='right')
    for column in columns:
        shown.add_column(as_text(column), justify='right', no_wrap=True)
    for labels, group in groups.items():
        there = [outcome.result for outcome in group if outcome.result]
        count = f'{len(there)} of {len(group)}' if len(there) < len(group) else str(len(group))
        values = [_mean([result[key] for result in there if result.get(key) is not None]) for key in columns.values()]
        shown.add_row(*map(as_text, labels), count, *values)
    return shown


def headline(results: Sequence[dict]) -> dict[str, str]:
    """What runs are judged by: name in a table -> key of ``results.json``."""
    for result in results:
        found = {f'{kind} {column}': f'{kind}_{key}' for kind in coco_kinds(result) for column, key in COLUMNS.items()}
        found = {name: key for name, key in found.items() if name.endswith((' AP', ' AP50'))}
        found |= accuracies(result)
        others = (key for key, value in result.items() if type(value) is float)
        found = found or {key: key for key in itertools.islice(others, 1)}
        if found:
            return found
    return {}


def in_words(outcome: Outcome) -> str:
    """What a line of progress says of a training that has ended."""
    if outcome.error is not None:
        return f'failed: {outcome.error}'
    columns = headline([outcome.result])
    shown = {name: key for name, key in columns.items() if name.endswith(' AP')} or columns
    values = ', '.join(f'{name} {format_ap(outcome.result[key])}' for name, key in itertools.islice(shown.items(), 2))
    return values or 'finished, without a result'


def _mean(values: Sequence[float]) -> str:
    if not values:
        return '-'
    return format_ap(mean(values)) + (f' ± {stdev(values):.3f}' if len(values) > 1 else '')


def _name(norm: str, batch: int, seed: int, chosen: Mapping[str, str]) -> str:
    """Of the folder: the same for the same cell, whatever else the comparison has."""
    last = [key.rpartition('.')[2] for key in chosen]
    keys = [key if last.count(short) > 1 else short for key, short in zip(chosen, last)]
    parts = [norm, f'b{batch}', *(f'{key}={value}' for key, value in zip(keys, chosen.values())), f's{seed}']
    whole = '-'.join(parts)
    name = re.sub(r'[^\w.=+-]+', '_', whole)
    if name == whole and len(name) <= _LONGEST:
        return name
    return f'{name[:_LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}'
