"""Precise statistics: before an evaluation, running statistics are computed anew with the weights that it judges."""

import copy
import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..compat.loading import has_batches, replace_batch_sampler
from ..errors import UserError
from .rng import NumberedBatches, random_state, set_random_state, trained_batch_size
from .statistics import recompute_statistics, updated_norms
from .together import announce_saving, model_of, models_of

KEY = 'precise_bn'
"""Where a checkpoint says so: ``dict(version, images, batch_size, training)``, the last being training's own."""


@HOOKS.register_module()
class PreciseBNHook(Hook):
    """Recompute running statistics over training images for each evaluation and checkpoint (``--precise-bn N``).

    Training moves them a little with every batch while the weights change, so they are those of no weights. Here the
    weights stand still: the statistics become their averages over batches of training images
    (:func:`mmdet_norms.recompute_statistics`, which says what that is for each norm), as fvcore's precise batch norm.

    * Evaluations and checkpoints have the precise statistics, so a test of a checkpoint gives the AP that its
      validation gave. The checkpoint says so under ``precise_bn``, and so does ``results.json``.
    * Training goes on with its own, bit by bit as without the hook. They are in the checkpoint, too, and ``--resume``
      takes them. (fvcore's hook lets training go on with the precise ones, which BRN's next steps would notice.)
    * The images, their order and augmentation depend on ``seed`` alone: the same ones in every evaluation, in a
      resumed run and in a test. Generators, data loader and the states of the model are as before.
    * Of averaged weights (EMAHook), they are the statistics with these weights.
    * Several processes share the images. Norms that ``norm_eval`` or ``frozen_stages`` fix keep what they have.

    Args:
        num_images: how many images, rounded up to whole batches of ``train_dataloader.batch_size``; all of the training
            set, if it has fewer. A test warns where the checkpoint was trained in batches of another size.
        seed: which images. Default 0.
        at_test: recompute them for a test, too, whose checkpoint may lack them. Default False.
    """

    # EMAHook has put its averages into the model, SyncBuffersHook has made the processes agree; nothing is saved yet
    priority = 'BELOW_NORMAL'

    def __init__(self, num_images: int, seed: int = 0, at_test: bool = False) -> None:
        if not isinstance(num_images, int) or num_images < 1:
            raise UserError(f'PreciseBNHook: num_images={num_images!r} must be a number of images, 1 or more')
        self.num_images, self.seed, self.at_test = num_images, seed, at_test
        self.precise: dict | None = None
        self.trained_batch_size: int | None = None  # of the checkpoint that is tested
        self.batch_seconds: list[float] = []  # of the last time
        self.other_seconds = 0.0
        self._fresh: dict[str, Tensor] | None = None
        self._own: list[tuple[Tensor, Tensor]] = []

    def before_run(self, runner: Runner) -> None:
        """Be told before every checkpoint, and have what must come before EMAHook done before it."""
        announce_saving(runner)
        if not any(isinstance(hook, _PreciseBNFirst) for hook in runner.hooks):
            runner.register_hook(_PreciseBNFirst(self), priority='VERY_HIGH')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """The weights are about to change."""
        self._fresh = None

    def before_val_epoch(self, runner: Runner) -> None:
        """Put precise statistics into the model that is judged."""
        self._put_in(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        """Put precise statistics into the model that is judged, if the test is to."""
        if self.at_test:
            self._put_in(runner)
            self._compare_batch_sizes(runner)

    def before_saving(self, runner: Runner) -> None:
        """Called in all processes before a checkpoint is written."""
        if self._fresh is None:
            self.compute(runner)

    def compute(self, runner: Runner) -> None:
        """Compute them with the weights of training, or their averages; the model stays as it is."""
        model, *averages = models_of(runner)
        self._compute(runner, averages[0].module if averages else model)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Precise statistics into the weights, training's own beside them."""
        if self._fresh:
            state = checkpoint['state_dict']
            checkpoint[KEY] = dict(version=1, **self.precise, training={key: state[key] for key in self._fresh})
            state.update((key, value.to(state[key].device)) for key, value in self._fresh.items())

    def put_back(self) -> None:
        """Training's own statistics into the model, after an evaluation."""
        for buffer, value in self._own:
            buffer.copy_(value)
        self._own = []

    def _put_in(self, runner: Runner) -> None:
        model = model_of(runner)
        if self._fresh is None:
            self._compute(runner, model)
        state = _buffers(model)
        self._own = [(state[key], state[key].clone()) for key in self._fresh]
        for key, value in self._fresh.items():
            state[key].copy_(value)

    def _compare_batch_sizes(self, runner: Runner) -> None:
        trained, own = self.trained_batch_size, self.precise and self.precise['batch_size']
        if trained and own and trained != own:
            runner.logger.warning(
                f'Precise statistics are of batches of {own} images, as the config says, but the checkpoint was '
                f'trained in batches of {trained}, which have others. Give the config in its work dir, or '
                f'--cfg-options train_dataloader.batch_size={trained}'
            )

    def _compute(self, runner: Runner, model: nn.Module) -> None:
        """``self._fresh``: what the statistics of ``model`` should be, by their names in a state dict."""
        self._fresh = {}
        # a copy, since losses and heads have states of their own, in any form; what looks into layers is no part of it
        looking = {id(one): one for one in (runner, *runner.hooks)}
        twin = copy.deepcopy(model, {**looking, **_shared(model)}).train()
        if not updated_norms(twin):
            runner.logger.info('Precise statistics: no norm of this model has running statistics that training updates')
            return
        begin = time.monotonic()
        with _left_as_it_was(runner):
            _seed_all(self.seed, get_rank())
            loader, batches, batch_size = self._loader(runner)
            self.batch_seconds = []
            names = recompute_statistics(twin, _timed(loader, self.batch_seconds))
        images = batches.images * get_world_size()
        took = time.monotonic() - begin
        self.other_seconds = took - sum(self.batch_seconds)
        norms = [twin.get_submodule(name) for name in names]
        statistics = {id(getattr(norm, key, None)) for norm in norms for key in ('running_mean', 'running_var')}
        self._fresh = {key: value for key, value in _buffers(twin).items() if id(value) in statistics}
        self.precise = dict(images=images, batch_size=batch_size)
        runner.logger.info(
            f'Precise statistics: {len(names)} norms, {images} training images in batches of {batch_size}, {took:.1f} s'
        )

    def _loader(self, runner: Runner) -> tuple[DataLoader, '_First', int]:
        """Batches as in training, as many as there should be, which these are, and how many images a whole one has."""
        cfg, loop = runner._train_dataloader, runner._train_loop
        if not isinstance(cfg, dict):
            raise UserError(
                'PreciseBNHook (--precise-bn) recomputes statistics over training images, and the config has no '
                f'train_dataloader that is a dict, but {cfg!r}'
            )
        sliced = 'num_batch_per_epoch' in cfg
        cfg = {key: value for key, value in cfg.items() if key not in ('num_batch_per_epoch', 'persistent_workers')}
        if isinstance(loop, BaseLoop):  # its data are loaded already
            dataset = loop.dataloader.dataset
            cfg['dataset'] = _Copied(vars(dataset).get('_dataset', dataset) if sliced else dataset)
        loader = runner.build_dataloader(cfg, seed=self.seed)
        if not has_batches(loader):
            raise UserError('PreciseBNHook (--precise-bn): the training data cannot be chosen by number')
        batch_size = getattr(loader.batch_sampler, 'batch_size', None) or cfg['batch_size']
        images = min(self.num_images, len(loader.dataset))
        batches = _First(loader.batch_sampler, math.ceil(images / (batch_size * get_world_size())))
        replace_batch_sampler(loader, NumberedBatches(batches, self.seed, get_rank()), self.seed)
        return loader, batches, batch_size


class _PreciseBNFirst(Hook):
    """The part of :class:`PreciseBNHook` that comes before EMAHook takes its averages out of the model again."""

    def __init__(self, hook: PreciseBNHook) -> None:
        self._hook = hook

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called before the weights go into the model."""
        if runner._resume:
            take_training_statistics(checkpoint)
        self._hook.trained_batch_size = trained_batch_size(checkpoint)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Training goes on as if nothing had been."""
        self._hook.put_back()

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """The model as it was loaded."""
        self._hook.put_back()


def precise_statistics(checkpoint: dict) -> dict | None:
    """What a checkpoint says of its running statistics: ``dict(images, batch_size)`` where they are precise."""
    entry = checkpoint.get(KEY)
    if not isinstance(entry, dict) or not isinstance(entry.get('training'), dict):
        return None
    return {key: entry.get(key) for key in ('images', 'batch_size')}


def take_training_statistics(checkpoint: dict) -> None:
    """Of a checkpoint to resume from: the statistics that training had. Before EMAHook exchanges its weights."""
    if precise_statistics(checkpoint) is not None:
        checkpoint['state_dict'].update(checkpoint.pop(KEY)['training'])


class _First:
    """The first batches of a batch sampler, whose passes follow each other; and how many ``images`` they had."""

    def __init__(self, batch_sampler, number: int) -> None:
        self.batch_sampler, self.number, self.images = batch_sampler, number, 0

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator:
        left, epoch, self.images = self.number, 0, 0
        while left:
            before = left
            sampler = getattr(self.batch_sampler, 'sampler', self.batch_sampler)
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)
            for batch in self.batch_sampler:
                self.images += len(batch)
                yield batch
                left -= 1
                if not left:
                    return
            if left == before:  # no image at all
                return
            epoch += 1


def _timed(batches: Iterable, seconds: list[float]) -> Iterator:
    """The batches, and how long each took to come and to be worked on."""
    last = time.monotonic()
    for batch in batches:
        yield batch
        last, before = time.monotonic(), last
        seconds.append(last - before)


class _Copied:
    """A data set in the config of a loader, which mmengine copies: transforms keep images, annotations are shared."""

    def __init__(self, dataset: object) -> None:
        self.dataset = dataset

    def __deepcopy__(self, memo: dict) -> object:
        return copy.deepcopy(self.dataset, {id(array): array for array in _arrays(self.dataset)})


def _arrays(node: object, depth: int = 0) -> Iterator[np.ndarray]:
    """The annotations that mmengine's data sets keep as bytes, which nobody changes."""
    inside = vars(node) if hasattr(node, '__dict__') and depth < 8 else {}
    yield from (value for value in inside.values() if isinstance(value, np.ndarray))
    for name in ('dataset', '_dataset', 'datasets'):
        children = inside.get(name)
        for child in children if isinstance(children, (list, tuple)) else [children]:
            yield from _arrays(child, depth + 1) if child is not None else ()


def _shared(model: nn.Module) -> dict:
    """What a copy of ``model`` has in common with it or takes as numbers, since it cannot be copied."""
    memo = {}
    for value in (value for module in model.modules() for value in _inside(vars(module))):
        if isinstance(value, Tensor) and not value.is_leaf:  # weight_norm, and what heads keep of the last forward
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, torch.distributed.ProcessGroup if torch.distributed.is_available() else ()):
            memo[id(value)] = value
    return memo


def _inside(node: object) -> Iterator[object]:
    if isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _inside(child)
    else:
        yield node


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, by their names in a checkpoint."""
    return model.state_dict(keep_vars=True)


@contextmanager
def _left_as_it_was(runner: Runner) -> Iterator[None]:
    """Generators, and what heads ask about progress, which a test does not know."""
    state = random_state()
    hub = runner.message_hub
    unknown = [key for key in ('iter', 'epoch') if hub.get_info(key) is None]
    try:
        for key in unknown:
            hub.update_info(key, 0)
        yield
    finally:
        for key in unknown:
            hub.runtime_info.pop(key)
        set_random_state(state)


def _seed_all(seed: int, rank: int) -> None:
    number = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
