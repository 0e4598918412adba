"""Measure norm layers, convolutions with norms, and detectors against batch norm, in interleaved runs."""

from .classifiers import Classifiers, resnet50
from .detectors import Detectors
from .groups import Case, Entry, Group, Setting
from .layers import conv_group, layer_group

__all__ = [
    'Case',
    'Classifiers',
    'Detectors',
    'Entry',
    'Group',
    'Setting',
    'conv_group',
    'layer_group',
    'resnet50',
]
