"""What the figures share: runs told apart without colours, and a file for papers beside one for screens."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..benchmark.chart import STYLE, save
from ..console import as_text

# Read on white and on black; where there are no colours, the markers tell lines apart.
COLOURS = ('#2f86dd', '#e0762f', '#2aa06b', '#b565c8', '#c2a21f', '#d6517d', '#5f6fd0', '#3aa6b0')
MARKERS = 'osD^vP*X'
DASHES = ('-', '--', '-.', ':')
HEAT = 'Blues'
SIGMA, RHO, LAMBDA = ('\N{GREEK SMALL LETTER SIGMA}', '\N{GREEK SMALL LETTER RHO}', '\N{GREEK SMALL LETTER LAMDA}')
PSI, TIMES = '\N{GREEK CAPITAL LETTER PSI}', '\N{MULTIPLICATION SIGN}'
_RAISED = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')

_OWN = {'font.size': 8, 'axes.titlesize': 8, 'axes.linewidth': 0.7, 'lines.linewidth': 1.2, 'legend.fontsize': 8}


def look_of(number: int) -> dict:
    """Colour, marker and dashes of the number-th line; the first eight are solid."""
    turn, place = divmod(number, len(COLOURS))
    marker = MARKERS[(place + turn) % len(MARKERS)]
    return dict(color=COLOURS[place], marker=marker, ms=5 if marker == '*' else 4, ls=DASHES[turn % len(DASHES)])


def point_of(number: int) -> dict:
    """The same for points."""
    look = look_of(number)
    return look | dict(ls='', ms=look['ms'] + 1)


def some_of(count: int, look: Mapping, few: int = 12) -> tuple[int, int]:
    """Which of a line's points are marked: if they are not few about six, and not those of the other lines."""
    every = math.ceil(count / 6) if count >= few else 1
    return MARKERS.index(look['marker']) * every // len(MARKERS), every


def course(axis: Axes, steps: Sequence[float], values: Sequence[float], look: Mapping) -> None:
    """A line over iterations, all of whose points show where they are few: a line of one would be nothing."""
    axis.plot(steps, values, **look, markevery=some_of(len(steps), look))
    axis.xaxis.get_major_locator().set_params(integer=True)


def styled() -> rc_context:
    """Inside, figures have the style of the package's, with the letters of a paper's column."""
    return rc_context({**STYLE, **_OWN})


def sheet(
    rows: int, columns: int, width: float = 1.75, height: float = 1.35, above: float = 0.35, **options
) -> tuple[Figure, np.ndarray]:
    """A figure with rows x columns axes, each of that size in inches, and room above for a legend."""
    figure = Figure(figsize=(columns * width, rows * height + above), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        plain(axis)
    return figure, axes


def plain(axis: Axes) -> None:
    """No frame above and on the right."""
    for side in ('top', 'right'):
        axis.spines[side].set_visible(False)
    axis.tick_params(width=0.7, length=2.5)
    axis.ticklabel_format(scilimits=(-2, 4))


def logarithmic(axis: Axes, which: str) -> None:
    """A log scale whose numbers are plain text: the style leaves formulas alone, as names of runs may have dollars."""
    getattr(axis, f'set_{which}scale')('log')
    own = getattr(axis, f'{which}axis')
    own.set_major_locator(_LogTicks())
    own.set_major_formatter(lambda value, _: power(value))
    own.set_minor_formatter(NullFormatter())


def power(value: float) -> str:
    """A positive number as a label: ``0.03``, ``200``, and where that would be long powers of ten."""
    if 1e-2 <= value < 1e4:
        return f'{value:g}'
    factor, exponent = f'{value:.3e}'.split('e')
    ten = f'10{str(int(exponent)).translate(_RAISED)}'
    return ten if float(factor) == 1 else f'{float(factor):g}{TIMES}{ten}'


class _LogTicks(LogLocator):
    """As many numbers as have room: powers of ten, every so many of them, or also some multiples."""

    def tick_values(self, low: float, high: float) -> list[float]:
        """Between two limits, which are positive on a log scale."""
        low, high = sorted((low, high))
        return max((ticks for ticks in _log_ticks(low, high) if self._have_room(ticks, low, high)), key=len)

    def _have_room(self, ticks: Sequence[float], low: float, high: float) -> bool:
        axes, letter = self.axis.axes, self.axis.label.get_size()
        upright = self.axis is axes.yaxis
        box = axes.get_window_extent()
        points = (box.height if upright else box.width) * 72 / axes.figure.dpi
        places = [math.log(tick / low) / math.log(high / low) * points for tick in ticks]
        sizes = [letter if upright else 0.62 * letter * len(power(tick)) for tick in ticks]
        pairs = pairwise(zip(places, sizes))
        return all(right - left >= (one + other) / 2 + 0.8 * letter for (left, one), (right, other) in pairs)


def _log_ticks(low: float, high: float) -> Iterator[list[float]]:
    """Ticks between two limits; even steps where a log scale has hardly any."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1)
    for step in range(1, len(powers) + 1):
        yield [10.0**n for n in powers if n % step == 0 and low <= 10.0**n <= high]
    for factors in ((1, 3), (1, 2, 5)):
        found = [factor * 10.0**n for factor in factors for n in powers]
        found = [tick for tick in found if low <= tick <= high]
        yield sorted(found)
    yield from (sorted(pair) for pair in combinations(found, 2))  # rather with a power of ten
    for count in range(1, 5) if len(found) < 2 else ():
        yield [tick for tick in MaxNLocator(count).tick_values(low, high) if low <= tick <= high]


def head(axes: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """What each row is of, and above it what each column shows."""
    for axis, row in zip(axes[:, 0], rows):
        axis.set_title(row, loc='left', y=1)
    for number, (axis, column) in enumerate(zip(axes[0], columns)):
        axis.set_title(f'{column}\n{" " if number else rows[0]}', loc='left', y=1)


def legend(figure: Figure, names: Sequence[str], look: Callable[[int], dict] = look_of) -> None:
    """What the lines of each run look like, above the axes."""
    handles = [Line2D([], [], **look(number)) for number in range(len(names))]
    inches = 0.6 + 0.065 * max(map(len, names), default=0)
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    figure.legend(handles, list(names), loc='outside upper left', ncols=columns, frameon=False, handlelength=2.2)


def heat(axis: Axes, values: np.ndarray, number: str = '.2g', **options) -> None:
    """A matrix as colours, each with its number."""
    image = axis.imshow(values, cmap=HEAT, aspect=options.pop('aspect', 'equal'), **options)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    size = 6 if values.shape[1] <= 12 else 4.6
    for i, j in product(*map(range, values.shape)):
        share = image.norm(values[i, j])
        text = f'{values[i, j]:{number}}'.removeprefix('0')
        axis.text(j, i, text, ha='center', va='center', fontsize=size, color='white' if share > 0.55 else '#333a42')


def write(figure: Figure, out: Path, stem: str) -> list[Path]:
    """``stem.svg`` and ``stem.png`` in a folder."""
    paths = [out / f'{stem}{suffix}' for suffix in ('.svg', '.png')]
    figure.draw_without_rendering()
    figure.set_layout_engine('none')  # which would find the same places for each file
    for path in paths:
        save(figure, path)
    return paths


def short(layer: str) -> str:
    """The name of a layer without what all of a detector's backbone share."""
    return as_text(layer.removeprefix('backbone.'))


def stage(layer: str) -> str:
    """Of which stage or part of the model a layer is: ``layer1`` of a ResNet, else the two outermost names."""
    found = re.search(r'(?:^|\.)((?:layer|stage|stages\.)\d+)(?:\.|$)', layer)
    if found:
        return found[1]
    return '.'.join([part for part in layer.split('.') if not part.isdigit()][:2])
