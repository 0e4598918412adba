"""A simulated normalization batch: statistics over consecutive groups of ``norm_batch`` images of a larger batch.

So what the size of that batch does to a network can be measured, with all else of its training as it is: batch and rate
of the optimizer, images per process.
"""

from torch import Tensor

from ._args import ConfigError, is_count


def check_norm_batch(kind: str, norm_batch) -> None:
    """Raise :class:`ConfigError` unless ``norm_batch`` is a whole number of images. ``kind`` is ``norm_cfg.type``."""
    if not is_count(norm_batch):
        raise ConfigError(
            f'norm_cfg of type {kind!r}: norm_batch={norm_batch!r} must be an integer of at least 1: the number of '
            'images whose statistics are taken together; without the key it is the whole batch'
        )


def number_of_groups(kind: str, norm_batch: int, x: Tensor) -> int:
    """Of ``norm_batch`` images each, in the map ``x`` (N, C, H, W). ``kind`` is ``norm_cfg.type``.

    Raises:
        ConfigError: N is no multiple of it.
    """
    images = len(x)
    if images % norm_batch:
        raise ConfigError(
            f'norm_cfg of type {kind!r}: norm_batch={norm_batch} does not divide this batch of {images}, and training '
            f'normalizes whole groups. Write a batch_size that is a multiple of {norm_batch}, such as '
            f'{-(-images // norm_batch) * norm_batch}, and drop_last=True in train_dataloader, as the last batch of an '
            'epoch may be smaller. A head whose batch are regions of interest cannot have norm_batch'
        )
    return images // norm_batch
