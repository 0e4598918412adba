"""Where norms sit in a detector. Config dicts in, config dicts out; the named choices are in ``table.py``."""

from .apply import apply_norm
from .backbone import VARIANTS
from .part import CENTRED, STANDARDIZED
from .replace import replace_norm_cfg
from .table import BATCH_NORM, PLACEMENTS, Placement

__all__ = [
    'BATCH_NORM',
    'CENTRED',
    'PLACEMENTS',
    'STANDARDIZED',
    'VARIANTS',
    'Placement',
    'apply_norm',
    'replace_norm_cfg',
]
