#!/usr/bin/env python
"""Look at the images of a data set as training sees them; see ``python tools/browse.py --help``."""

import os
import sys
from pathlib import Path

# lets the script run from a checkout in which the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# CPU threads that spin for long while they wait cost a factor of ten where something else uses a core
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

from mmdet_norms.cli.browse import main

if __name__ == '__main__':
    main()
