"""The figures of the page: SVG whose colours are the page's own, in panels as wide as a phone."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .answer import scaled
from .content import Content, Method, Setting, most_different
from .metrics import Metric

COLOURS = 8
"""How many the style sheet has; the first is that of the baseline."""

MARKERS = 'osD^vPX*'
_SHAPES = (
    '<circle cx="7" cy="7" r="4.5"/>', '<rect x="2.8" y="2.8" width="8.4" height="8.4"/>',
    '<path d="M7 1.6 12.4 7 7 12.4 1.6 7Z"/>', '<path d="M7 2 12.2 11.6H1.8Z"/>', '<path d="M7 12 1.8 2.4H12.2Z"/>',
    '<path d="M5 1.5H9V5H12.5V9H9V12.5H5V9H1.5V5H5Z"/>',
    '<path d="M4 1.5 7 4.5 10 1.5 12.5 4 9.5 7 12.5 10 10 12.5 7 9.5 4 12.5 1.5 10 4.5 7 1.5 4Z"/>',
    '<path d="M7 1 8.7 5.2 13 5.4 9.6 8.2 10.8 12.6 7 10.1 3.2 12.6 4.4 8.2 1 5.4 5.3 5.2Z"/>',
)  # fmt: skip
_DASHES = ('-', (0, (4, 1.5)), (0, (1.5, 1.2)))
_WIDTH, _HEIGHT = 5.0, 3.4  # inches of 72 units

# Stand in for colours that only the page knows.
_TEXT, _FAINT, _PAPER = '#fe01e0', '#fe02e0', '#fe03e0'
_VARIABLES = {_TEXT: 'var(--muted)', _FAINT: 'var(--line)', _PAPER: 'var(--paper)'}
_STYLE = {
    'text.parse_math': False,
    'text.color': _TEXT,
    'axes.edgecolor': _FAINT,
    'axes.labelcolor': _TEXT,
    'xtick.color': _TEXT,
    'ytick.color': _TEXT,
    'xtick.major.size': 0,
    'ytick.major.size': 0,
    'font.size': 10.5,
    'axes.titlesize': 11,
    'svg.fonttype': 'none',  # text stays text
}


@dataclass(frozen=True)
class Panel:
    """One SVG, and what it shows, for those who do not see it."""

    svg: str
    label: str


@dataclass(frozen=True)
class Section:
    """Panels that belong together."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: bool = False


def figures(content: Content) -> list[Section]:
    """Those for which the runs have what they show."""
    sections = (_by_batch_size, _at_one_batch_size, _differences, _progress, _losses, _costs, _classes)
    return [section for make in sections if (section := make(content)) is not None and section.panels]


def legend(content: Content) -> dict[str, str]:
    """Name of each method, and its marker as an SVG."""
    entries = {}
    for i, method in enumerate(content.ordered):
        shape = _SHAPES[MARKERS.index(_marker(i))]
        style = f'style="fill:var(--c{i % COLOURS})"'
        svg = f'<svg class="key" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true" {style}>{shape}</svg>'
        entries[method.name] = svg
    return entries


def _by_batch_size(content: Content) -> Section | None:
    sizes = [size for size in content.batch_sizes if size is not None]
    if len(sizes) < 2:
        return None
    panels = [
        panel
        for metric in content.headlines
        if (panel := _panel(f'{metric.name} against batch size', lambda axis, m=metric: _size_lines(axis, content, m)))
    ]
    spread = ', a bar from the lowest to the highest seed' if len(content.seeds) > 1 else ''
    return Section('batch-size', 'Against batch size', f'Mean of the seeds{spread}; each dot is a run.', panels)


def _size_lines(axis: Axes, content: Content, metric: Metric) -> bool:
    sizes = [size for size in content.batch_sizes if size is not None]
    ends = []
    for i, method in enumerate(content.ordered):
        known = [s for size in sizes if (s := content.at(method, size)) and content.values(s, metric)]
        if not known:
            continue
        aside = 2 ** (0.05 * (i - (len(content.ordered) - 1) / 2))  # so that bars do not hide each other
        x = [setting.batch_size * aside for setting in known]
        values = [_values(content, setting, metric) for setting in known]
        y = [mean(v) for v in values]
        _line(axis, x, y, i)
        axis.vlines(x, list(map(min, values)), list(map(max, values)), color=_colour(i), lw=1.2, alpha=0.55)
        dots = [(place, value) for place, several in zip(x, values) for value in several if len(several) > 1]
        if dots:
            axis.plot(*zip(*dots), '.', color=_colour(i), ms=3, alpha=0.8)
        ends.append((x[-1], y[-1], method.name, i))
    axis.set_xscale('log', base=2)
    axis.set_xticks(sizes, list(map(str, sizes)))
    axis.minorticks_off()
    axis.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.35)
    axis.set_xlabel('batch size, of all processes')
    axis.set_title(_named(metric), loc='left')
    _label_ends(axis, ends)
    return bool(ends)


def _at_one_batch_size(content: Content) -> Section | None:
    if len(content.batch_sizes) > 1:
        return None

    def draw(axis: Axes, metric: Metric) -> bool:
        known = [s for s in content.settings if content.values(s, metric)]
        for row, setting in enumerate(known):
            values = _values(content, setting, metric)
            i = content.ordered.index(setting.method)
            axis.plot([min(values), max(values)], [row, row], color=_colour(i), lw=1.4, alpha=0.55)
            axis.plot(values, [row] * len(values), '.', color=_colour(i), ms=4, alpha=0.8)
            _dots(axis, [mean(values)], [row], i, 7)
        _rows(axis, content, [setting.method for setting in known])
        axis.set_xlabel(_named(metric))
        axis.set_title(_joined(metric.name, _at(content, content.batch_sizes[0])), loc='left')
        return bool(known)

    height = 1.15 + 0.3 * len(content.ordered)
    panels = [
        _panel(f'{metric.name} of each norm', lambda a, m=metric: draw(a, m), height) for metric in content.headlines
    ]
    caption = 'Mean of the seeds; each dot is a run.' if len(content.seeds) > 1 else 'One seed each.'
    return Section('values', 'By norm', caption, [panel for panel in panels if panel])


def _differences(content: Content) -> Section | None:
    if not content.differences:
        return None

    def draw(axis: Axes, size: int | None) -> bool:
        found = [d for d in content.differences if d.setting.batch_size == size]
        order = [d for method in content.ordered for d in found if d.setting.method == method]
        for row, difference in enumerate(order):
            i, effect = content.ordered.index(difference.setting.method), scaled(content, difference.effect)
            if effect.low is not None:
                solid = 1.0 if effect.is_seen or effect.is_likely else 0.5
                axis.plot([effect.low, effect.high], [row, row], color=_colour(i), lw=2.2, alpha=solid)
            _dots(axis, [effect.difference], [row], i, 7)
        axis.axvline(0, color=_TEXT, lw=1)
        _rows(axis, content, [d.setting.method for d in order])
        axis.set_xlabel(f'{content.metric.name}, difference from {content.baseline_name}')
        axis.set_title(_at(content, size), loc='left')
        return bool(order)

    rows = max(sum(d.setting.batch_size == size for d in content.differences) for size in content.batch_sizes)
    height = 1.15 + 0.3 * rows
    panels = _for_sizes(content, f'difference in {content.metric.name} from {content.baseline_name}', draw, height)
    sure = any(d.effect.low is not None for d in content.differences)
    caption = (
        'Mean difference with its 95 % interval; pale where the interval holds zero.'
        if sure
        else 'Difference of one seed each, so without an interval.'
    )
    return Section('differences', f'Difference from {content.baseline_name}', caption, panels)


def _progress(content: Content) -> Section | None:
    panels = _for_sizes(
        content, f'{content.metric.name} against iterations', lambda axis, size: _curves(axis, content, size, False)
    )
    band = (
        'Mean of the seeds, and a band from the lowest to the highest.' if len(content.seeds) > 1 else 'One seed each.'
    )
    return Section(
        'progress', f'{content.metric.name[0].upper()}{content.metric.name[1:]} while training', band, panels
    )


def _losses(content: Content) -> Section | None:
    panels = _for_sizes(content, 'loss against iterations', lambda axis, size: _curves(axis, content, size, True))
    band = 'Mean and band as above, of the loss as it was logged.' if len(content.seeds) > 1 else 'As it was logged.'
    return Section('loss', 'Loss while training', band, panels)


def _curves(axis: Axes, content: Content, size: int | None, loss: bool) -> bool:
    metric, ends, all_values = content.metric, [], []
    for i, method in enumerate(content.ordered):
        setting = content.at(method, size)
        runs = [run for run in setting.runs if run.is_finished] if setting else []
        points = [run.curves.get('loss' if loss else metric.key, ()) for run in runs]
        points = [dict(p) for p in points if len(p) > 1]
        if not points:
            continue
        x = np.array(sorted(set().union(*points)))
        x = x[(x >= max(map(min, points))) & (x <= min(map(max, points)))]
        scale = 1.0 if loss else metric.scale
        y = np.array([np.interp(x, list(p), list(p.values())) for p in points]) * scale
        if len(x) < 2:
            continue
        if len(points) > 1:
            axis.fill_between(x, y.min(0), y.max(0), color=_colour(i), alpha=0.16, lw=0)
        axis.plot(x, y.mean(0), color=_colour(i), ls=_dash(i), lw=1.6)
        ends.append((x[-1], y.mean(0)[-1], method.name, i))
        all_values.append(y)
    if not ends:
        return False
    axis.set_xlim(left=0, right=max(end[0] for end in ends))
    if loss:  # the first values would leave no room for what comes after
        values = np.concatenate([y.ravel() for y in all_values])
        axis.set_ylim(min(values) - 0.02 * np.ptp(values), np.quantile(values, 0.97))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel('iterations')
    axis.set_title(_joined('loss' if loss else _named(metric), _at(content, size)), loc='left')
    _label_ends(axis, ends)
    return True


def _costs(content: Content) -> Section | None:
    keys = (('seconds_per_iteration', 'seconds per iteration'), ('peak_memory_mb', 'peak memory, MB'))

    def draw(axis: Axes, size: int | None, key: str, name: str) -> bool:
        known = [s for s in content.settings if s.batch_size == size and content.values(s) and s.cost(key)]
        for setting in known:
            values = _values(content, setting, content.metric)
            i, x = content.ordered.index(setting.method), setting.cost(key)
            axis.vlines([x], [min(values)], [max(values)], color=_colour(i), lw=1.2, alpha=0.55)
            _dots(axis, [x], [mean(values)], i, 7)
        if len(known) < 2:
            return False
        axis.margins(x=0.12, y=0.12)
        _label_points(axis, content, known, key)
        axis.set_xlabel(name)
        axis.set_title(_joined(_named(content.metric), _at(content, size)), loc='left')
        return True

    panels = [
        panel
        for key, name in keys
        for panel in _for_sizes(
            content, f'{content.metric.name} against {name}', lambda axis, size, k=key, n=name: draw(axis, size, k, n)
        )
    ]
    caption = f'{"Down" if content.metric.is_lower_better else "Up"} and to the left is better.'
    if len(content.seeds) > 1:
        caption += ' A bar goes from the lowest to the highest seed.'
    return Section('cost', 'What it costs', caption, panels)


def _classes(content: Content) -> Section | None:
    panels, few = [], ''
    for metric in content.headlines:
        differences = content.class_differences(metric)
        shown, said = most_different(differences.values())
        few = few or said
        panels += _class_panels(content, metric, differences, shown)
    caption = f'Mean over the seeds of each class less that of {content.baseline_name}{few}.'
    return Section('classes', 'By class', caption, panels, legend=True)


def _class_panels(
    content: Content, metric: Metric, differences: Mapping[Setting, Mapping[str, float]], shown: Sequence[str]
) -> list[Panel]:
    def draw(axis: Axes, size: int | None) -> bool:
        known = [s for s in differences if s.batch_size == size]
        for setting in known:
            i, found = content.ordered.index(setting.method), differences[setting]
            points = [(found[n] * metric.scale, row) for row, n in enumerate(shown) if n in found]
            if points:
                _dots(axis, *zip(*points), i, 6)
        axis.axvline(0, color=_TEXT, lw=1)
        axis.set_yticks(range(len(shown)), [n if len(n) < 18 else f'{n[:16]}…' for n in shown])
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.spines['left'].set_visible(False)
        axis.set_xlabel(f'{metric.name} of the class, difference from {content.baseline_name}')
        axis.set_title(_at(content, size), loc='left')
        return bool(known)

    return _for_sizes(content, f'differences in {metric.name} by class', draw, 1.15 + 0.27 * len(shown))


def _for_sizes(content: Content, what: str, draw: Callable, height: float = _HEIGHT) -> list[Panel]:
    panels = []
    for size in content.batch_sizes:
        panel = _panel(_joined(what, _at(content, size)), lambda axis, s=size: draw(axis, s), height)
        panels += [panel] if panel else []
    return panels


def _panel(label: str, draw: Callable[[Axes], bool], height: float = _HEIGHT) -> Panel | None:
    """What ``draw`` puts on an axis; None if that is nothing."""
    with rc_context({**_STYLE, 'svg.hashsalt': label}):
        figure = Figure(figsize=(_WIDTH, height), layout='constrained')
        axis = figure.subplots()
        for side in ('top', 'right'):
            axis.spines[side].set_visible(False)
        axis.grid(axis='y', color=_FAINT, lw=0.7)
        axis.set_axisbelow(True)
        if not draw(axis):
            return None
        file = io.StringIO()
        figure.patch.set_visible(False)
        axis.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(file, metadata={'Date': None, 'Creator': None})
    return Panel(_inline(file.getvalue(), label), label)


def _inline(svg: str, label: str) -> str:
    """For a page: no header, no size, no names that others have, colours by the page's variables."""
    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'(?s)<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>|<!--.*?-->', '', svg)
    head, _, rest = svg.partition('>')
    svg = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', '', head) + '>' + rest
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', '', re.sub(r'>\s+<', '><', svg))
    svg = re.sub(r'#fe([0-9a-f]{2})d0', lambda match: f'var(--c{int(match[1], 16)})', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'font-family: [^;"]*;? ?', '', svg)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"|<g/>|<defs></defs>', '', svg)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r'font-size: \1px', svg)
    label = label.replace('&', '&amp;').replace('<', '&lt;').replace('"', '&quot;')
    return svg.replace('<svg', f'<svg class="figure" role="img" aria-label="{label}"', 1).strip()


def _line(axis: Axes, x: Sequence[float], y: Sequence[float], i: int) -> None:
    axis.plot(x, y, color=_colour(i), ls=_dash(i), lw=1.7)
    _dots(axis, x, y, i, 6)


def _rows(axis: Axes, content: Content, methods: Sequence[Method]) -> None:
    """A method in each row, by its name and colour."""
    axis.set_yticks(range(len(methods)), [method.name for method in methods])
    for tick, method in zip(axis.get_yticklabels(), methods):
        tick.set_color(_colour(content.ordered.index(method)))
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.grid(axis='y', visible=False)
    axis.grid(axis='x', color=_FAINT, lw=0.7)
    axis.spines['left'].set_visible(False)


def _dots(axis: Axes, x: Sequence[float], y: Sequence[float], i: int, size: float) -> None:
    axis.plot(x, y, _marker(i), color=_colour(i), ms=size, mec=_PAPER, mew=0.8, ls='none')


def _label_ends(axis: Axes, ends: Iterable[tuple[float, float, str, int]]) -> None:
    """Names beside the ends of lines, moved apart where they would lie over each other."""
    ends = sorted(ends, key=lambda end: end[1])
    if not ends:
        return
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    gap = (high - low) * 0.062
    places = _apart([end[1] for end in ends], gap, low, high)
    for (_, _, name, i), y in zip(ends, places):
        axis.annotate(
            name, (1.02, y), xycoords=('axes fraction', 'data'), color=_colour(i), va='center', annotation_clip=False
        )


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted places, at least ``gap`` from each other, each as near to where it was as that lets it."""
    groups: list[list[float]] = []  # (sum of what their first place should be, count)
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1:
            (a, n), (b, m) = groups[-2:]
            if b / m - a / n >= gap * n:
                break
            groups[-2:] = [[a + b - m * n * gap, n + m]]
    found = [total / count + k * gap for total, count in groups for k in range(int(count))]
    move = min(0.0, high - found[-1]) or max(0.0, low - found[0])
    return [place + move for place in found]


def _label_points(axis: Axes, content: Content, settings: Sequence[Setting], key: str) -> None:
    """Names beside points, each on the side where the fewest others are."""
    points = [(s.cost(key), mean(content.values(s).values()) * content.metric.scale) for s in settings]
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    spots = [((x - left) / (right - left), (y - low) / (high - low)) for x, y in points]
    taken = [(x - 0.015, y - 0.03, x + 0.015, y + 0.03) for x, y in spots]
    for setting, (x, y) in sorted(zip(settings, spots), key=lambda item: item[1]):
        width, height = 0.019 * len(setting.method.name) + 0.01, 0.07
        sides = [
            (x + 0.025, y - height / 2, 'left'),
            (x - 0.025 - width, y - height / 2, 'right'),
            (x - width / 2, y + 0.035, 'center'),
            (x - width / 2, y - 0.035 - height, 'center'),
            (x + 0.02, y + 0.02, 'left'),
            (x + 0.02, y - 0.02 - height, 'left'),
        ]
        boxes = [(a, b, a + width, b + height) for a, b, _ in sides]
        costs = [sum(_overlap(box, other) for other in taken) + _outside(box) for box in boxes]
        best = costs.index(min(costs))
        box, side = boxes[best], sides[best][2]
        taken.append(box)
        at = dict(left=box[0], right=box[2], center=(box[0] + box[2]) / 2)[side]
        i = content.ordered.index(setting.method)
        axis.text(
            at, (box[1] + box[3]) / 2, setting.method.name, transform=axis.transAxes, ha=side, va='center',
            color=_colour(i), fontsize=9.5,
        )  # fmt: skip


def _overlap(a: tuple, b: tuple) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: tuple) -> float:
    width, height = box[2] - box[0], box[3] - box[1]
    return 5 * (width * height - _overlap(box, (0.0, 0.0, 1.05, 1.0)))


def _colour(i: int) -> str:
    return f'#fe{i % COLOURS:02x}d0'


def _dash(i: int) -> str | tuple:
    return _DASHES[i // COLOURS % len(_DASHES)]


def _marker(i: int) -> str:
    return MARKERS[(i + i // COLOURS) % len(MARKERS)]


def _values(content: Content, setting: Setting, metric: Metric) -> list[float]:
    """Of the seeds, in the unit that is shown."""
    return [value * metric.scale for value in content.values(setting, metric).values()]


def _named(metric: Metric) -> str:
    return f'{metric.name}, {metric.unit}' if metric.unit else metric.name


def _at(content: Content, size: int | None) -> str:
    if size is None:
        return 'batch size unknown' if len(content.batch_sizes) > 1 else ''
    return f'batch size {size}'


def _joined(*parts: str) -> str:
    return ', '.join(part for part in parts if part)
