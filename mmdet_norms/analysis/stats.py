"""Statistics that norms saw in training, of several runs beside each other; and what is only a method's own."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from ..console import as_text
from ..engine.results import write_json
from ..errors import UserError
from ..files import write_text
from .figures import (
    PSI,
    RHO,
    SIGMA,
    TIMES,
    course,
    head,
    legend,
    logarithmic,
    look_of,
    point_of,
    sheet,
    short,
    styled,
    write,
)
from .runs import Looks, choose, series

QUANTITIES = {'mean': 'batch mean', 'var': 'batch variance', 'g': f'g, {TIMES} images', 'psi': f'{PSI}, {TIMES} images'}
_BY_IMAGES = ('g', 'psi')
_MOST_ROWS = 4


def fluctuations(looks: Looks, layer: str) -> dict[str, float]:
    """How much each of :data:`QUANTITIES` moves from one look to the next, see docs/analyze.md.

    From differences of neighbours, so that what moves slowly in training does not count.
    """
    lines = [layers[layer] for _, layers in sorted(looks.items()) if layer in layers]
    found = {}
    for key in QUANTITIES:
        squares, pairs = 0.0, 0
        for old, new in pairwise(lines):
            for a, b, var in zip(_scaled(old, key), _scaled(new, key), new['var']):
                if None not in (a, b, var):
                    unit = {'mean': math.sqrt(var + 1e-12), 'var': var + 1e-12}.get(key, 1.0)
                    squares, pairs = squares + ((b - a) / unit) ** 2, pairs + 1
        if pairs:
            found[key] = math.sqrt(squares / (2 * pairs))
    return found


def _factor(line: Mapping, key: str) -> int:
    """The loss is a mean over the images of the batch, and of those that are accumulated."""
    return line.get('images', 1) * line.get('accumulated', 1) if key in _BY_IMAGES else 1


def _scaled(line: Mapping, key: str) -> list:
    factor = _factor(line, key)
    return [None if value is None else value * factor for value in line.get(key, ())]


def draw(
    runs: Mapping[str, Looks], out: Path, layers: Sequence[str] | None = None, channel: int | None = None
) -> list[Path]:
    """Figures of the runs, by name: ``stats``, ``fluctuation``, and of methods that some layer has their own.

    Args:
        out: the folder.
        layers: patterns; by default four, evenly spread.
        channel: whose statistics; by default the first of which they were kept.

    Raises:
        UserError: no such layer, or nothing was recorded of that channel.
    """
    known = list(dict.fromkeys(name for looks in runs.values() for step in looks.values() for name in step))
    rows = choose(known, layers, _MOST_ROWS)
    first = next(line for looks in runs.values() for step in looks.values() for line in step.values())
    channel = first['channels'][0] if channel is None else channel
    with styled():
        paths = _statistics(runs, rows, channel, out)
        paths += _fluctuation(runs, choose(known, layers, 12), out)
        paths += _cbn(runs, known, layers, out) + _mabn(runs, known, layers, channel, out)
        paths += _bnet(runs, known, layers, out)
    return paths


def _statistics(runs: Mapping[str, Looks], rows: Sequence[str], channel: int, out: Path) -> list[Path]:
    figure, axes = sheet(len(rows), len(QUANTITIES), sharex='col')
    drawn = False
    for row, layer in zip(axes, rows):
        for axis, key in zip(row, QUANTITIES):
            for number, looks in enumerate(runs.values()):
                steps, values = series(looks, layer, key, channel)
                values = [value * _factor(looks[step][layer], key) for step, value in zip(steps, values)]
                course(axis, steps, values, look_of(number))
                drawn = drawn or bool(steps)
    if not drawn:
        raise UserError(f'--channel {channel}: no run has recorded it; NormStatsHook(channels=[{channel}]) does')
    head(axes, [short(layer) for layer in rows], list(QUANTITIES.values()))
    for axis in axes[-1]:
        axis.set_xlabel('iteration')
    legend(figure, list(runs))
    return write(figure, out, 'stats')


def _fluctuation(runs: Mapping[str, Looks], layers: Sequence[str], out: Path) -> list[Path]:
    """A figure over the layers, and its numbers."""
    numbers = {name: {layer: fluctuations(looks, layer) for layer in layers} for name, looks in runs.items()}
    if not any(values for of_run in numbers.values() for values in of_run.values()):
        return []  # one look has no neighbour
    figure, axes = sheet(1, len(QUANTITIES), width=1.9, height=1.0 + 0.14 * len(layers), sharey=True)
    for axis, (key, label) in zip(axes[0], QUANTITIES.items()):
        for number, of_run in enumerate(numbers.values()):
            places = [i for i, layer in enumerate(layers) if of_run[layer].get(key)]
            values = [of_run[layers[i]][key] for i in places]
            axis.plot(values, places, **point_of(number))
        logarithmic(axis, 'x')
        axis.set_title(label, loc='left')
        axis.grid(alpha=0.25, lw=0.5)
    axes[0, 0].set_yticks(range(len(layers)), [short(layer) for layer in layers])
    axes[0, 0].set_ylim(len(layers) - 0.5, -0.5)
    figure.supxlabel(
        f'standard deviation from look to look (mean and variance in units of {SIGMA} and {SIGMA}²)', fontsize=8
    )
    legend(figure, list(runs), look=point_of)
    paths = write(figure, out, 'fluctuation')
    write_json(out / 'fluctuation.json', numbers)
    titles = ['layer', *(f'{label}: {as_text(name)}' for label in QUANTITIES.values() for name in runs)]
    lines = [titles, ['---', *('---:' for _ in titles[1:])]]
    for layer in layers:
        cells = [numbers[name][layer].get(key) for key in QUANTITIES for name in runs]
        lines.append([short(layer), *('-' if value is None else f'{value:.3g}' for value in cells)])
    write_text(out / 'fluctuation.md', '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n')
    return [*paths, out / 'fluctuation.json', out / 'fluctuation.md']


def _having(runs: Mapping[str, Looks], known: Sequence[str], patterns, key: str, most: int) -> list[str]:
    """The layers of which a quantity was recorded, that are to be drawn."""
    have = [n for n in known if any(key in step.get(n, {}) for looks in runs.values() for step in looks.values())]
    try:
        return choose(have, patterns, most) if have else []
    except UserError:  # patterns that name layers with other norms
        return []


def _cbn(runs: Mapping[str, Looks], known: Sequence[str], patterns, out: Path) -> list[Path]:
    """The error of the statistics that CBN uses, and of those that are only averaged."""
    rows = _having(runs, known, patterns, 'compensated_error', _MOST_ROWS)
    own = {name: looks for name, looks in runs.items() if _having({name: looks}, rows, None, 'compensated_error', 1)}
    if not own:
        return []
    columns = {
        '_error': f'error of the mean, in {SIGMA}',
        '_var_error': f'error of the variance, in {SIGMA}²',
    }
    figure, axes = sheet(len(rows), len(columns), width=3.4, sharex=True)
    labels = []
    for axis_row, layer in zip(axes, rows):
        for axis, suffix in zip(axis_row, columns):
            labels = []
            for name, looks in own.items():
                for kind, said in (('naive', f'averaged as they were ({RHO} = 0)'), ('compensated', 'compensated')):
                    course(axis, *_positive(series(looks, layer, kind + suffix)), look_of(len(labels)))
                    labels.append(f'{name}: {said}' if len(own) > 1 else said)
            logarithmic(axis, 'y')
    head(axes, [short(layer) for layer in rows], list(columns.values()))
    for axis in axes[-1]:
        axis.set_xlabel('iteration')
    legend(figure, labels)
    return write(figure, out, 'stats-cbn')


def _positive(points: tuple[list, list]) -> tuple[list, list]:
    kept = [(x, y) for x, y in zip(*points) if y > 0]
    return [x for x, _ in kept], [y for _, y in kept]


def _mabn(runs: Mapping[str, Looks], known: Sequence[str], patterns, channel: int, out: Path) -> list[Path]:
    """r, and the two statistics of this batch against what the window makes of them."""
    rows = _having(runs, known, patterns, 'r', _MOST_ROWS)
    own = {name: looks for name, looks in runs.items() if _having({name: looks}, rows, None, 'r', 1)}
    if not own:
        return []
    figure, axes = sheet(len(rows), 3, width=2.4, sharex=True)
    labels = []
    for axis_row, layer in zip(axes, rows):
        labels = []
        for name, looks in own.items():
            batch, window = look_of(len(labels)), look_of(len(labels) + 1)
            for axis, pair in zip(axis_row, (('second_moment', 'second_moment_used'), ('psi', 'psi_used'))):
                course(axis, *series(looks, layer, pair[0], channel), batch)
                course(axis, *series(looks, layer, pair[1], channel), window)
            course(axis_row[2], *series(looks, layer, 'r'), window)
            labels += [f'{name}: {said}' if len(own) > 1 else said for said in ('of the batch', 'over the window')]
    head(axes, [short(layer) for layer in rows], ['second moment', PSI, 'r, mean over channels'])
    for axis in axes[-1]:
        axis.set_xlabel('iteration')
    legend(figure, labels)
    return write(figure, out, 'stats-mabn')


def _bnet(runs: Mapping[str, Looks], known: Sequence[str], patterns, out: Path) -> list[Path]:
    """How BNET's kernels leave the centre, layer by layer."""
    layers = _having(runs, known, patterns, 'energy', 8)
    own = {name: looks for name, looks in runs.items() if _having({name: looks}, layers, None, 'energy', 1)}
    if not own:
        return []
    figure, axes = sheet(1, len(own), width=3.4, height=2.2, above=0.55, sharey=True)
    for axis, (name, looks) in zip(axes[0], own.items()):
        for number, layer in enumerate(layers):
            lines = [(step, seen[layer].get('energy')) for step, seen in sorted(looks.items()) if layer in seen]
            points = [(step, 1 - e[len(e) // 2][len(e) // 2]) for step, e in lines if e and e[0][0] is not None]
            course(axis, *(zip(*points) if points else ((), ())), look_of(number))
        axis.set_title(name, loc='left')
        axis.set_xlabel('iteration')
    axes[0, 0].set_ylabel('energy off the centre')
    legend(figure, [short(layer) for layer in layers])
    return write(figure, out, 'stats-bnet')
