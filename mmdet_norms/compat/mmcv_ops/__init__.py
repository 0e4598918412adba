"""The ops of ``mmcv.ops``, for each device from the best that is installed. docs/ops.md says which come from where.

``mmcv-lite`` installs without a compiler but has no ``mmcv._ext``, so ``mmcv.ops`` and with it ``mmdet.models`` do not
import. :func:`install` puts a stand-in in place, with the ops of Faster, Mask, Cascade and Cascade Mask R-CNN and
RetinaNet, and deformable convolution: in PyTorch (:mod:`.in_torch`) and on a GPU, where it is installed, by torchvision
(:mod:`.in_torchvision`). Any other op raises :class:`NotImplementedError` when called. A compiled mmcv goes first, and
gets tensors in the layout that it takes them for (:mod:`.compiled`).
"""

from .choice import active, announce, choices, describe
from .extension import install

__all__ = ['active', 'announce', 'choices', 'describe', 'install']
