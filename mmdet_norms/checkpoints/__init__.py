"""Checkpoints that the authors published, converted to mmdet 3.x: layouts as data, one function that applies them."""

from ..compat.reading import CheckpointError, UntrustedCheckpointError
from .convert import ConversionError, Converted, check_destination, convert
from .layouts import LAYOUTS
from .report import Report

__all__ = [
    'LAYOUTS',
    'CheckpointError',
    'ConversionError',
    'Converted',
    'Report',
    'UntrustedCheckpointError',
    'check_destination',
    'convert',
]
