"""Backbones and heads that stock mmdet lacks."""

from . import legacy  # noqa: F401  (registers the conventions of published checkpoints)
from .activations import BentIdentity, Mila
from .aognet import AOGNet
from .heads import NormFCNMaskHead, NormShared4Conv1FCBBoxHead
from .mini import MiniNeStBA, MiniNeStBN, MiniNet, ResNeSt50, XMiniNet, XSEMiniNet
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
    'BentIdentity',
    'Mila',
    'MiniNeStBA',
    'MiniNeStBN',
    'MiniNet',
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
    'ResNeSt50',
    'XMiniNet',
    'XSEMiniNet',
]
