"""Several processes go on from what one of them saved: buffers, and states that are no buffers."""

import functools
from collections.abc import Iterator

import torch
from mmengine.dist import all_reduce, broadcast, broadcast_object_list, get_rank, get_world_size
from mmengine.hooks import SyncBuffersHook as _SyncBuffersHook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..compat.ddp import plan_what_is_trained


@HOOKS.register_module(name='SyncBuffersHook', force=True)
class SyncBuffersHook(_SyncBuffersHook):
    """Before a checkpoint is saved and before a validation, give all processes one state; then train on from it.

    Processes see different images, so their running statistics differ. mmengine's hook of this name, whose place this
    one takes, averages them at the end of an epoch and before a validation: a checkpoint of an iteration loop then
    holds those of the first process, which nobody has validated, and the buffers of an EMA are never averaged.

    * Floating point buffers, of the model and of an EMA, become their mean; those that agree stay bit by bit.
    * Gradients of parameters that a hook thaws after the model was wrapped are averaged, too.
    * Other buffers and states outside of ``buffers()``, such as CBN's history, become those of the first process.

    ``tools/train.py`` adds the hook where several processes train; ``custom_hooks=[dict(type='SyncBuffersHook')]``.
    ``runner.save_checkpoint`` must be called in all processes, as mmengine's own hooks do.
    """

    def before_run(self, runner: Runner) -> None:
        """Be told before every checkpoint."""
        announce_saving(runner)

    def before_saving(self, runner: Runner) -> None:
        """Called in all processes before a checkpoint is written."""
        self._share(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        """Called before each validation."""
        self._share(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Another hook may have frozen or thawed parameters, whose gradients are to be averaged all the same."""
        if get_world_size() > 1 and plan_what_is_trained(runner.model):
            runner.logger.info('Parameters were frozen or thawed: gradients of those that train now are averaged')

    def after_train_epoch(self, runner: Runner) -> None:
        """Called after each epoch."""
        self._share(runner)

    def _share(self, runner: Runner) -> None:
        if get_world_size() > 1:
            for model in models_of(runner):
                share_state(model)


def announce_saving(runner: Runner) -> None:
    """Have ``before_saving(runner)`` of every hook called in all processes before each checkpoint is written.

    mmengine's ``before_save_checkpoint`` runs in the first process only, where nothing can be asked of the others.
    """
    save = runner.save_checkpoint
    if getattr(save, 'is_announced', False):
        return

    @functools.wraps(save)
    def announced(*args, **kwargs) -> None:
        runner.call_hook('before_saving')
        save(*args, **kwargs)

    announced.is_announced = True
    runner.save_checkpoint = announced


@torch.no_grad()
def share_state(model: nn.Module) -> None:
    """Give all processes the same buffers (see :class:`SyncBuffersHook`). Call it in all of them."""
    groups: dict[tuple, list[Tensor]] = {}
    for buffer in model.buffers():
        dtype = torch.promote_types(buffer.dtype, torch.float32) if buffer.is_floating_point() else torch.int64
        groups.setdefault((dtype, buffer.device), []).append(buffer)
    changed = set()
    for (dtype, _), buffers in groups.items():
        old = torch.cat([buffer.reshape(-1).to(dtype) for buffer in buffers])
        new = _mean(old) if dtype.is_floating_point else _of_the_first(old)
        for buffer, values in zip(buffers, new.split([buffer.numel() for buffer in buffers])):
            if not dtype.is_floating_point and bool((values != buffer.reshape(-1)).any()):
                changed.add(id(buffer))
            buffer.copy_(values.view(buffer.shape))
    _share_the_rest(model, changed)


def _mean(values: Tensor) -> Tensor:
    """The mean over the processes; where they agree, what they have, which a mean of three would round."""
    low, high, mean = values.clone(), values.clone(), values.clone()
    all_reduce(low, op='min')
    all_reduce(high, op='max')
    all_reduce(mean, op='mean')
    return torch.where(low == high, values, mean)


def _of_the_first(values: Tensor) -> Tensor:
    values = values.clone()
    broadcast(values)
    return values


def _share_the_rest(model: nn.Module, changed: set[int]) -> None:
    """Load the first process's states that are neither parameters nor buffers where a module has any.

    Args:
        changed: buffers that got other numbers; their modules may keep copies on the host, which a load renews.
    """
    sent = [{name: _on_cpu(rest) for name, _, rest in _rests(model)}]
    broadcast_object_list(sent)
    if get_rank() == 0:
        return
    have = {name: rest for name, _, rest in _rests(model)}
    for name, module in model.named_modules():
        of_first, own = sent[0].get(name, {}), have.get(name, {})
        if of_first or own or any(id(buffer) in changed for buffer in module._buffers.values()):
            # all of it: a layer may take a part for the checkpoint of another norm
            state = {key: value for key, value in module.state_dict().items() if key not in own}
            module.load_state_dict({**state, **of_first}, strict=False)


def _rests(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict]]:
    """Every module that itself saves more than its parameters and buffers, with that."""
    for name, module in model.named_modules():
        state: dict = {}
        module._save_to_state_dict(state, '', keep_vars=True)
        known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        rest = {key: value for key, value in state.items() if id(value) not in known}
        if rest:
            yield name, module, rest


def _on_cpu(state: dict) -> dict:
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}


def model_of(runner: Runner) -> nn.Module:
    """The model without its wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def models_of(runner: Runner) -> list[nn.Module]:
    """The model without its wrapper, and the averages of it that hooks keep."""
    averages = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
    return [model_of(runner), *(average for average in averages if isinstance(average, nn.Module))]
