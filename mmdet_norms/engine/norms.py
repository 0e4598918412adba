"""What CBN and MABN need of a run, and warnings where a setting defeats a method."""

import math
import warnings
from collections.abc import Iterator

from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..errors import UserError
from ..layers import BRN, CBN, MABN, contract_of, link_convs, warn_if_uncentred
from ..layers._args import is_count
from ..layers._averaging import AveragesOnRequest
from .optim import accumulated_batches
from .together import model_of


@HOOKS.register_module()
class NormHook(Hook):
    """Prepare the norms of a model for training; ``tools/train.py`` adds it to every run.

    * CBN: links each layer to its convolution (activation checkpointing and compilation need it) and turns a burn-in
      in epochs, ``burnin='8e'``, into iterations: of all processes together, also with an infinite sampler.
    * ``norm_batch``: raises a :class:`UserError` if it does not divide the batches, the last of an epoch included.
    * Warns of settings that defeat a method: ``norm_eval=True`` or ``frozen_stages`` over CBN or MABN in the backbone,
      MABN behind a convolution that is not centred, CBN with gradient accumulation, ``norm_eval=True``, mmdet's
      default, over batch norm that no pretrained weights have filled; a training that ends in a method's warm-up.

    In a config for mmdet's own tools: ``custom_hooks=[dict(type='NormHook')]``.
    """

    def before_train(self, runner: Runner) -> None:
        """Called when the data loader and the optimizer exist, before the first iteration."""
        model = model_of(runner)
        link_convs(model)
        require_whole_groups(model, runner.train_dataloader)
        warn_if_uncentred(model)
        layers = [module for module in model.modules() if isinstance(module, CBN)]
        for layer in layers:
            layer.resolve_burnin(iterations_per_epoch(runner.train_dataloader))
        accumulated = accumulated_batches(runner.optim_wrapper)
        if layers and accumulated > 1:
            warnings.warn(
                f'optim_wrapper.accumulative_counts={accumulated}: every accumulated batch is an iteration of CBN, and '
                'batches with the same weights need no compensation; CBN averages the statistics of the last '
                f'{layers[0].buffer_num + 1} of them. Set accumulative_counts=1, and for more '
                'images per estimate a larger buffer_num or batch',
                stacklevel=2,
            )
        left = getattr(runner, 'max_iters', math.inf) - getattr(runner, 'iter', 0)
        for message in [*defeated(model), *never_begun(model, left)]:
            warnings.warn(message, stacklevel=2)


def require_whole_groups(model: nn.Module, loader: DataLoader) -> None:
    """Raise unless every ``norm_batch`` divides the batches that training will see.

    The layers say so themselves, but of the last batch of an epoch only when it comes. Those of a head are left to do
    so (its batch may be regions), and those that ``norm_eval`` and ``frozen_stages`` keep from using the batch.
    """
    layers = getattr(model, 'backbone', model).modules()
    grouped = [layer for layer in layers if is_count(getattr(layer, 'norm_batch', None))]
    if not grouped:
        return
    model.train()  # as the loop will: only then is it seen which layers a backbone keeps in eval mode
    groups = {
        layer.norm_batch: contract_of(layer).grouped_as or type(layer).__name__
        for layer in grouped
        if getattr(layer, 'bn', layer).training
    }
    batches = loader.batch_sampler
    size, last = getattr(batches, 'batch_size', None), 0
    if size and not batches.drop_last and isinstance(batches.sampler, DefaultSampler):
        last = len(batches.sampler) % size
    for norm_batch, kind in groups.items():
        said = f'norm_cfg of type {kind!r}: norm_batch={norm_batch} does not divide'
        if size and size % norm_batch:
            more = -(-size // norm_batch) * norm_batch
            raise UserError(f'{said} train_dataloader.batch_size={size}; write a multiple of it, such as {more}')
        if last % norm_batch:
            raise UserError(
                f'{said} the last batch of an epoch, of {last} images ({len(batches.sampler)} in batches of {size}); '
                'write train_dataloader.drop_last=True'
            )


def never_begun(model: nn.Module, iterations: float) -> list[str]:
    """Messages about norms whose warm-up takes all of the ``iterations`` left: that measures another method."""
    return list(
        {
            kind: f'{kind}: this training ends within its warm-up of {length} iterations, {what}; train longer than '
            f'these {iterations}' + (f', or write a smaller norm_cfg.{key}' if key else '')
            for kind, key, length, done, what in _warm_ups(model)
            if 0 < iterations <= length - done
        }.values()
    )


def in_warm_up(model: nn.Module) -> list[str]:
    """Types of norms that have begun their warm-up and not left it, and are another method until then: ``['BRN']``."""
    return sorted({kind for kind, _, length, done, _ in _warm_ups(model) if 0 < done <= length})


def _warm_ups(model: nn.Module) -> Iterator[tuple[str, str, int, int, str]]:
    """Of norms with a warm-up: type, key of the norm_cfg, iterations, how many of them it has done, and what it is.

    The key is empty where no other value would make the warm-up shorter.
    """
    for module in model.modules():
        if isinstance(module, BRN):
            warm_up = 'warmup_iters', module.warmup_iters, module.bn.num_batches_tracked, 'in which it is batch norm'
        elif isinstance(module, MABN):
            # its windows come first, then r, which makes eval the function that was trained
            is_fixed = module.warmup_iters <= module.renorm_delay == module.RENORM_DELAY
            what = f'in which r is 1, and up to {module.warmup_iters} of which it averages over no iterations'
            warm_up = '' if is_fixed else 'warmup_iters', module.renorm_delay, module.iters, what
        elif isinstance(module, CBN):
            warm_up = 'burnin', module.burnin_iters or 0, module.iter_count, 'in which it is batch norm'
        else:
            continue
        key, length, done, what = warm_up
        if length:
            yield type(module).__name__, key, length, int(done), what


def iterations_per_epoch(loader: DataLoader) -> int:
    """How many iterations of all processes together show every image once.

    The length of a sampler for iteration loops (``InfiniteSampler``, those for several data sets) is the whole data
    set, of which every process sees its share.
    """
    sampler = getattr(getattr(loader, 'batch_sampler', None), 'sampler', None) or getattr(loader, 'sampler', None)
    processes = getattr(sampler, 'world_size', 1)
    if processes > 1 and len(sampler) == len(loader.dataset):
        return math.ceil(len(loader) / processes)
    return len(loader)


def defeated(model: nn.Module) -> list[str]:
    """Messages about ``norm_eval`` and ``frozen_stages`` over norms in the backbone of ``model`` that they defeat."""
    backbone = getattr(model, 'backbone', None)
    if backbone is None:
        return []
    kinds = sorted({type(m).__name__ for m in backbone.modules() if isinstance(m, AveragesOnRequest)})
    if not kinds:
        kept = getattr(backbone, 'norm_eval', False) and _at_the_start(backbone)
        return [
            'backbone.norm_eval=True keeps the statistics of batch norm as they are, and they are those of new layers '
            '(mean 0, variance 1): without pretrained weights write model.backbone.norm_eval=False'
        ] * kept
    messages = []
    names = ' and '.join(kinds)
    if getattr(backbone, 'norm_eval', False):
        messages.append(
            f'backbone.norm_eval=True freezes batch norm statistics, but {names} keep using those of the batch, which '
            'is what these methods are about; write norm_eval=False, so that the config says what happens'
        )
    if getattr(backbone, 'frozen_stages', -1) >= 0:
        messages.append(
            f'backbone.frozen_stages={backbone.frozen_stages} keeps {names} of these stages at running statistics; '
            'without pretrained weights for them write frozen_stages=-1'
        )
    return messages


def _at_the_start(backbone: nn.Module) -> bool:
    """Whether there is batch norm with statistics, none of which any image has changed."""
    norms = [m for m in backbone.modules() if getattr(m, 'running_mean', None) is not None]
    return bool(norms) and all(not m.running_mean.any() and bool((m.running_var == 1).all()) for m in norms)
