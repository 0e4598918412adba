"""Whether a module has to be called, because somebody else sees or changes what goes through it."""

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks, or a ``forward`` of its own on the instance, as mmengine puts there."""
    return bool(
        'forward' in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
