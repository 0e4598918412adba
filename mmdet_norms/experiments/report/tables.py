"""The tables, for the page and for Markdown alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from ..effects import INTERVAL, Effect, number, signed, spread
from .answer import ratio, scaled
from .content import Content, Setting, most_different

NOTHING = '-'
_WORDS = ('norm', 'against', 'in words', 'metric', 'row', 'data', 'work dir', 'status', 'evaluation')
_COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ('seconds_per_iteration', 's / iteration', lambda v: f'{v:.3g}'),
    ('images_per_second', 'images / s', lambda v: f'{v:.3g}' if v < 100 else f'{v:.0f}'),
    ('peak_memory_mb', 'peak memory, MB', lambda v: f'{v:.0f}'),
    ('parameters', 'parameters, M', lambda v: f'{v / 1e6:.2f}'),
)


@dataclass(frozen=True)
class Cell:
    """What is shown, what it is sorted by, and whether it stands out (``best``, ``quiet``) or names a method."""

    text: str
    sort: float | str | None = None
    kind: str = ''


@dataclass(frozen=True)
class Table:
    """A table."""

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def is_words(self, column: int) -> bool:
        """Whether a column has words, which start on the left."""
        return self.columns[column] in _WORDS


def tables(content: Content) -> list[Table]:
    """Those that have a row."""
    made = (_results(content), *_differences(content), *_classes(content), _falls(content), _costs(content))
    return [table for table in (*made, _published(content), _runs(content)) if table.rows]


def _place(setting: Setting) -> list[Cell]:
    size = setting.batch_size
    return [
        Cell(setting.method.name, setting.method.name, 'method'),
        Cell(NOTHING if size is None else str(size), size),
    ]


def _results(content: Content) -> Table:
    shown = [m for m in content.metrics if m.scale != 1 or m == content.metric or len(content.metrics) < 12]
    best = {}
    for size in content.batch_sizes:
        for metric in shown:
            values = [mean(v.values()) for s in content.best(size) if (v := content.values(s, metric))]
            if len(set(values)) > 1:  # else nothing stands out
                best[size, metric.key] = max(values, key=lambda value: metric.sign * value)
    rows = []
    for setting in content.settings:
        cells = _place(setting)
        values = content.values(setting)
        failed = sum(not run.is_finished for run in setting.runs)
        cells.append(Cell(f'{len(values)} of {len(setting.runs)}' if failed else str(len(values)), len(values)))
        for metric in shown:
            of_seeds = list(content.values(setting, metric).values())
            if not of_seeds:
                cells.append(Cell(NOTHING))
                continue
            middle, deviation = mean(of_seeds), spread(of_seeds)
            text = number(middle * metric.scale, metric.digits)
            text += '' if deviation is None else f' ± {number(deviation * metric.scale, metric.digits)}'
            top = middle == best.get((setting.batch_size, metric.key))
            cells.append(Cell(text, middle, 'best' if top else ''))
        rows.append(cells)
    several = any(len(content.values(setting)) > 1 for setting in content.settings)
    caption = 'Mean and standard deviation over the seeds' if several else 'One seed each'
    columns = ['norm', 'batch size', 'seeds', *(metric.name for metric in shown)]
    which = 'best' if any(metric.is_lower_better for metric in shown) else 'highest'
    return Table('results', 'Results', f'{caption}; the {which} of each batch size stands out.', columns, rows)


def _differences(content: Content) -> list[Table]:
    found = []
    for metric in content.headlines:
        differences = content.differences_in(metric)
        sure = any(difference.effect.p is not None for difference in differences)
        rows = []
        for difference in differences:
            effect = difference.effect.times(metric.scale)
            quiet = '' if effect.is_seen or effect.is_likely else 'quiet'
            row = [*_place(difference.setting), Cell(difference.baseline.method.name)]
            row += [Cell(signed(effect.difference, metric.digits), effect.difference, quiet)]
            if sure:
                row += [
                    _interval(effect, metric.digits),
                    _p(effect.p),
                    _p(effect.adjusted),
                    Cell(_said(effect, metric.sign)),
                ]
            rows.append(row)
        columns = ['norm', 'batch size', 'against', 'difference']
        columns += [INTERVAL, 'p', 'p (Holm)', 'in words'] if sure else []
        title = f'Difference from {content.baseline_name}, {metric.name}'
        caption = 'Paired over the seeds. Holm corrects p for the comparisons of the same batch size.'
        caption = caption if sure else 'Of one seed each, so without an interval.'
        found.append(Table(f'differences-{metric.key}', title, caption, columns, rows))
    return found


def _classes(content: Content) -> list[Table]:
    found = []
    for metric in content.headlines:
        differences = content.class_differences(metric)
        shown, few = most_different(differences.values())
        rows = []
        for setting, of_classes in differences.items():
            values = [of_classes.get(name) for name in shown]
            texts = [NOTHING if v is None else signed(v * metric.scale, metric.digits) for v in values]
            rows.append([*_place(setting), *map(Cell, texts, values)])
        caption = f'Each class less that of {content.baseline_name}, mean over the seeds of both{few}.'
        columns = ['norm', 'batch size', *shown]
        found.append(Table(f'classes-{metric.key}', f'By class, {metric.name}', caption, columns, rows))
    return found


def _falls(content: Content) -> Table:
    digits, rows = content.metric.digits, []
    for fall in content.falls:
        effect = scaled(content, fall.effect)
        more = fall.more and scaled(content, fall.more)
        rows.append(
            [
                Cell(fall.small.method.name, fall.small.method.name, 'method'),
                Cell(f'{fall.large.batch_size} to {fall.small.batch_size}', fall.small.batch_size),
                Cell(signed(effect.difference, digits), effect.difference, '' if effect.is_seen else 'quiet'),
                _interval(effect, digits),
                _p(effect.adjusted),
                Cell(signed(more.difference, digits), more.difference) if more else Cell(NOTHING),
                _interval(more, digits) if more else Cell(NOTHING),
                _p(more.adjusted if more else None),
            ]
        )
    columns = ['norm', 'batch size', 'change', INTERVAL, 'p (Holm)', f'beyond {content.baseline_name}']
    title = f'What a smaller batch costs, {content.metric.name}'
    less = 'more a norm rises' if content.metric.is_lower_better else 'less a norm loses'
    caption = f'Paired over the seeds; beyond {content.baseline_name}: how much {less} than it.'
    return Table('falls', title, caption, [*columns, INTERVAL, 'p (Holm)'], rows)


def _costs(content: Content) -> Table:
    keys = [entry for entry in _COSTS if any(setting.cost(entry[0]) for setting in content.settings)]
    rows = []
    for setting in content.settings:
        cells = _place(setting)
        baseline = content.baseline_of(setting.method)
        other = content.at(baseline, setting.batch_size) if baseline else None
        for key, _, shown in keys:
            value = setting.cost(key)
            times = ratio(setting, other, key) if other and key != 'images_per_second' else None
            text = (
                NOTHING if value is None else shown(value) + (f' ({times:.2f}\N{MULTIPLICATION SIGN})' if times else '')
            )
            cells.append(Cell(text, value))
        if any(setting.cost(key) for key, *_ in keys):
            rows.append(cells)
    of = {run.cost.get('peak_memory_of') for run in content.compared} - {None}
    caption = (
        f'Means over the seeds (images / s: of the mean time); in brackets, times that of {content.baseline_name}.'
    )
    caption += f' Memory of the {" or ".join(sorted(of))}.' if of else ''
    return Table('costs', 'Cost', caption, ['norm', 'batch size', *(name for _, name, _ in keys)], rows)


def _published(content: Content) -> Table:
    rows = []
    for setting in content.settings:
        row = content.published(setting)
        for metric in content.metrics if row else ():
            theirs, ours = row['results'].get(metric.key), content.values(setting, metric)
            if theirs is not None and ours:
                middle = mean(ours.values()) * metric.scale
                cells = [Cell(metric.name), Cell(number(middle, metric.digits), middle)]
                cells += [Cell(number(theirs * metric.scale, 2), theirs * metric.scale)]
                cells += [Cell(signed(middle - theirs * metric.scale, metric.digits), middle), Cell(row['name'])]
                rows.append([*_place(setting), *cells, Cell(row['data'])])
    columns = ['norm', 'batch size', 'metric', 'ours', 'published', 'difference', 'row', 'data']
    caption = "The authors' numbers of the same model, data, recipe and number of images, with their batch size."
    return Table('published', 'Beside the published numbers', caption, columns, rows)


def _runs(content: Content) -> Table:
    rows = []
    for run in content.runs:
        value = run.results.get(content.metric.key)
        text = NOTHING if value is None else number(value * content.metric.scale, content.metric.digits)
        labels = run.labels
        rows.append(
            [
                Cell(run.folder, run.folder),
                Cell(str(labels['norm'])),
                Cell(NOTHING if labels['batch_size'] is None else str(labels['batch_size']), labels['batch_size']),
                Cell(NOTHING if labels['seed'] is None else str(labels['seed']), labels['seed']),
                Cell(run.status, run.status, '' if run.is_finished else 'alarm'),
                Cell(text, value),
                Cell(run.of or NOTHING),
                Cell(NOTHING if run.iterations is None else str(run.iterations), run.iterations),
            ]
        )
    columns = ['work dir', 'norm', 'batch size', 'seed', 'status', content.metric.name, 'evaluation', 'iterations']
    return Table('runs', 'Runs', 'Every run that was found.', columns, rows)


def _interval(effect: Effect, digits: int) -> Cell:
    if effect.low is None:
        return Cell('one seed')
    return Cell(f'{number(effect.low, digits)} to {number(effect.high, digits)}', effect.low)


def _p(p: float | None) -> Cell:
    if p is None:
        return Cell(NOTHING)
    return Cell('< 0.001' if p < 0.001 else f'{p:.2g}', p)


def _said(effect: Effect, sign: int) -> str:
    if effect.p is None:
        return 'one seed: not known'
    if effect.is_seen:
        return 'better' if sign * effect.difference > 0 else 'worse'
    return 'not certain' if effect.is_likely else 'no difference seen'
