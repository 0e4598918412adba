"""Channels-last memory: the layout in which convolutions of small maps are fastest on a CPU, and in fp16 on a GPU."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keep the model's convolution weights in ``torch.channels_last``; activations follow. Values do not change.

    Use it as ``custom_hooks=[dict(type='ChannelsLastHook')]``.
    """

    def before_run(self, runner: Runner) -> None:
        """Convert before the first iteration; optimizers hold the same parameters."""
        runner.model.to(memory_format=torch.channels_last)
