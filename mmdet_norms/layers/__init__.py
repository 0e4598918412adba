"""What a norm is: one method per file, importing torch only."""

from ._contract import NORMS, Contract, contract_of
from ._fold import batch_norm_affine, fold_affine, fold_batch_norm
from ._loading import AnotherFunctionError, AnotherFunctionWarning, another_function_allowed
from ._running_statistics import run_batch_norm
from ._with_batch_norm import WithBatchNorm
from .an import AN
from .batch_instance_norm import BIN
from .batch_renorm import BRN
from .bnet import BNET
from .cbn import CBN, link_convs
from .cen_conv import CenConv2d, warn_if_uncentred
from .frozen_bn import FrozenBN
from .ghost import GhostBN
from .group_norm import GN
from .layer_norm import LN2d
from .mabn import MABN
from .representative_bn import RBN
from .switch_norm import SN
from .sync_bn import SyncBN

NORMS.update(
    (cls.__name__, cls) for cls in (AN, BIN, BNET, BRN, CBN, FrozenBN, GhostBN, GN, LN2d, MABN, RBN, SN, SyncBN)
)

__all__ = [
    'AN',
    'BIN',
    'BNET',
    'BRN',
    'CBN',
    'GN',
    'MABN',
    'NORMS',
    'RBN',
    'SN',
    'AnotherFunctionError',
    'AnotherFunctionWarning',
    'CenConv2d',
    'Contract',
    'FrozenBN',
    'GhostBN',
    'LN2d',
    'SyncBN',
    'WithBatchNorm',
    'another_function_allowed',
    'batch_norm_affine',
    'contract_of',
    'fold_affine',
    'fold_batch_norm',
    'link_convs',
    'run_batch_norm',
    'warn_if_uncentred',
]
