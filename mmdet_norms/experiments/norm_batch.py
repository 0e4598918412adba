"""Top-1 error against the number of images that a norm takes its statistics over: the figure of the MABN paper.

The batch of the optimizer is the same everywhere; ``norm_batch`` cuts it into groups.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..benchmark.chart import STYLE, save
from .grid import Cell, Outcome

KEY = 'model.backbone.norm_cfg.norm_batch'
METRIC = 'accuracy/top1'
# Top-1 error on ImageNet, R-50, normalization batch of 32 and 2 (Yan et al., arXiv:2001.06838).
PUBLISHED = {('BN', 32): 23.41, ('BN', 2): 35.22, ('BRN', 2): 30.29, ('MABN', 2): 23.67}

# Read on white and on black, and told apart without colours.
_LINES = (('#e0762f', 'o', '-'), ('#2f86dd', 's', '--'), ('#2aa06b', '^', '-.'), ('#b565c8', 'D', ':'))


@dataclass(frozen=True)
class Errors:
    """Top-1 errors of a norm at a normalization batch, percent, by seed.

    Args:
        norm: its name in table and figure.
        batch: images.
        by_seed: seed -> percent; those that failed are not among them.
        seeds: how many there should be.
    """

    norm: str
    batch: int
    by_seed: dict[int, float]
    seeds: int

    @property
    def values(self) -> list[float]:
        """Those of the seeds, lowest first."""
        return sorted(self.by_seed.values())


def cells(
    configs: dict[str, str],
    batches: Sequence[int],
    seeds: Sequence[int],
    options: Sequence[str] = (),
    data_root: str | None = None,
) -> Iterator[Cell]:
    """A cell for each norm, batch and seed; all norms of a batch and seed before the next ones.

    Args:
        configs: name of the norm -> config of a classifier.
        options: more ``KEY=VALUE`` for all of them.
        data_root: as ``train`` takes it.
    """
    data = () if data_root is None else ('--data-root', data_root)
    for seed in seeds:
        for batch in batches:
            for norm, config in configs.items():
                yield Cell(
                    f'{norm.lower()}-{batch}-seed{seed}',
                    config,
                    ('--seed', str(seed), *data, '--cfg-options', f'{KEY}={batch}', *options),
                    dict(norm=norm, batch=batch, seed=seed),
                )


def error_of(outcome: Outcome) -> float | None:
    """Percent of the validation images whose best score is not that of their class."""
    top1 = (outcome.result or {}).get(METRIC)
    return None if top1 is None else 100 * (1 - top1)


def errors(outcomes: Sequence[Outcome]) -> list[Errors]:
    """Those of each norm and batch, in the order in which they come first."""
    found: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.cell.labels['norm'], outcome.cell.labels['batch']), []).append(outcome)
    return [
        Errors(
            norm,
            batch,
            {o.cell.labels['seed']: value for o in group if (value := error_of(o)) is not None},
            len(group),
        )
        for (norm, batch), group in sorted(found.items(), key=lambda item: item[0][1])
    ]


def markdown(table: Sequence[Errors], command: str, about: Sequence[str] = ()) -> str:
    """The table: mean, and lowest and highest seed; below it, which norms the seeds tell apart at each batch."""
    norms, batches = _norms(table), sorted({entry.batch for entry in table})
    by_place = {(entry.norm, entry.batch): entry for entry in table}
    rows = [
        ['images per group', *norms],
        ['---:', *('---:' for _ in norms)],
        *([str(batch), *(_cell(by_place.get((norm, batch))) for norm in norms)] for batch in batches),
    ]
    seeds = max((entry.seeds for entry in table), default=0)
    lines = [f'    {command}', '', *(f'* {line}' for line in about), '']
    lines += [
        f'Top-1 error, percent: mean of {seeds} seeds (lowest to highest).' if seeds > 1 else 'Top-1 error, percent.'
    ]
    lines += ['', *(f'| {" | ".join(row)} |' for row in rows), '']
    if seeds > 1:
        lines += ['`<`: every seed of the left norm is below every seed of the right one; `~`: they overlap.', '']
        lines += [f'* {batch} images: {order([by_place[norm, batch] for norm in norms])}' for batch in batches] + ['']
    return '\n'.join(lines)


def order(entries: Sequence[Errors]) -> str:
    """``'MABN < BRN ~ BN'``: by their means, and whether the seeds of neighbours overlap."""
    ranked = sorted((entry for entry in entries if entry.by_seed), key=lambda entry: mean(entry.values))
    said = [entry.norm for entry in ranked[:1]]
    for left, right in pairwise(ranked):
        said += ['<' if left.values[-1] < right.values[0] else '~', right.norm]
    return ' '.join(said)


def draw(table: Sequence[Errors], path: str | Path) -> None:
    """A line through the means of each norm, a bar from its lowest to its highest seed, a dot for every seed."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout='constrained')
        axis = figure.subplots()
        norms, batches = _norms(table), sorted({entry.batch for entry in table})
        for i, norm in enumerate(norms):
            colour, marker, line = _LINES[i % len(_LINES)]
            entries = [entry for entry in table if entry.norm == norm and entry.by_seed]
            aside = 2 ** (0.06 * (i - (len(norms) - 1) / 2))  # so that bars do not hide each other
            x = [entry.batch * aside for entry in entries]
            y = [mean(entry.values) for entry in entries]
            reach = [
                [m - entry.values[0] for m, entry in zip(y, entries)],
                [e.values[-1] - m for m, e in zip(y, entries)],
            ]
            style = dict(color=colour, marker=marker, ls=line, lw=2, ms=7)
            axis.errorbar(x, y, reach, capsize=4, elinewidth=1.5, label=norm, **style)
            dots = [(place, value) for place, entry in zip(x, entries) for value in entry.values]
            axis.plot(*zip(*dots) if dots else ((), ()), '.', color=colour, ms=4, alpha=0.6)
        axis.set_xscale('log', base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        if batches:
            axis.set_xlim(batches[0] / math.sqrt(2), batches[-1] * math.sqrt(2))
        axis.set_ylim(bottom=0)
        axis.set_xlabel('images that statistics are taken over, at one batch of the optimizer')
        axis.set_ylabel('top-1 error, percent')
        axis.grid(axis='y', alpha=0.25)
        if norms:
            axis.legend(frameon=False)
        for side in ('top', 'right'):
            axis.spines[side].set_visible(False)
        save(figure, path)


def _norms(table: Sequence[Errors]) -> list[str]:
    return list(dict.fromkeys(entry.norm for entry in table))


def _cell(entry: Errors | None) -> str:
    if entry is None or not entry.by_seed:
        return 'failed' if entry else '-'
    values = entry.values
    spread = f' ({values[0]:.1f}-{values[-1]:.1f})' if len(values) > 1 else ''
    missing = f', {entry.seeds - len(values)} of {entry.seeds} failed' if len(values) < entry.seeds else ''
    return f'{mean(values):.1f}{spread}{missing}'
