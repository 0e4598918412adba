"""Channels-last memory: the layout in which convolutions of small maps are fastest on a CPU, and in fp16 on a GPU."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..compat.ddp import plan_buckets_again
from ..errors import UserError


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keep the model's convolution weights in ``torch.channels_last``; activations follow. Values do not change.

    Use it as ``custom_hooks=[dict(type='ChannelsLastHook')]``. mmengine wraps a model for several processes before any
    hook runs, so ``DistributedDataParallel`` is made to lay out its buckets again.

    Raises:
        UserError: the model is sharded (FSDP), or its wrapper has a communication hook.
    """

    priority = 'VERY_HIGH'  # before hooks that copy the model or wrap it once more

    def before_run(self, runner: Runner) -> None:
        """Convert before the first iteration; optimizers hold the same parameters."""
        for name, module in runner.model.named_modules():
            weight = getattr(module, 'weight', None)
            if isinstance(module, nn.Conv2d) and weight is not None and weight.dim() != 4:
                raise UserError(
                    f'ChannelsLastHook: the weight of {name} is a shard without the shape of a convolution, as under '
                    'FullyShardedDataParallel; leave the hook out of custom_hooks'
                )
        runner.model.to(memory_format=torch.channels_last)
        try:
            plan_buckets_again(runner.model)
        except RuntimeError as error:
            raise UserError(f'ChannelsLastHook: {error}') from error
