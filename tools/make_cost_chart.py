#!/usr/bin/env python
"""Draw docs/cost.svg, the chart of the front page, from the first table of docs/performance.md."""

import argparse
import re
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_norms.files import replacing

ROOT = Path(__file__).resolve().parents[1]
TABLE, CHART = ROOT / 'docs' / 'performance.md', ROOT / 'docs' / 'cost.svg'
_COLOURS = ('#b4b8bf', '#1f6fb4')
_PLATE = dict(facecolor='white', edgecolor='none', pad=0.6)  # so that no line runs through a number


def read(text: str) -> tuple[list[tuple[str, float, float]], str]:
    """Rows (layer, published, ours) of the first such table, and where they were measured."""
    before, table = re.search(r'(?ms)\A(.*?)^\| layer \| published \| ours \|.*?\n\|[-|]+\n(.*?)\n\n', text).groups()
    rows = []
    for line in table.splitlines():
        name, published, ours = (cell.strip() for cell in line.strip('|').split('|')[:3])
        rows.append((name.split(' (3x3')[0], float(published), float(ours)))
    where = re.findall(r'(?ms)^(\d{4}-\d\d-\d\d, .*?);', before)[-1]
    return rows, ' '.join(where.split())


def description(rows: list[tuple[str, float, float]], where: str) -> str:
    """What the chart shows, in words; the file has it, too."""
    bars = (f'{name}: published {published:.2f}, here {ours:.2f}' for name, published, ours in rows)
    return f'Time over batch norm. {"; ".join(bars)}. {where}'


def draw(rows: list[tuple[str, float, float]], where: str, path: Path) -> None:
    """Two bars a layer: the published formulation, and the layer here; batch norm is the line at 1."""
    # Letters as outlines and no dates: the same file on every machine with the same matplotlib.
    with rc_context({'svg.hashsalt': 'mmdet_norms', 'font.family': 'DejaVu Sans', 'text.parse_math': False}):
        figure = Figure(figsize=(7.6, 0.5 * len(rows) + 1.3), layout='constrained')
        axis = figure.subplots()
        for i, (_, *ratios) in enumerate(rows):
            for k, (ratio, colour) in enumerate(zip(ratios, _COLOURS)):
                y = i + 0.38 * k
                axis.barh(y, ratio, 0.36, color=colour, label=('published', 'mmdet_norms')[k] if i == 0 else None)
                axis.annotate(
                    f'{ratio:.2f}', (ratio, y), (3, 0), textcoords='offset points', va='center', fontsize=8, bbox=_PLATE
                )
        axis.axvline(1, color='black', lw=0.9, ls=':')
        axis.annotate('batch norm', (1, -0.35), (3, 2), textcoords='offset points', fontsize=8)
        axis.set_yticks([i + 0.19 for i in range(len(rows))], [row[0] for row in rows], fontsize=9)
        axis.set_ylim(len(rows) - 0.3, -0.7)
        axis.margins(x=0.08)
        axis.set_title('Forward and backward pass: time over that of batch norm', fontsize=10, loc='left')
        axis.set_xlabel(where, fontsize=7, loc='left')
        axis.tick_params(axis='x', labelsize=8)
        axis.spines[['top', 'right']].set_visible(False)
        axis.legend(loc='lower right', fontsize=9, frameon=False)
        with replacing(path) as unfinished:
            figure.savefig(unfinished, format='svg', metadata=dict(Date=None, Description=description(rows, where)))


def main(argv: list[str] | None = None) -> int:
    """Draw it."""
    parser = argparse.ArgumentParser(prog='tools/make_cost_chart.py', description=__doc__)
    parser.add_argument('--out', type=Path, default=CHART, help='default: docs/cost.svg')
    args = parser.parse_args(argv)
    draw(*read(TABLE.read_text(encoding='utf-8')), args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
