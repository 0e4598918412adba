#!/usr/bin/env python
"""Draw docs/cost.svg, the chart of the front page, from the first table of docs/performance.md."""

import argparse
import re
import sys
from pathlib import Path

# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_norms.benchmark import chart
from mmdet_norms.benchmark.groups import reference_of

ROOT = Path(__file__).resolve().parents[1]
TABLE, CHART = ROOT / 'docs' / 'performance.md', ROOT / 'docs' / 'cost.svg'
# The first word or words of a row, and what the benchmark calls the layer.
_LAYERS = {'BNET-3': 'bnet3', 'BNET-5': 'bnet5', 'BNET-7': 'bnet7', 'MABN': 'mabn', 'AN (BN)': 'an', 'AN (GN)': 'an-gn'}
_BEHIND_CONV = 'cbn'


def read(text: str) -> dict:
    """The table as the benchmark would have written it to ``benchmark.json``, as far as the chart reads that."""
    table = re.search(r'(?ms)^\| layer \| published \| ours \|.*?\n\|[-|]+\n(.*?)\n\n', text)[1]
    groups = []
    for line in table.splitlines():
        name, published, ours = (cell.strip() for cell in line.strip('|').split('|')[:3])
        level, key = ('layer', _LAYERS[name]) if name in _LAYERS else ('conv', _BEHIND_CONV)
        rows = [dict(name=key, ratio=float(ours)), dict(name=reference_of(key), ratio=float(published))]
        groups.append(dict(level=level, mode='forward+backward', rows=rows))
    return dict(groups=groups)


def main(argv: list[str] | None = None) -> int:
    """Draw it."""
    parser = argparse.ArgumentParser(prog='tools/make_cost_chart.py', description=__doc__)
    parser.add_argument('--out', type=Path, default=CHART, help='default: docs/cost.svg')
    args = parser.parse_args(argv)
    chart.draw(read(TABLE.read_text(encoding='utf-8')), args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
