"""The runs that a figure is of: their names in it, and what NormStatsHook recorded of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from ..choice import evenly, fitting
from ..commands import typed
from ..console import as_text
from ..engine.norm_stats import NORM_STATS
from ..engine.results import read_json_lines
from ..errors import UserError, some
from ..experiments.detections import EvaluatedRun, load_model
from ..experiments.runs import Run, parts_of
from .figures import stage

Looks = dict[int, dict[str, dict]]
"""Iteration -> layer -> what was recorded of it."""


def names_of(runs: Sequence[Run], without: Sequence[str] = ()) -> list[str]:
    """A name for each run: its norm, and the labels in which runs differ."""
    values: dict[str, set] = {}
    for run in runs:
        for key in {key for other in runs for key in other.labels} - set(without):
            values.setdefault(key, set()).add(str(run.labels.get(key)))
    keys = [key for key in values if key == 'norm' or len(values[key]) > 1]
    order = [*('norm', 'batch_size', 'seed'), *sorted(keys)]
    keys = list(dict.fromkeys(key for key in order if key in keys))
    return [
        as_text(', '.join(_part(key, run.labels.get(key)) for key in keys) or Path(run.folder).name) for run in runs
    ]


def _part(key: str, value: object) -> str:
    return {'norm': f'{value}', 'batch_size': f'batch {value}', 'run': f'{value}'}.get(key, f'{key} {value}')


def looks_of(folder: str | Path) -> Looks:
    """What NormStatsHook wrote in a work dir, if it did. Of a run that was resumed, the later part wins; one that was
    overwritten is not this run.
    """
    found: Looks = {}
    for path in (part / NORM_STATS for part in parts_of(folder, NORM_STATS)):
        part: Looks = {}
        for line in read_json_lines(path):
            try:
                part[int(line['step'])] = {str(name): dict(own) for name, own in line['layers'].items()}
            except (ValueError, KeyError, TypeError, AttributeError):  # not the hook's
                continue
        if part:
            found = {step: layers for step, layers in found.items() if step < min(part)} | part
    return found


def with_looks(runs: Sequence[Run]) -> tuple[list[tuple[Run, Looks]], list[Run]]:
    """The runs of whose norms something was recorded, with that; and the others.

    Raises:
        UserError: there are others only.
    """
    looks = [(run, looks_of(run.folder)) for run in runs]
    recorded = [(run, own) for run, own in looks if own]
    if not recorded:
        raise UserError(
            f'nothing was recorded of the norms of {some([run.folder for run in runs])} (there is no {NORM_STATS} in '
            f'DATE/vis_data): train with {typed("train")} --norm-stats N'
        )
    return recorded, [run for run, own in looks if not own]


def choose(names: Sequence[str], patterns: Sequence[str] | None, most: int, what: str = 'layers') -> list[str]:
    """Those that fit one of the patterns, else at most so many, evenly spread.

    Raises:
        UserError: a pattern fits none.
    """
    names = list(dict.fromkeys(names))
    if not patterns:
        return evenly(names, most)
    return fitting(
        names,
        patterns,
        lambda pattern, close: f'--{what} {pattern}: fits none of {len(names)}; there are such as {some(close)}',
    )


def load_norms(
    run: EvaluatedRun, kind: type[nn.Module], layers: Sequence[str] | None, most: int, what: str
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model of a run, and norms of a kind in it: those that fit ``layers``, else the last one of each stage.

    Args:
        most: of these, how many at most.
        what: ``'whose mixture weights could be drawn'``, for the message.

    Raises:
        UserError: the model has none, or a pattern fits none.
    """
    model = load_model(run)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not norms:
        raise UserError(f'the model of {run.checkpoint} has no {kind.__name__}{what}')
    last = list({stage(name): name for name in norms}.values())
    names = choose(list(norms), layers, most) if layers else last[:most]
    return model, {name: norms[name] for name in names}


def series(looks: Looks, layer: str, key: str, channel: int | None = None) -> tuple[list[int], list[float]]:
    """A quantity of a layer over iterations: of one channel, by its number, or the number for all of them."""
    steps, values = [], []
    for step, layers in sorted(looks.items()):
        value = value_of(layers.get(layer, {}), key, channel)
        if value is not None:
            steps.append(step)
            values.append(value)
    return steps, values


def value_of(line: Mapping, key: str, channel: int | None) -> float | None:
    """See :func:`series`; None where it was not recorded."""
    if channel is None:
        return line.get('all', {}).get(key)
    if key not in line or channel not in line['channels']:
        return None
    return line[key][line['channels'].index(channel)]
