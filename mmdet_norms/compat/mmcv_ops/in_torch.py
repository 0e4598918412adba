"""The ops that this package supplies in plain PyTorch, by the names that mmcv's extension has for them.

They have the signatures that mmcv's Python wrappers call: results are written into the tensors passed in. Autograd
comes from the wrappers (``mmcv.ops.roi_align`` and so on).
"""

from . import deform_conv
from .focal_loss import sigmoid_focal_loss_backward, sigmoid_focal_loss_forward
from .nms import nms, softnms
from .roi_align import roi_align_backward, roi_align_forward

OPS = dict(
    nms=nms,
    softnms=softnms,
    roi_align_forward=roi_align_forward,
    roi_align_backward=roi_align_backward,
    sigmoid_focal_loss_forward=sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward=sigmoid_focal_loss_backward,
    **deform_conv.OPS,
)
