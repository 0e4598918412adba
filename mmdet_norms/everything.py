"""All of the package, imported and registered in the order that this needs: by ``import mmdet_norms``."""

from mmdet_norms_start.ops import step_aside

from .compat import patches

# First, because mmdet's models import mmcv's compiled ops, which mmcv-lite lacks.
step_aside()
patches.install()

from . import checkpoints, classification, engine, models  # noqa: E402, F401  (registers hooks, models, data sets)
from .deploy import fuse  # noqa: E402
from .engine import recompute_statistics  # noqa: E402
from .norms import register_norm  # noqa: E402
from .placement import PLACEMENTS, apply_norm, replace_norm_cfg  # noqa: E402
from .registry import NORM_LAYERS, register_norm_layers  # noqa: E402

register_norm_layers()
patches.install_in_mmdet()
patches.put('mmengine.runner.runner.find_latest_checkpoint', engine.safe_checkpoints.newest_checkpoint)

__all__ = [
    'NORM_LAYERS',
    'PLACEMENTS',
    'apply_norm',
    'fuse',
    'recompute_statistics',
    'register_norm',
    'replace_norm_cfg',
]
