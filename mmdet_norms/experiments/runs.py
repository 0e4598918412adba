"""What there is to read of trainings: their work dirs, and nothing else."""

import ast
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from statistics import median

from ..engine.cost import COST
from ..engine.results import ORIGIN, describe, kept_results, read_json, read_json_lines
from ..engine.work_dir import FINISHED, RESULTS
from ..errors import UserError
from .grid import CELL, LOG

GRID = 'grid.json'
FINISHED_RUN, FAILED, UNFINISHED = 'finished', 'failed', 'unfinished'

_NO_METRIC = ('step', 'epoch', 'iter', 'time', 'data_time', 'memory', 'lr')  # in a line of scalars.json
SCALARS = 'scalars.json'
_SCALARS = f'*/vis_data/{SCALARS}'
_ANEW = re.compile(r'(?m)^resume = False$')
_PROCESSES = re.compile(r'GPU number: (\d+)')  # mmengine calls every process so
_HEAD = 1 << 16  # bytes of a log that hold it


@dataclass
class Run:
    """One training.

    Args:
        folder: its work dir, as it was found from what the caller named.
        labels: ``norm``, ``batch_size`` (of all processes), ``seed``, and what else tells it from others.
        status: :data:`FINISHED_RUN`, :data:`FAILED`, :data:`UNFINISHED`, or what the grid says of a cell.
        results: of its last validation (of a test, where there is no other): ``bbox_mAP``, ``accuracy/top1``, ...
        of: which evaluation that was, such as ``'val, epoch 12'``.
        curves: ``loss`` and each result -> (iteration, value), in order.
        cost: as in cost.json; of a run without it, what its log tells.
        iterations: that it was trained.
        config: the one that it was started with, as typed.
        cfg: what it came to; empty where the work dir has none.
        error: of one that failed.
        log: where to read more of that.
    """

    folder: str
    labels: dict
    status: str
    results: dict[str, float] = field(default_factory=dict)
    of: str = ''
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    cost: dict = field(default_factory=dict)
    iterations: int | None = None
    config: str = ''
    cfg: Mapping = field(default_factory=dict, repr=False)
    error: str | None = None
    log: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.status == FINISHED_RUN


def find(folders: Sequence[str | os.PathLike]) -> tuple[list[Run], list[dict]]:
    """The runs in the folders, each of which is a work dir or has some below it, and the grids that they belong to.

    Returns:
        The runs, once each, in the order of the folders; and what every grid.json says.

    Raises:
        UserError: a folder is none, or holds no run.
    """
    runs, grids, seen = [], [], set()
    for folder in dict.fromkeys(os.fspath(folder) for folder in folders):
        if not os.path.isdir(folder):
            what = 'is no folder' if os.path.exists(folder) else 'does not exist'
            raise UserError(f'{folder} {what}: name work dirs of train, or folders of work dirs')
        cells, below = _in_folder(Path(folder), grids)
        if not below and not cells:
            raise UserError(
                f'{folder} holds no run: neither it nor a folder below it has {RESULTS}, {CELL} or {_SCALARS}'
            )
        for path in [*cells, *(path for path in below if path not in cells)]:
            if os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                runs.append(read(path, cells.get(path)))
    _tell_apart(runs)
    return runs, grids


def commands(grid: Mapping) -> list[dict]:
    """What was typed to train a grid, each once in order: ``command``, and the ``date`` when it was first."""
    noted = grid.get('commands')
    noted = noted if isinstance(noted, list) else [grid]  # an earlier version kept the last one only
    noted = [entry for entry in noted if isinstance(entry, Mapping) and isinstance(entry.get('command'), str)]
    return [{key: entry[key] for key in ('command', 'date') if entry.get(key)} for entry in noted]


def is_report(results: Mapping) -> bool:
    """Whether a results.json is that of many runs, which ``compare report`` writes."""
    return isinstance(results.get('settings'), list)


def read(folder: str | os.PathLike, cell: Mapping | None = None) -> Run:
    """A work dir.

    Args:
        cell: what grid.json says of it.
    """
    folder, cell = Path(folder), cell or {}
    described = read_json(folder / CELL)
    parts = [part / SCALARS for part in parts_of(folder)]
    cfg = _config(folder)
    finished = read_json(folder / FINISHED)
    trained, validations = _logged(parts)
    results, of, damaged = _results(folder)
    end = finished.get('iter') or (results.get('iter') if results.get('split') == 'val' else None)
    curves = _curves(trained, validations, cfg, _per_epoch(finished, results), end)
    metrics = {key: float(value) for key, value in results.items() if key not in ORIGIN and _is_number(value)}
    if not metrics and not damaged:
        metrics, of = {key: points[-1][1] for key, points in curves.items() if key != 'loss'}, 'val'
    iterations = end or max(trained, default=None)
    status = FINISHED_RUN if finished or _came_to_its_end(cfg, validations, described) else UNFINISHED
    if status == UNFINISHED:
        status = cell.get('status') if cell.get('status') not in (None, FINISHED_RUN) else UNFINISHED
    error = cell.get('error') if status == FAILED else None
    if damaged:
        status, error = FAILED, damaged
    log = cell.get('log') or (str(folder / LOG) if (folder / LOG).is_file() else None)
    return Run(
        folder=str(folder),
        labels=_labels(folder, cfg, described.get('labels') or cell.get('labels') or {}),
        status=status,
        results=metrics,
        of=of if metrics else '',
        curves={key: points for key, points in curves.items() if points},
        cost=_cost(folder, trained, cfg),
        iterations=iterations,
        config=str(described.get('config') or results.get('config') or ''),
        cfg=cfg,
        error=error,
        log=str(log) if log and status == FAILED else None,
    )


def parts_of(folder: str | os.PathLike, *names: str) -> list[Path]:
    """The folders ``DATE/vis_data`` of a work dir's run, one for each start; not those of a run that was overwritten.

    Args:
        names: files that a training leaves there, beside scalars.json, which also a test may.
    """
    parts = sorted({path.parent for name in (SCALARS, *names) for path in Path(folder).glob(f'*/vis_data/{name}')})

    def begins(part: Path) -> bool:
        trained = any((part / name).is_file() for name in names) or _has_trained(part)
        return trained and bool(_ANEW.search(_text(part / 'config.py')))

    first = next((i for i in reversed(range(len(parts))) if begins(parts[i])), 0)
    return parts[first:]


def configs_of(folder: str | os.PathLike) -> list[Path]:
    """What each start of a run came to, as mmengine wrote it down: the newest training first, then other starts.

    A test that came later may have changed the config for itself.
    """
    written = sorted(Path(folder).glob('*/vis_data/config.py'), reverse=True)
    return list(dict.fromkeys([*(path for path in written if _has_trained(path.parent)), *written]))


def _has_trained(part: Path) -> bool:
    """Whether mmengine's log is one of a training, and not of a test."""
    try:
        with open(part / SCALARS, encoding='utf-8', errors='replace') as lines:
            return any('"loss"' in line for line in lines)
    except OSError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8', errors='replace')
    except OSError:
        return ''


def _in_folder(folder: Path, grids: list[dict]) -> tuple[dict[Path, dict], list[Path]]:
    """Cells that a grid.json in it or below names, with what it says of them; and folders that look like a run."""
    cells, found = {}, []
    for place, inside, files in os.walk(folder):
        inside.sort()
        place = Path(place)
        if GRID in files:
            grid = read_json(place / GRID)
            listed = grid.get('cells') if isinstance(grid.get('cells'), list) else []
            listed = [cell for cell in listed if isinstance(cell, dict) and cell.get('name')]
            for cell in listed:  # its log is named from there
                log = {'log': str(place / str(cell['log']))} if cell.get('log') else {}
                cells[place / str(cell['name'])] = {**cell, **log}
            if listed and grid not in grids:
                grids.append(grid)
        if _is_run(place, files):
            found.append(place)
            inside.clear()
        inside[:] = [name for name in inside if not name.startswith('.')]
    return cells, found


def _is_run(folder: Path, files: Sequence[str]) -> bool:
    if any(name in files for name in (FINISHED, CELL)) or any(folder.glob(_SCALARS)):
        return True
    return RESULTS in files and not is_report(read_json(folder / RESULTS))


def _config(folder: Path) -> Mapping:
    """What the last of its processes was started with: literals, of which none is run."""
    for path in configs_of(folder) or sorted(folder.glob('*.py')):
        try:
            statements = ast.parse(path.read_text(encoding='utf-8')).body
            return {node.targets[0].id: _value(node.value) for node in statements if isinstance(node, ast.Assign)}
        except (OSError, ValueError, SyntaxError, AttributeError, RecursionError):
            continue
    return {}


def _value(node: ast.expr) -> object:
    """Of a literal, or of ``dict(key=value)``.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict' and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(entry) for entry in node.elts]
    return ast.literal_eval(node)


def _logged(parts: Sequence[Path]) -> tuple[dict[int, dict], list[tuple[int, int, dict]]]:
    """Of mmengine's JSON log, the lines of training by iteration, and the validations.

    Of a resumed run, a later part wins. One that starts where the run did makes the earlier ones another run's.

    Returns:
        Iteration -> line; and (iteration of the last line before, the step it says, its results).
    """
    trained, validations = {}, []
    for part in parts:
        lines, checked, last = {}, [], max(trained, default=0)
        for line in read_json_lines(part):
            step = line.get('step')
            if not isinstance(step, int):
                continue
            if 'loss' in line:
                lines[step], last = line, step
                continue
            named = {key.removeprefix('coco/'): float(value) for key, value in line.items() if _is_result(key, value)}
            if named:
                checked.append((last, step, named))
        if lines and trained and min(lines) <= min(trained):
            trained, validations = {}, []
        if lines:
            validations = [entry for entry in validations if entry[0] < min(lines)]
            trained = {step: line for step, line in trained.items() if step < min(lines)}
        trained.update(lines)
        validations += checked
    return trained, validations


def _is_result(key: str, value: object) -> bool:
    return key not in _NO_METRIC and not key.startswith('lr') and _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)


def _results(folder: Path) -> tuple[dict, str, str | None]:
    """The last validation if one is there, else the test; which it is; and what is wrong with the file."""
    path = folder / RESULTS
    newest = read_json(path)
    if path.exists() and not newest:
        return {}, '', f'{path} cannot be read as JSON'
    known = [newest, *map(read_json, kept_results(folder))]
    validations = [result for result in known if result.get('split') == 'val']
    result = max(validations, key=lambda r: (r.get('iter') or 0, r.get('epoch') or 0), default=newest)
    return result, describe({key: value for key, value in result.items() if (key, value) != ('epoch', 0)}), None


def _per_epoch(finished: Mapping, results: Mapping) -> float | None:
    """Iterations of an epoch; None of a run that counts none."""
    for noted in (finished, results):
        if noted.get('epoch') and noted.get('iter'):
            return noted['iter'] / noted['epoch']
    return None


def _curves(trained: Mapping, validations: Sequence, cfg: Mapping, per_epoch: float | None, end: int | None) -> dict:
    """By iteration. Of a validation the log says the epoch, or nothing that helps."""
    loop = cfg.get('train_cfg') or {}
    every = loop.get('val_interval')
    by_iterations = not per_epoch and bool(loop.get('max_iters'))
    curves = {
        'loss': [(step, float(line['loss'])) for step, line in sorted(trained.items()) if _is_number(line['loss'])]
    }
    for last, step, results in validations:
        at = step if step > last else last
        if per_epoch and 0 < step <= last:
            at = round(step * per_epoch)
        elif by_iterations and isinstance(every, int) and 0 < every < 10**9:
            at = math.ceil(last / every) * every
        at = min(at, end) if end else at
        for key, value in results.items():
            points = curves.setdefault(key, [])
            if points and points[-1][0] >= at:
                points.pop()
            points.append((at, value))
    return curves


def _came_to_its_end(cfg: Mapping, validations: Sequence, described: Mapping) -> bool:
    """Of a run of mmdet's own tool, which does not note it: whether the last validation is that of the end."""
    if described or not validations:
        return False
    loop, (last, step, _) = cfg.get('train_cfg') or {}, validations[-1]
    epochs, iterations = loop.get('max_epochs'), loop.get('max_iters')
    return bool((epochs and step >= epochs) or (iterations and max(step, last) >= iterations))


def _labels(folder: Path, cfg: Mapping, given: Mapping) -> dict:
    found = dict(norm=None, batch_size=None, seed=None)
    if any(given.get(key) is None for key in found):
        size = read_json(folder / COST).get('batch_size')
        per_process = (cfg.get('train_dataloader') or {}).get('batch_size')
        found = dict(
            norm=norm_of(cfg.get('model') or {}) or 'unknown',
            batch_size=size or (per_process * _processes(folder) if isinstance(per_process, int) else None),
            seed=_seed(folder, cfg),
        )
    return {**found, **given}


def norm_of(model: Mapping) -> str:
    """The norms that a model names beside batch norm, as ``--norm`` calls them: ``'bnet5'``, ``'cbn+gn'``, ``'bn'``."""
    found: dict[str, None] = {}
    for norm_cfg in _norms(model):
        kind = str(norm_cfg.get('type', '')).rpartition('.')[2]
        kind = {'BatchNorm2d': 'BN', 'SyncBatchNorm': 'SyncBN', 'GroupNorm': 'GN', 'LayerNorm': 'LN'}.get(kind, kind)
        found[f'{kind.lower()}{norm_cfg.get("kernel_size", "")}' if kind == 'BNET' else kind.lower()] = None
    special = [name for name in found if name not in ('bn', 'ln', '')]
    return '+'.join(sorted(special) or (['bn'] if 'bn' in found else [name for name in found if name][:1]))


def _norms(part: object, inside: bool = False) -> Iterator[Mapping]:
    """Every norm_cfg below a part of a config; a norm_at has one for each position."""
    if isinstance(part, (list, tuple)):
        for entry in part:
            yield from _norms(entry, inside)
    elif isinstance(part, Mapping):
        if inside and 'type' in part:
            yield part
            return
        for key, value in part.items():
            yield from _norms(value, inside or key in ('norm_cfg', 'norm_at'))


def _seed(folder: Path, cfg: Mapping) -> int | None:
    """The one that was asked for, or the one that mmengine drew."""
    seed = (cfg.get('randomness') or {}).get('seed')
    return seed if seed is not None else _in_log(folder, re.compile(r'(?m)^\s+seed: (\d+)$'))


def _processes(folder: Path) -> int:
    return _in_log(folder, _PROCESSES) or 1


def _in_log(folder: Path, pattern: re.Pattern) -> int | None:
    for path in sorted(folder.glob('*/*.log')):
        try:
            with open(path, encoding='utf-8', errors='replace') as log:
                match = pattern.search(log.read(_HEAD))
        except OSError:
            continue
        if match:
            return int(match[1])
    return None


def _cost(folder: Path, trained: Mapping[int, dict], cfg: Mapping) -> dict:
    noted = read_json(folder / COST)
    if noted:
        return noted
    times = [line['time'] for step, line in sorted(trained.items()) if _is_number(line.get('time'))]
    memory = [line['memory'] for line in trained.values() if _is_number(line.get('memory'))]
    found = {}
    if times:
        found['seconds_per_iteration'] = median(times[1:] or times)
        size = (cfg.get('train_dataloader') or {}).get('batch_size')
        if isinstance(size, int) and found['seconds_per_iteration'] > 0:
            found['images_per_second'] = size * _processes(folder) / found['seconds_per_iteration']
    if memory:
        found.update(peak_memory_mb=max(memory), peak_memory_of='GPU')
    return found


def _tell_apart(runs: Sequence[Run]) -> None:
    """Where runs have the same labels, what else differs becomes one: the config, else the folder."""
    told = (('config', lambda run: Path(run.config).stem), ('run', lambda run: Path(run.folder).name))
    for key, value in (*told, ('run', lambda run: run.folder)):  # folders of two grids may have the same name
        same: dict[str, list[Run]] = {}
        for run in runs:
            same.setdefault(json.dumps(run.labels, sort_keys=True, default=str), []).append(run)
        alike = [run for group in same.values() if len(group) > 1 for run in group]
        if len({value(run) for run in alike}) > 1:
            for run in runs if key == 'config' else alike:
                run.labels = {**run.labels, key: value(run)}
