"""Data loaders and loops of mmengine that can begin in the middle."""

import time
from collections.abc import Callable, Iterator

import torch
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader, IterableDataset


class InfiniteBatches:
    """Batches without end, pass after pass of a loader, which begins to load when the first one is asked for.

    mmengine's own loads from the moment the loop is built. By the time a checkpoint says where to begin, it has drawn
    from the sampler; to skip the batches of an earlier run, it loads them all.

    Args:
        dataloader: any.
        epoch: number of the first pass, which the sampler was told.
        skip: how many to answer with None first, as the loop asks for every batch of the earlier run.
        begin: makes the iterator of the first pass; None for ``iter(dataloader)``.
    """

    def __init__(
        self, dataloader: DataLoader, epoch: int = 0, skip: int = 0, begin: Callable[[], Iterator] | None = None
    ):
        self.dataloader, self.epoch = dataloader, epoch
        self._skip = skip
        self._begin = begin
        self._iterator: Iterator | None = None

    def __iter__(self) -> 'InfiniteBatches':
        return self

    def __next__(self):
        if self._skip:
            self._skip -= 1
            return None
        if self._iterator is None:
            self._iterator = self._begin() if self._begin else iter(self.dataloader)
        try:
            return next(self._iterator)
        except StopIteration:
            self.epoch += 1
            set_epoch(self.dataloader, self.epoch)
            if self.dataloader.num_workers:
                time.sleep(2)  # as mmengine: workers that stop and start at once can block each other
            self._iterator = iter(self.dataloader)
            return next(self._iterator)


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell the sampler the number of the coming pass, as mmengine does."""
    for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
            return


def has_batches(loader: DataLoader) -> bool:
    """Whether the main process chooses the images of each batch."""
    return (
        isinstance(loader, DataLoader)
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def replace_batch_sampler(loader: DataLoader, batch_sampler, seed: int) -> None:
    """Put another batch sampler into a built loader, which refuses ``loader.batch_sampler = ...``.

    The seeds of its workers no longer come from the main process's generator, where they would be drawn once with
    persistent workers and once an epoch without.
    """
    vars(loader)['batch_sampler'] = batch_sampler
    if loader.generator is None:
        loader.generator = torch.Generator().manual_seed(seed)


def finish_epoch(loop: EpochBasedTrainLoop, begin: Callable[[], Iterator], first: int) -> bool:
    """Have the coming epoch of ``loop`` run from batch ``first`` on, with the batches of ``begin()``.

    Returns:
        False where the loop has an ``run_epoch`` of its own, which is left alone.
    """
    if type(loop).run_epoch is not EpochBasedTrainLoop.run_epoch:
        return False

    def run_epoch() -> None:
        del loop.run_epoch  # the next one is whole
        loop.runner.call_hook('before_train_epoch')
        loop.runner.model.train()
        for number, batch in enumerate(begin(), start=first):
            loop.run_iter(number, batch)
        loop.runner.call_hook('after_train_epoch')
        loop._epoch += 1

    loop.run_epoch = run_epoch
    return True
