#!/usr/bin/env python
"""Train every norm for 2,000 steps on maps of changing size, some empty, some with an inf or nan: does memory grow?

Run by hand; a few minutes on a CPU. ``python tools/soak.py [--norm NAME ...] [--iterations N]``. Ends with status 1 if
a state became inf or nan, or if more tensors are alive at the end than ever in the second half.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# CPU threads that spin for long while they wait cost a factor of ten where something else uses a core
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

from mmdet_norms.benchmark.soak import HEADER, NORMS, row, soak

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--norm', nargs='+', choices=NORMS, default=list(NORMS), metavar='NAME')
    parser.add_argument('--iterations', type=int, default=2000)
    args = parser.parse_args()
    warnings.simplefilter('ignore')  # MABN's and SyncBN's, of settings that are meant
    results = []
    print(HEADER)
    for name in args.norm:
        results.append(soak(name, args.iterations))
        print(row(results[-1]), flush=True)
    sys.exit(any(not r.finite or r.tensors > 0 for r in results))
