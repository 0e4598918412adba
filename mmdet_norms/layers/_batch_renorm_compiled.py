"""The part of batch renormalization that compiled code calls as an operator.

The compiler does not look into it: it could not tell a forward from its repetition by a checkpoint around it.
"""

import itertools
import weakref
from types import SimpleNamespace

import torch
from torch import Tensor, nn

# An operator takes tensors only, so it gets a number of the layer.
_HANDLES = itertools.count()
_LAYERS: 'weakref.WeakValueDictionary[int, nn.Module]' = weakref.WeakValueDictionary()


def handle_of(layer: nn.Module) -> Tensor:
    """A new number by which :func:`brn_call` finds the layer. Copies of the layer need one of their own."""
    # A tensor, because the compiler would make one graph per number; on the CPU, so reading it waits for nothing.
    handle = torch.tensor(next(_HANDLES), device='cpu')
    _LAYERS[int(handle)] = layer
    return handle


def brn_call(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, tracked: Tensor, handle: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """r and d of a training batch, which then counts, or of the call that is being repeated.

    Args:
        mean, var: of the batch ``(C,)``, or of its groups ``(G, C)``, over ``count`` values each.
        running_mean, running_var, tracked: the layer's state ``(C,)``, ``(C,)``, ``()``, which is updated.
        handle: the layer's, by :func:`handle_of`.
    """
    layer = _LAYERS[int(handle)]
    fixed = dict(eps=layer.bn.eps, momentum=layer.bn.momentum)
    state = SimpleNamespace(running_mean=running_mean, running_var=running_var, num_batches_tracked=tracked, **fixed)
    # copies, because the compiler reuses the memory of its tensors, and these are remembered
    r, d = layer._call(mean.clone(), var.clone(), count, state)
    return r.clone(), d.clone()


if hasattr(torch.library, 'custom_op'):  # torch >= 2.4
    brn_call = torch.library.custom_op(
        'mmdet_norms::brn_call', brn_call, mutates_args=('running_mean', 'running_var', 'tracked')
    )

    @brn_call.register_fake
    def _(mean, var, running_mean, running_var, tracked, handle, count):
        return torch.empty_like(mean), torch.empty_like(mean)
else:
    brn_call = torch.compiler.disable(brn_call)
