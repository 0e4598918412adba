"""mmdet's backbones outside the ResNet family with a norm per position."""

from mmdet.models.backbones import CSPDarknet, CSPNeXt, Darknet, EfficientNet, HRNet, MobileNetV2

from ..registry import MODELS
from .norm_at import NormAt


@MODELS.register_module()
class NormDarknet(NormAt, Darknet):
    """mmdet's Darknet-53 (YOLOv3) with :class:`NormAt`'s ``norm_at``; 5 stages, 2 norms per block."""


@MODELS.register_module()
class NormCSPDarknet(NormAt, CSPDarknet):
    """mmdet's CSPDarknet (YOLOX) with ``norm_at``; 4 stages, 2 norms per block (3 with ``use_depthwise``)."""


@MODELS.register_module()
class NormCSPNeXt(NormAt, CSPNeXt):
    """mmdet's CSPNeXt (RTMDet) with ``norm_at``; 4 stages, 3 norms per block: 3x3, depthwise, pointwise."""


@MODELS.register_module()
class NormMobileNetV2(NormAt, MobileNetV2):
    """mmdet's MobileNetV2 with ``norm_at``; 7 stages, 3 norms per block (2 in the first stage, which expands none)."""


@MODELS.register_module()
class NormEfficientNet(NormAt, EfficientNet):
    """mmdet's EfficientNet with ``norm_at``; 5 stages (fewer for smaller ``out_indices``)."""


@MODELS.register_module()
class NormHRNet(NormAt, HRNet):
    """mmdet's HRNet with ``norm_at``; 4 stages: one of Bottlenecks, three of BasicBlocks in parallel branches."""
