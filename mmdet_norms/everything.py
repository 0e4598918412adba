"""All of the package, imported and registered in the order that this needs: by ``import mmdet_norms``."""

from mmdet_norms_start.ops import step_aside

from .compat import mmcv_ops
from .compat.checkpoints import allow_own_checkpoints
from .compat.loading import load_when_asked
from .compat.own_configs import serve_own_configs
from .compat.safe_files import resume_by, write_whole_files
from .compat.zoo import serve_mmengine

# First, because mmdet's models import mmcv's compiled ops, which mmcv-lite lacks.
step_aside()
mmcv_ops.install()
allow_own_checkpoints()
load_when_asked()
write_whole_files()
serve_mmengine()
serve_own_configs()

from . import checkpoints, classification, engine, models  # noqa: E402, F401  (registers hooks, models, data sets)
from .compat import recalls  # noqa: E402
from .deploy import fuse  # noqa: E402
from .engine import recompute_statistics  # noqa: E402
from .placement import PLACEMENTS, apply_norm, replace_norm_cfg  # noqa: E402
from .registry import NORM_LAYERS, register_norm_layers  # noqa: E402

register_norm_layers()
resume_by(engine.safe_checkpoints.newest_checkpoint)
recalls.install()

__all__ = ['NORM_LAYERS', 'PLACEMENTS', 'apply_norm', 'fuse', 'recompute_statistics', 'replace_norm_cfg']
