"""A simulated normalization batch: statistics over consecutive groups of ``norm_batch`` images of a larger batch.

So what the size of that batch does to a network can be measured, with all else of its training as it is: batch and rate
of the optimizer, images per process.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.instance_affine import instance_affine, is_supported
from ._args import ConfigError

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def check_norm_batch(kind: str, norm_batch) -> None:
    """Raise :class:`ConfigError` unless ``norm_batch`` is a whole number of images. ``kind`` is ``norm_cfg.type``."""
    if isinstance(norm_batch, bool) or not isinstance(norm_batch, int) or norm_batch < 1:
        raise ConfigError(
            f'norm_cfg of type {kind!r}: norm_batch={norm_batch!r} must be an integer of at least 1: the number of '
            'images whose statistics are taken together; without the key it is the whole batch'
        )


def check_groups(kind: str, norm_batch: int, x: Tensor) -> None:
    """Raise :class:`ConfigError` unless the images of ``x`` can be grouped."""
    images = len(x)
    if images % norm_batch:
        raise ConfigError(
            f'norm_cfg of type {kind!r}: norm_batch={norm_batch} does not divide this batch of {images}, and training '
            f'normalizes whole groups. Write a batch_size that is a multiple of {norm_batch}, such as '
            f'{-(-images // norm_batch) * norm_batch}, and drop_last=True in train_dataloader, as the last batch of an '
            'epoch may be smaller. A head whose batch are regions of interest cannot have norm_batch'
        )


def normalize_groups(x: Tensor, norm_batch: int, rule: Rule) -> Tensor:
    """``y = scale * (x - origin) + shift`` with parameters that ``rule`` computes from the moments of every group.

    Args:
        x: ``(N, C, H, W)``, N a multiple of ``norm_batch`` and not 0.
        rule: ``(mean, var) -> (scale, origin, shift)``; mean and biased variance of the groups, all ``(G, C)`` and in
            fp32, or fp64 for fp64 maps. Gradients flow through them, of any order.
    """
    if is_supported(x):
        return instance_affine(x, rule, len(x) // norm_batch)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, norm_batch))
    var, mean = torch.var_mean(wide, (1, 3, 4), correction=0)
    scale, origin, shift = (rows[:, None, :, None, None] for rows in rule(mean, var))
    return (scale * (wide - origin) + shift).flatten(0, 1).to(x.dtype)
