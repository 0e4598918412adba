"""What a norm says of itself, as class data: all that the rest of the package asks, so that no table names classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

NORMS: dict[str, type[nn.Module]] = {}
"""The norm layers by the name that ``norm_cfg.type`` takes."""


@dataclass(frozen=True)
class Contract:
    """``contract = Contract(kind, ...)`` in the body of a norm; one without is a norm of which nothing is known.

    Beside it there is ``_abbr_``, which is mmcv's: the name of the attribute in host models.

    Args:
        kind: what a state that it saved is called, also for people; subclasses inherit it.
        marks: keys of its state dict that only it has, by which such a state is recognized.
        loads: kinds of other states that it can be, as the identical function in eval mode; see :mod:`._loading`.
        why_not: other kind -> why it cannot be that function, where there is more to say.
        kind_without_statistics: the same of a state with its marks, but without running statistics, if that is another
            function.
        as_in_bn: keys of ``norm_cfg`` that mean what they mean in batch norm, so that a host may hand on its own.
        behind: ``conv_cfg.type`` of the convolution that it needs in front: 'Conv2d' or 'CenConv'. None: anything.
        batch_norm: attribute of the batch norm that it is in eval mode, or begins with there. Empty: it has none, or
            is one itself.
        grouped_as: ``norm_cfg.type`` under which it takes ``norm_batch``. None: it does not.
        is_differentiable_twice: whether its training has second derivatives.
        stays: why nothing of it can be folded into a convolution; for one without ``fold_into``.
        counters: values of its state that every training forward moves by one.
    """

    kind: str
    marks: tuple[str, ...] = ()
    loads: tuple[str, ...] = ()
    why_not: Mapping[str, str] = field(default_factory=dict)
    kind_without_statistics: str = ''
    as_in_bn: tuple[str, ...] = ()
    behind: str | None = None
    batch_norm: str = ''
    grouped_as: str | None = None
    is_differentiable_twice: bool = True
    stays: str = ''
    counters: tuple[str, ...] = ()


_OWN_STATISTICS = 'its statistics come from the input'
STOCK: dict[type[nn.Module], Contract] = {
    _BatchNorm: Contract('BN', as_in_bn=('eps', 'momentum'), counters=('num_batches_tracked',)),
    _InstanceNorm: Contract('IN', stays=_OWN_STATISTICS),
    nn.GroupNorm: Contract('GN', stays=_OWN_STATISTICS),
    nn.LayerNorm: Contract('LN', stays=_OWN_STATISTICS),
}
"""The contracts of torch's own norms."""


def contract_of(norm: nn.Module | type) -> Contract:
    """The contract of a norm, or of a class of norms; an empty one of anything else."""
    cls = norm if isinstance(norm, type) else type(norm)
    if isinstance(getattr(norm, 'contract', None), Contract):
        return norm.contract
    return next((STOCK[base] for base in cls.__mro__ if base in STOCK), Contract(cls.__name__))


def is_norm_class(cls: type) -> bool:
    """Whether its objects are norms: torch's, the package's, registered ones, and what is derived from them."""
    return issubclass(cls, (_NormBase, nn.GroupNorm, nn.LayerNorm, *NORMS.values()))
