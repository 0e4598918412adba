"""The ops that this package supplies in plain PyTorch, by the names that mmcv's extension has for them.

They have the signatures that mmcv's Python wrappers call: results are written into the tensors passed in. Autograd
comes from the wrappers (``mmcv.ops.roi_align`` and so on).
"""

from .deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from .focal_loss import sigmoid_focal_loss_backward, sigmoid_focal_loss_forward
from .nms import nms, softnms
from .roi_align import roi_align_backward, roi_align_forward

OPS = {
    op.__name__: op
    for op in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
    )
}
