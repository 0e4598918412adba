"""Checkpoints that the authors published, converted to mmdet 3.x: layouts as data, one function that applies them."""

from ..compat.checkpoints import UntrustedCheckpointError
from .convert import ConversionError, Converted, check_destination, convert
from .layouts import LAYOUTS
from .report import Report

__all__ = [
    'LAYOUTS',
    'ConversionError',
    'Converted',
    'Report',
    'UntrustedCheckpointError',
    'check_destination',
    'convert',
]
