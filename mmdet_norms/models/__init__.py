"""Hosts that stock mmdet lacks."""

from .heads import NormFCNMaskHead, NormShared4Conv1FCBBoxHead
from .resnet import NormRegNet, NormRes2Net, NormResNeSt, NormResNet, NormResNetV1d, NormResNeXt

__all__ = [
    'NormFCNMaskHead',
    'NormRegNet',
    'NormRes2Net',
    'NormResNeSt',
    'NormResNeXt',
    'NormResNet',
    'NormResNetV1d',
    'NormShared4Conv1FCBBoxHead',
]
