"""mmdet_norms: normalization layers for object detectors, by name, on stock mmdetection 3.x.

Importing the package registers everything and does nothing else; in a config::

    custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
"""

from .compat import checkpoints, mmcv_ops
from .version import __version__

# First, because mmdet's models import mmcv's compiled ops, which mmcv-lite lacks.
mmcv_ops.install()
checkpoints.allow_own_checkpoints()

from . import engine, models  # noqa: E402, F401  (registers hooks and backbones)
from .placement import PLACEMENTS, apply_norm  # noqa: E402
from .registry import NORM_LAYERS, register_norm_layers  # noqa: E402

register_norm_layers()

__all__ = ['NORM_LAYERS', 'PLACEMENTS', '__version__', 'apply_norm']
