"""DistributedDataParallel that takes note of a new memory layout of its parameters."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .torch_internals import belongs_to_its_buckets, make_buckets_again, number_in_buckets


def plan_buckets_again(model: nn.Module) -> int:
    """Have every ``DistributedDataParallel`` in ``model`` lay out its gradient buckets as its parameters are now.

    A bucket copies the strides of the parameters when it is made. Where they change afterwards, gradients are added up
    and handed back in another order of their elements, without a word: in the first iteration of a run, and in all of
    them with ``find_unused_parameters=True``. Call it in every process, between two iterations.

    Returns:
        How many there are.

    Raises:
        RuntimeError: one of them has a communication hook or mixed precision, which belong to the old buckets.
    """
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    for ddp in wrappers:
        if belongs_to_its_buckets(ddp):
            raise RuntimeError(
                'the memory layout of a model cannot change after register_comm_hook() or with the mixed_precision of '
                'DistributedDataParallel: change it before the model is wrapped'
            )
        make_buckets_again(ddp)
    return len(wrappers)


def plan_what_is_trained(model: nn.Module) -> int:
    """Plan the buckets of every ``DistributedDataParallel`` again whose parameters were frozen or thawed meanwhile.

    Gradients of a parameter that was frozen when the model was wrapped are in no bucket: each process trains it on its
    own. One that is frozen later is waited for. Call it in every process, between two iterations.

    Returns:
        How many were planned again.

    Raises:
        RuntimeError: as :func:`plan_buckets_again`.
    """
    changed = 0
    for ddp in (module for module in model.modules() if isinstance(module, DistributedDataParallel)):
        ignored = ddp.parameters_to_ignore
        trained = {id(p) for name, p in ddp.module.named_parameters() if p.requires_grad and name not in ignored}
        planned = getattr(ddp, '_planned_for', None)
        if planned is None:  # by the wrapper itself, which keeps their number only
            same = number_in_buckets(ddp) == len(trained)
        else:
            same = planned == trained
        if trained and not same:
            changed += plan_buckets_again(ddp)
        ddp._planned_for = trained
    return changed
