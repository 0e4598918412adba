"""What the placement has to know of a norm, by the ``norm_cfg`` that names it."""

from collections.abc import Mapping

from torch import nn

from ..entries import is_a, name_of

# Keys that mean in these norms what they mean in batch norm.
_EPS_AND_MOMENTUM = ('BN', 'SyncBN', 'GhostBN', 'BNET', 'AN', 'SN')
_EPS = ('FrozenBN', 'BRN', 'CBN')


def is_of_maps(norm_cfg: Mapping) -> bool:
    """Whether another norm may replace it: not the layer norm of tokens."""
    return name_of(norm_cfg) in (
        'BN', 'SyncBN', 'GhostBN', 'GN', 'LN2d', 'IN', 'BNET', 'CBN', 'MABN', 'AN', 'BRN', 'SN', 'FrozenBN'
    )  # fmt: skip


def is_batch_norm(norm_cfg: Mapping) -> bool:
    """Whether it has running statistics that checkpoints of batch norm have; a user's own subclasses included."""
    return is_a(norm_cfg, ('BN', 'SyncBN', 'GhostBN', nn.BatchNorm2d, nn.SyncBatchNorm))


def is_plain_batch_norm(norm_cfg: Mapping) -> bool:
    return is_a(norm_cfg, ('BN', nn.BatchNorm2d))


def fills_backbones(norm_cfg: Mapping) -> bool:
    """Whether a named choice puts it everywhere in a backbone. It loads batch norm's checkpoints, so BN may return."""
    return name_of(norm_cfg) in ('MABN', 'BRN', 'SN', 'FrozenBN')


def needs_conv(norm_cfg: Mapping) -> bool:
    """Whether an ordinary convolution must be in front."""
    return name_of(norm_cfg) in ('CBN', 'MABN')


def has_keys_of_batch_norm(norm_cfg: Mapping) -> bool:
    return name_of(norm_cfg) in _EPS_AND_MOMENTUM + _EPS or is_batch_norm(norm_cfg)


def keys_of_batch_norm(norm_cfg: Mapping) -> tuple[str, ...]:
    """Keys that mean what they mean in batch norm.

    Where a model's batch norm has its own (YOLOX, EfficientNet), they are handed on, without which its pretrained
    weights would be another function.
    """
    if norm_cfg.get('norm') == 'GN':  # AN around group norm
        return ()
    name = name_of(norm_cfg)
    return ('eps', 'momentum') if name in _EPS_AND_MOMENTUM else ('eps',) if name in _EPS else ()
