"""The published layers as their papers have them: one method per file, to be read, measured against and tested against.

Each makes the passes over the feature map that its formula names, in plain torch, and does nothing beyond it: no empty
batches, no mixed precision, no checks. To train, use :mod:`mmdet_norms.layers`, which is tested to be equal. A state
dict has the published keys, so a state of ours loads. Independent implementations from the papers' maths.
"""

from .an import ReferenceAN
from .bnet import ReferenceBNET
from .cbn import ReferenceCBN
from .mabn import ReferenceCenConv2d, ReferenceMABN
from .mabn_groups import ReferenceGroupedMABN

REFERENCES = dict(BNET=ReferenceBNET, CBN=ReferenceCBN, MABN=ReferenceMABN, AN=ReferenceAN)
"""The reference of each layer by the name that ``norm_cfg.type`` takes."""

__all__ = [
    'REFERENCES',
    'ReferenceAN',
    'ReferenceBNET',
    'ReferenceCBN',
    'ReferenceCenConv2d',
    'ReferenceGroupedMABN',
    'ReferenceMABN',
]
