"""What a checkpoint brings along on resuming that the config says otherwise: optimizer, schedules, averages."""

from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from ..errors import UserError

# what versions of torch have added to the groups of their optimizers, with a default that leaves all as it was
_ADDED = {'foreach', 'fused', 'maximize', 'capturable', 'differentiable', 'decoupled_weight_decay'}
_HOW = {'params', 'lr', 'foreach', 'fused', 'capturable', 'differentiable'}  # no matter for what comes out
_PROGRESS = {'last_step', 'best', 'num_bad_steps', 'cooldown_counter', 'base_values', 'verbose', 'last_value'}


def differences(runner: Runner, checkpoint: dict) -> list[str]:
    """Where the state in a checkpoint goes before the config, in words. Call it before the state is loaded.

    Raises:
        UserError: the state is that of another optimizer, or of other groups of parameters.
    """
    told = []
    for name, wrapper in _wrappers(runner.optim_wrapper):
        saved = checkpoint.get('optimizer') or {}
        saved = saved.get(name) if name else saved
        if isinstance(saved, dict) and 'param_groups' in saved:
            told += _of_optimizer(wrapper.optimizer, saved['param_groups'])
    told += _of_schedules(runner.param_schedulers, checkpoint.get('param_schedulers'))
    averaged = any(isinstance(getattr(hook, 'ema_model', None), nn.Module) for hook in runner.hooks)
    if averaged != ('ema_state_dict' in checkpoint):
        told.append(
            'it has no averages (EMAHook), which begin with its weights'
            if averaged
            else 'its weights are averages of an EMAHook, which this run does not have'
        )
    return told


def _wrappers(optim_wrapper: object) -> list[tuple[str, OptimWrapper]]:
    if isinstance(optim_wrapper, OptimWrapper):
        return [('', optim_wrapper)]
    return list(getattr(optim_wrapper, 'optim_wrappers', {}).items())


def _of_optimizer(optimizer: Optimizer, saved: list[dict]) -> list[str]:
    groups, kind = optimizer.param_groups, type(optimizer).__name__
    lacking = {key for group in groups[:1] for key in group} - {key for group in saved[:1] for key in group} - _ADDED
    lacking = sorted(key for key in lacking if not key.startswith('initial_'))
    if lacking:
        raise UserError(
            f'--resume: the checkpoint has the state of another optimizer than {kind}: it has no {", ".join(lacking)}. '
            'Resume with the optimizer of the run, or start from its weights by load_from'
        )
    sizes = [[len(group['params']) for group in side] for side in (saved, groups)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f'--resume: the optimizer of the checkpoint has {len(saved)} groups with {sum(sizes[0])} parameters, that '
            f'of this run {len(groups)} with {sum(sizes[1])}: paramwise_cfg or what is frozen is not as it was. Put '
            'that back, or start from the weights by load_from'
        )
    for old, new in zip(saved, groups):
        scheduled = {key for key in ('momentum', 'betas') if f'initial_{key}' in {**old, **new}}
        values = [('lr', old.get('initial_lr', old['lr']), new.get('initial_lr', new['lr']))]
        values += [(key, old[key], new[key]) for key in new if key in old and key not in _HOW | scheduled]
        for key, theirs, ours in values:
            if not key.startswith('initial_') and _plain(theirs) != _plain(ours):
                return [f'its optimizer goes on with {key}={_plain(theirs)}, not with {_plain(ours)} of the config']
    return []


def _of_schedules(schedulers: object, saved: object) -> list[str]:
    if not isinstance(schedulers or [], list) or not isinstance(saved or [], list):  # of several optimizers
        return []
    schedulers, saved = schedulers or [], saved or []
    if len(schedulers) != len(saved):
        return [f'it has the state of {len(saved)} schedules (param_scheduler), and the config has {len(schedulers)}']
    for number, (scheduler, old) in enumerate(zip(schedulers, saved)):
        for key, ours in scheduler.state_dict().items():
            if key not in _PROGRESS and not key.startswith('_') and key in old and _plain(old[key]) != _plain(ours):
                return [
                    f'its schedule param_scheduler.{number} goes on with {key}={_plain(old[key])}, not with '
                    f'{_plain(ours)} of the config'
                ]
    return []


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part) for part in value)
    return float(value) if hasattr(value, 'item') else value
