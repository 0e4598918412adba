"""Questions that torch of each supported version answers by another name. Imports torch only, so layers may ask too."""

import torch

try:  # torch 2.3
    is_compiling = torch.compiler.is_compiling
except AttributeError:
    # What the compiler of torch 2.1 and 2.2 replaces by True in code that it traces.
    is_compiling = torch._utils.is_compiling


def autocast_is_on(device: str) -> bool:
    """Does autocast choose the precision of operators on devices of this type, ``'cpu'`` or ``'cuda'``?"""
    if hasattr(torch.amp, 'is_autocast_available'):  # torch 2.4: one question for all devices
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == 'cpu' else torch.is_autocast_enabled()
