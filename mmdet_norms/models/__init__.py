"""Hosts that stock mmdet lacks."""

from .resnet import NormRegNet, NormRes2Net, NormResNeSt, NormResNet, NormResNetV1d, NormResNeXt

__all__ = ['NormRegNet', 'NormRes2Net', 'NormResNeSt', 'NormResNeXt', 'NormResNet', 'NormResNetV1d']
