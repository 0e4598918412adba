"""Inference: norms folded into their convolutions; saving, loading and exporting what results.

What a layer folds into a convolution, and what remains of the layer, is the layer's own business (``layers/_fold.py``).
What is known here is which convolution is in front of it (``dataflow.py``), and nothing about any method.
"""

from .export import PARTS, RawMaps, export_onnx, is_fused, load_fused, require_onnx, save_fused
from .folding import FuseReport, fuse

__all__ = [
    'PARTS',
    'FuseReport',
    'RawMaps',
    'export_onnx',
    'fuse',
    'is_fused',
    'load_fused',
    'require_onnx',
    'save_fused',
]
