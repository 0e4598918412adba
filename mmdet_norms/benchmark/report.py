"""What a benchmark says: tables for a terminal and a markdown file, json with every single time, a bar chart."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from ..engine.results import write_json
from ..files import replacing
from .groups import CONV_ONLY, reference_of

_MEGA = 1e6
_COLOURS = dict(baseline='#6c757d', reference='#ced4da', ours='#1d7bd2')
_CHART_COLUMNS = 2

LEGEND = """\
`ms`: median over the repeats; `ms spread`: first to third quartile. `ratio`: median over the repeats of the time
divided by that of `over` in the same repeat; `ratio spread`: its quartiles. `passes`: the time in units of one measured
pass over the same feature map (one read, one write), i.e. what it would move at that rate, not a count of accesses;
`limit`: the fewest that any formulation needs. `saved MB`: kept for the backward pass, every storage once, without
parameters and buffers. `peak MB`: the most held at once during a call beyond what was there before. `saved ratio` and
`peak ratio`: over those of `over`. `state MB`: what the layer keeps between iterations beside its parameters; `state
ratio`: over the published formulation's. `it/s`: calls per second; `published it/s`, `published ratio`: of the same
norm on the authors' GPU, with batch norm's time as 1. MB are 10^6 bytes."""

# What a terminal has no room for; the files have it.
_ONLY_IN_FILES = ('ms spread', 'peak ratio', 'parameters M')


def _spread(name: str, digits: int) -> Callable[[dict], str | None]:
    return lambda row: f'{row[f"{name}_q1"]:.{digits}f}-{row[f"{name}_q3"]:.{digits}f}' if f'{name}_q1' in row else None


def _number(name: str, digits: int, unit: float = 1) -> Callable[[dict], str | None]:
    return lambda row: f'{row[name] / unit:.{digits}f}' if row.get(name) is not None else None


def _text(name: str) -> Callable[[dict], str | None]:
    return lambda row: row.get(name) if 'ms' in row or name != 'over' else None


# header -> the cell of a row, None where the row has none
COLUMNS: dict[str, Callable[[dict], str | None]] = {
    'ms': _number('ms', 2),
    'ms spread': _spread('ms', 2),
    'it/s': _number('calls_per_s', 2),
    'images/s': _number('images_per_s', 2),
    'ratio': _number('ratio', 2),
    'ratio spread': _spread('ratio', 2),
    'over': _text('over'),
    'published it/s': _number('published_per_s', 2),
    'published ratio': _number('published_ratio', 2),
    'passes': _number('passes', 1),
    'limit': _number('limit_passes', 1),
    'saved MB': _number('saved_bytes', 1, _MEGA),
    'saved ratio': _number('saved_ratio', 2),
    'peak MB': _number('peak_bytes', 1, _MEGA),
    'peak ratio': _number('peak_ratio', 2),
    'state MB': _number('state_bytes', 2, _MEGA),
    'state ratio': _number('state_ratio', 2),
    'parameters M': _number('parameters', 2, _MEGA),
    'note': _text('note'),
}


def cells(group: dict) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a group's table; columns that no row fills are left out, a missing cell is ``-``."""
    headers = [name for name, cell in COLUMNS.items() if any(cell(row) is not None for row in group['rows'])]
    rows = [[row['name'], *(COLUMNS[name](row) or '-' for name in headers)] for row in group['rows']]
    return ['', *headers], rows


def print_group(group: dict, console: Console) -> None:
    """One table on a terminal. Notes go below it, where they have room."""
    headers, rows = cells(group)
    shown = [i for i, header in enumerate(headers) if header not in (*_ONLY_IN_FILES, 'note')]
    if len({row['over'] for row in group['rows']} - {None}) < 2:
        shown = [i for i in shown if headers[i] != 'over']
    table = Table(title=group['title'], title_justify='left', box=box.SIMPLE_HEAD)
    for i in shown:
        table.add_column(headers[i].replace(' ', '\n'), justify='right' if i else 'left', no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    for row in group['rows']:
        if row.get('note'):
            console.print(f'{row["name"]}: {row["note"]}', markup=False)
    for line in busyness(group):
        console.print(line, markup=False)


def busyness(group: dict) -> list[str]:
    """How busy other processes kept the machine while a group was measured, and a warning where ratios are doubtful."""
    load, lines = group.get('load') or {}, []
    if load.get('others') is not None:
        lines.append(f'others kept {load["others"]:.1f} of {load["cores"]:g} cores busy meanwhile')
    return lines + ([f'WARNING: {group["doubt"]}'] if group.get('doubt') else [])


def write(result: dict, folder: str | Path) -> list[Path]:
    """Write ``benchmark.json``, ``.md`` and ``.png`` into ``folder``, each in one step.

    Args:
        result: ``command``, ``date``, ``machine``, ``settings`` and ``groups``, see
            :meth:`~mmdet_norms.benchmark.groups.Group.measure`.

    Returns:
        The paths.
    """
    paths = [Path(folder) / f'benchmark{suffix}' for suffix in ('.json', '.md', '.png')]
    write_json(paths[0], result)
    with replacing(paths[1]) as path:
        path.write_text(markdown(result), encoding='utf-8')
    with replacing(paths[2]) as path:
        draw(result, path)
    return paths


def markdown(result: dict) -> str:
    """All tables, under the command, the date and the machine that they belong to."""
    lines = ['# Benchmark', '', f'    {result["command"]}', '', *_origin(result), '']
    for group in result['groups']:
        headers, rows = cells(group)
        lines += [f'## {group["title"]}', '', *_markdown_table(headers, rows), '']
        lines += [line for said in busyness(group) for line in (f'{said}.', '')]
    return '\n'.join([*lines, LEGEND, ''])


def _origin(result: dict) -> list[str]:
    machine = result['machine']
    device = f'{machine["gpu"]}, CUDA {machine["cuda"]}' if machine['gpu'] else 'no GPU used'
    return [
        f'* date: {result["date"]}',
        f'* machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} threads; {device}',
        f'* torch {machine["torch"]}, Python {machine["python"]}, {machine["system"]}; load at the start '
        f'{machine["load"]}',
    ]


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    clean = [[cell.replace('|', r'\|') for cell in row] for row in rows]
    alignment = ['---', *('---' if header in ('note', 'over') else '---:' for header in headers[1:])]
    return [f'| {" | ".join(row)} |' for row in (headers, alignment, *clean)]


@rc_context({'text.parse_math': False})  # a name with $ in it is no formula
def draw(result: dict, path: str | Path) -> None:
    """The ratios of every group as bars with their quartiles; yardsticks in light grey."""
    groups = [group for group in result['groups'] if any('ms' in row for row in group['rows'])]
    lines = max((len(group['rows']) for group in groups), default=1)
    columns = min(_CHART_COLUMNS, max(len(groups), 1))
    rows = -(-len(groups) // columns) or 1
    figure = Figure(figsize=(6.5 * columns, rows * (0.28 * lines + 1.1) + 0.8), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, group in zip(axes, groups):
        _draw_group(axis, group)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    origin = ' '.join(line.removeprefix('* ') + ';' for line in _origin(result))
    caption = textwrap.wrap(f'{result["command"]}; {origin}'.rstrip(';'), 95 * columns)
    figure.supxlabel('\n'.join(caption), fontsize=7)
    figure.savefig(path, dpi=120, metadata=dict(Description=result['command']))


def _draw_group(axis, group: dict) -> None:
    rows = [row for row in group['rows'] if 'ms' in row][::-1]
    for i, row in enumerate(rows):
        is_yardstick = row['name'] == CONV_ONLY or row['name'].endswith(reference_of(''))
        kind = 'reference' if is_yardstick else 'baseline' if row['over'] is None else 'ours'
        ratio = row.get('ratio', 1.0)
        error = [[ratio - row.get('ratio_q1', ratio)], [row.get('ratio_q3', ratio) - ratio]]
        axis.barh(i, ratio, color=_COLOURS[kind], xerr=error, error_kw=dict(lw=1, capsize=2))
        right = row.get('ratio_q3', ratio)
        digits = 0 if row['ms'] >= 100 else 1 if row['ms'] >= 10 else 2
        axis.annotate(
            f'{ratio:.2f}  ({row["ms"]:.{digits}f} ms)',
            (right, i),
            (4, 0),
            textcoords='offset points',
            va='center',
            fontsize=7,
        )
    axis.set_yticks(range(len(rows)), [row['name'] for row in rows], fontsize=8)
    axis.axvline(1, color='black', lw=0.8, ls=':')
    axis.margins(x=0.25)
    axis.set_xlim(left=0)
    axis.set_title(group['title'], fontsize=9, loc='left')
    axis.set_xlabel('time over that of the baseline', fontsize=7)
    axis.tick_params(axis='x', labelsize=7)
    for side in ('top', 'right'):
        axis.spines[side].set_visible(False)
