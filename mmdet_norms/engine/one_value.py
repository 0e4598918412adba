"""Batch norm of a single value per channel: torch's message names neither the layer nor a way out."""

import traceback

from torch import nn


def explain_one_value(error: BaseException) -> str | None:
    """What to do about torch's refusal to train a batch norm on one value per channel; None for any other error.

    It is told by where it was raised, not by its text. The layer's name is that in the outermost module that called it.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if not isinstance(error, ValueError) or not frames or frames[-1][0].f_code.co_name != '_verify_batch_size':
        return None
    modules = [frame.f_locals.get('self') for frame, _ in frames]
    modules = [module for module in modules if isinstance(module, nn.Module)]
    if not modules:
        return None
    name = next((name for name, module in modules[0].named_modules() if module is modules[-1]), '')
    return (
        f'{name or "the model"} ({type(modules[-1]).__name__}) got one value per channel, of which batch norm has no '
        'variance in training; raise train_dataloader.batch_size or the size of the images, fix its statistics with '
        "norm_eval=True, or use a norm that needs none of the batch: norm_cfg=dict(type='GN', num_groups=32)"
    )
