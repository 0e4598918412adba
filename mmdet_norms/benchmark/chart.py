"""One chart for people in a hurry: a training step over batch norm's, published formulation against ours."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..files import replacing
from .groups import reference_of

FORMATS = ('.svg', '.png')
_LABELS = {
    'bnet3': 'BNET-3', 'bnet5': 'BNET-5', 'bnet7': 'BNET-7', 'mabn': 'MABN', 'an': 'AN', 'an-gn': 'AN (group norm)',
    'cbn': 'CBN',
}  # fmt: skip
# The background is left out, and these are read on white and on black.
_PUBLISHED, _OURS, TEXT = '#9aa3ad', '#2f86dd', '#747d88'
STYLE = {
    'text.parse_math': False,
    'text.color': TEXT,
    'axes.edgecolor': TEXT,
    'xtick.color': TEXT,
    'ytick.color': TEXT,
    'axes.labelcolor': TEXT,
    'font.size': 10,
    'svg.fonttype': 'none',  # text stays text
    'svg.hashsalt': 'mmdet_norms',  # the same file for the same numbers
}


def pairs(result: dict) -> list[tuple[str, float, float]]:
    """Name, ratio of the published formulation, and ours, of every layer whose training step has both.

    Args:
        result: what ``benchmark.json`` holds. A layer by itself goes before one with a convolution in front (CBN).
    """
    found = {}
    for level, also in (('layer', ''), ('conv', ' and its convolution')):
        for group in result['groups']:
            rows = {row['name']: row for row in group['rows'] if 'ratio' in row}
            for name, row in rows.items() if (group['level'], group['mode']) == (level, 'forward+backward') else ():
                published = rows.get(reference_of(name))
                if published is not None and name not in found:
                    found[name] = (_LABELS.get(name, name) + also, published['ratio'], row['ratio'])
    return list(found.values())


def draw(result: dict, path: str | Path) -> None:
    """Write the chart; ``path`` ends in one of :data:`FORMATS`.

    Raises:
        ValueError: nothing was measured beside its published formulation.
    """
    bars = pairs(result)
    if not bars:
        raise ValueError('no training step of a layer was measured beside its published formulation')
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 0.52 * len(bars) + 1.0), layout='constrained')
        axis = figure.subplots()
        for i, (_, *ratios) in enumerate(bars):
            for offset, ratio, colour in zip((-0.19, 0.19), ratios, (_PUBLISHED, _OURS)):
                axis.barh(i + offset, ratio, 0.36, color=colour)
                beside = max(ratio, 1)  # not on the dotted line
                axis.annotate(f'{ratio:.2f}', (beside, i + offset), (4, 0), textcoords='offset points', va='center')
        axis.set_yticks(range(len(bars)), [label for label, *_ in bars])
        axis.invert_yaxis()
        axis.axvline(1, color=TEXT, lw=1, ls=':')
        axis.set_xlabel("time of a training step, in units of batch norm's (dotted)")
        axis.margins(x=0.06)
        axis.tick_params(axis='y', length=0)
        for side in ('top', 'right', 'left'):
            axis.spines[side].set_visible(False)
        for y, (text, colour) in enumerate((('published formulation', _PUBLISHED), ('mmdet_norms', _OURS))):
            place = (0.985, 0.04 + 0.09 * (1 - y))
            axis.text(*place, f'■ {text}', color=colour, transform=axis.transAxes, ha='right', va='bottom')
        save(figure, path)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in :data:`STYLE`, whole or not at all, and the same bytes for the same numbers."""
    with replacing(Path(path)) as unfinished:
        figure.savefig(
            unfinished,
            format=Path(path).suffix[1:],
            transparent=True,
            dpi=150,
            metadata={'Date': None} if Path(path).suffix == '.svg' else {},
        )
