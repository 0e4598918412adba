#!/usr/bin/env python
"""Draw what is inside the norms of runs; see ``python tools/analyze.py --help``."""

import sys
from pathlib import Path

# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_norms_start.commands import run

if __name__ == '__main__':
    run('analyze')
