#!/usr/bin/env python
"""Measure what the norms cost; see ``python tools/benchmark.py --help``."""

import os
import sys
from pathlib import Path

# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# CPU threads that spin for long while they wait cost a factor of ten where something else uses a core
os.environ.setdefault('GOMP_SPINCOUNT', '10000')
# the profiler's allocator would warn of memory that is older than the profile
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

from mmdet_norms.cli.benchmark import main

if __name__ == '__main__':
    main()
