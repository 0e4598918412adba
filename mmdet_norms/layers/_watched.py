"""Whether a module has to be called, because somebody else sees or changes what goes through it."""

from torch import nn

from ..compat.torch_internals import has_hooks


def is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks, or a ``forward`` of its own on the instance, as mmengine puts there."""
    return 'forward' in vars(module) or has_hooks(module)
