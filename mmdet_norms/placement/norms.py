"""What the placement has to know of a norm, by the ``norm_cfg`` that names it."""

from collections.abc import Mapping

from torch import nn

from ..entries import class_of, is_a, name_of
from ..layers import NORMS, Contract, contract_of


def is_of_maps(norm_cfg: Mapping) -> bool:
    """Whether another norm may replace it: not the layer norm of tokens."""
    return name_of(norm_cfg) in ('BN', 'IN', *NORMS)


def is_batch_norm(norm_cfg: Mapping) -> bool:
    """Whether it has running statistics that checkpoints of batch norm have; a user's own subclasses included."""
    return is_a(norm_cfg, ('BN', 'SyncBN', 'GhostBN', nn.BatchNorm2d, nn.SyncBatchNorm))


def is_plain_batch_norm(norm_cfg: Mapping) -> bool:
    return is_a(norm_cfg, ('BN', nn.BatchNorm2d))


def loads_batch_norm(norm_cfg: Mapping) -> bool:
    """Whether it can be the function of a batch norm."""
    return 'BN' in _contract(norm_cfg).loads


def needs_conv(norm_cfg: Mapping) -> bool:
    """Whether an ordinary convolution must be in front."""
    return _contract(norm_cfg).behind is not None


def has_keys_of_batch_norm(norm_cfg: Mapping) -> bool:
    return bool(_contract(norm_cfg).as_in_bn) or is_batch_norm(norm_cfg)


def keys_of_batch_norm(norm_cfg: Mapping) -> tuple[str, ...]:
    """Keys that mean what they mean in batch norm.

    Where a model's batch norm has its own (YOLOX, EfficientNet), they are handed on, without which its pretrained
    weights would be another function.
    """
    return () if norm_cfg.get('norm') == 'GN' else _contract(norm_cfg).as_in_bn  # AN around group norm


def _contract(norm_cfg: Mapping) -> Contract:
    return contract_of(NORMS.get(name_of(norm_cfg)) or class_of(norm_cfg) or object)
