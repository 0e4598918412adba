"""The box, anchor, RoI, mask and image conventions of mmdet 0.x / 1.x and maskrcnn-benchmark, for their checkpoints.

Those count pixels inclusively: the last column of a box belongs to it, so its width is ``x2 - x1 + 1``. All parts here
store ``x2' = x2 + 1`` (and ``y2'``), for which mmdet 3.x's own arithmetic (deltas, IoU, NMS, level of a RoI, width in
the results) is the legacy one. What that leaves is here, each part with the switch ``convention``:

=============================== ============================================================================
``PlusOneAnchorGenerator``      rounded anchors centred at ``(stride - 1) / 2``
``PlusOneDeltaXYWHBBoxCoder``   clipping to the image, and to which sizes a delta may shrink a box
``PlusOneRoIExtractor``         where RoIAlign starts and ends, its smallest RoI
``PlusOne*BBoxHead``            how boxes get back to the original image, and at which scale NMS runs
``PlusOneFCNMaskHead``          how a mask is pasted into the image
``LegacyResize``                size and scale factor of the resized image
=============================== ============================================================================

Off unless a config names them, as :func:`use_geometry` lets it. ``docs/legacy-geometry.md`` has the formulas.
"""

from .boxes import PlusOneAnchorGenerator, PlusOneDeltaXYWHBBoxCoder, boxes_to_original_image
from .conventions import CONVENTIONS, MASKRCNN_BENCHMARK, MMDET_V1
from .geometry import use_geometry
from .heads import PlusOneFCNMaskHead, PlusOneShared2FCBBoxHead, PlusOneShared4Conv1FCBBoxHead
from .resize import LegacyResize
from .rois import PlusOneRoIAlign, PlusOneRoIExtractor

__all__ = [
    'CONVENTIONS',
    'MASKRCNN_BENCHMARK',
    'MMDET_V1',
    'LegacyResize',
    'PlusOneAnchorGenerator',
    'PlusOneDeltaXYWHBBoxCoder',
    'PlusOneFCNMaskHead',
    'PlusOneRoIAlign',
    'PlusOneRoIExtractor',
    'PlusOneShared2FCBBoxHead',
    'PlusOneShared4Conv1FCBBoxHead',
    'boxes_to_original_image',
    'use_geometry',
]
