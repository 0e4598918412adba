"""Hosts that stock mmdet lacks."""

from . import legacy  # noqa: F401  (registers the conventions of published checkpoints)
from .aognet import AOGNet
from .heads import NormFCNMaskHead, NormShared4Conv1FCBBoxHead
from .other_backbones import (
    NormCSPDarknet,
    NormCSPNeXt,
    NormDarknet,
    NormEfficientNet,
    NormHRNet,
    NormMobileNetV2,
)
from .resnet import (
    NormDetectoRS_ResNet,
    NormDetectoRS_ResNeXt,
    NormRegNet,
    NormRes2Net,
    NormResNeSt,
    NormResNet,
    NormResNetV1d,
    NormResNeXt,
    NormTridentResNet,
)

__all__ = [
    'AOGNet',
    'NormCSPDarknet',
    'NormCSPNeXt',
    'NormDarknet',
    'NormDetectoRS_ResNeXt',
    'NormDetectoRS_ResNet',
    'NormEfficientNet',
    'NormFCNMaskHead',
    'NormHRNet',
    'NormMobileNetV2',
    'NormRegNet',
    'NormRes2Net',
    'NormResNeSt',
    'NormResNeXt',
    'NormResNet',
    'NormResNetV1d',
    'NormShared4Conv1FCBBoxHead',
    'NormTridentResNet',
]
