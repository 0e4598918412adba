"""Shared fixtures."""

import os
from pathlib import Path

# One thread here and in every process that a test starts: tiny tensors gain nothing from more, and sums in another
# order would not resume bit for bit. Before torch is imported, which reads it once.
os.environ['OMP_NUM_THREADS'] = '1'

import numpy as np
import pytest

import mmdet_norms  # noqa: F401  (before any test imports mmdet's models, which need mmcv's ops)

ROOT = Path(__file__).resolve().parents[1]
# Numbers recorded from the published layers: a small copy in the repository, the full set beside the checkout.
_GOLDEN = (ROOT / 'tests' / 'data' / 'golden', ROOT.parent / 'shared' / 'golden')


@pytest.fixture
def golden():
    """Load a file of golden numbers by name as a dict of arrays; skip where it is not to be had."""

    def load(name: str) -> dict[str, np.ndarray]:
        for folder in _GOLDEN:
            if (folder / name).exists():
                with np.load(folder / name) as data:
                    return dict(data)
        pytest.skip(f'golden numbers {name} are not in this checkout')

    return load
