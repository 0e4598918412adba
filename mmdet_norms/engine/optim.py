"""The constructor of optimizer wrappers: norms that are not torch's, names that nobody knows, AdaHessian's wrapper."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from ..entries import class_of, is_a, name_of
from ..errors import UserError, did_you_mean
from ..registry import is_not_torchs
from .dist import CPUAmpOptimWrapper
from .second_order import SecondOrderOptimWrapper, require_second_derivatives


def wrappers_of(optim_wrapper: object) -> list[OptimWrapper]:
    """One, or those of an ``OptimWrapperDict``."""
    return list(getattr(optim_wrapper, 'optim_wrappers', {'': optim_wrapper}).values())


def accumulated_batches(optim_wrapper: object) -> int:
    """Of how many batches a step adds the gradients up (``accumulative_counts``); 1 for several optimizers."""
    return getattr(optim_wrapper, '_accumulative_counts', 1)


class NormOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's ``DefaultOptimWrapperConstructor`` whose ``norm_decay_mult`` also means this package's norms.

    mmengine finds norms by torch's classes. BNET, CBN, MABN, AN and SN are none of them, so their parameters would get
    the full weight decay (as in the published code) whatever ``norm_decay_mult`` says. Here it scales the decay of
    every parameter of theirs, BNET's kernels and AN's attention included. ``custom_keys`` still come first; all other
    rules are mmengine's (``bias_lr_mult`` reaches their biases, as in MABN's published recipe).

    An optimizer or an argument of it that nobody knows gives an error with the choices; AdaHessian gets its
    :class:`SecondOrderOptimWrapper` where the config has a plain one.

    Importing the package puts it in the place of ``DefaultOptimWrapperConstructor``, so a config names nothing.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """The optimizer and its wrapper."""
        for problem in optimizer_problems(self.optimizer_cfg):
            raise UserError(problem)
        if is_second_order(dict(optimizer=self.optimizer_cfg)):
            self.optim_wrapper_cfg = second_order_wrapper(self.optim_wrapper_cfg)
            require_second_derivatives(model)
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        """Add the parameters of ``module`` and its children to the list of groups."""
        start = len(params)
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        norm_decay_mult = self.paramwise_cfg.get('norm_decay_mult')
        if norm_decay_mult is None or self.base_wd is None or not is_not_torchs(module):
            return
        names = {id(value): f'{prefix}.{name}' for name, value in module.named_parameters()}
        for group in params[start:]:
            if not any(key in names[id(group['params'][0])] for key in self.paramwise_cfg.get('custom_keys', {})):
                group['weight_decay'] = self.base_wd * norm_decay_mult


def optimizer_problems(optimizer: Any, key: str = 'optim_wrapper.optimizer') -> Iterator[str]:
    """What is wrong with the names in an optimizer's config, a sentence each.

    Args:
        optimizer: the dict.
        key: where it stands in the config.
    """
    if not isinstance(optimizer, Mapping):
        return
    found = class_of(optimizer, OPTIMIZERS)
    if found is None:
        names = sorted(name for name, cls in OPTIMIZERS.module_dict.items() if cls is not _BASE)
        given = optimizer.get('type')
        said = f'{key}.type={given!r} is no optimizer' if given is not None else f'{key} has no type'
        yield f'{said}{did_you_mean(given, names)}; choose from {", ".join(names)}'
        return
    parameters = list(inspect.signature(found).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    valid = [p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in optimizer:
        if name not in (*valid, 'type', '_scope_'):
            yield (
                f'{key} of type {name_of(optimizer, OPTIMIZERS)!r} has an unknown key {name}={optimizer[name]!r}'
                f'{did_you_mean(name, valid)}; valid keys: {", ".join(valid)}. If the key comes from the base config, '
                'with whose dict yours is merged, write optimizer=dict(_delete_=True, ...)'
            )


def is_second_order(cfg: Mapping) -> bool:
    """Whether the config of a wrapper, or the optimizer in it, is for a Hessian diagonal."""
    if is_a(cfg, SecondOrderOptimWrapper, OPTIM_WRAPPERS):
        return True
    return getattr(class_of(cfg.get('optimizer'), OPTIMIZERS), '__name__', None) == 'AdaHessian'


def second_order_wrapper(cfg: dict) -> dict:
    """The config of the wrapper that AdaHessian needs, from one that may be for other optimizers.

    Raises:
        UserError: it is a wrapper that cannot be replaced.
    """
    cls = class_of(cfg.get('type', 'OptimWrapper'), OPTIM_WRAPPERS)
    if cls in (OptimWrapper, CPUAmpOptimWrapper):
        mixed = dict(dtype='bfloat16') if cls is CPUAmpOptimWrapper else {}
        return {**cfg, 'type': 'SecondOrderOptimWrapper', **mixed}
    if isinstance(cls, type) and issubclass(cls, SecondOrderOptimWrapper):
        return cfg
    write = "optim_wrapper.type='SecondOrderOptimWrapper'"
    if isinstance(cls, type) and issubclass(cls, AmpOptimWrapper):
        why = 'scales the loss, and so the Hessian'
        write += " and optim_wrapper.dtype='bfloat16', without loss_scale, for mixed precision"
    else:
        why = 'does not differentiate twice'
    raise UserError(
        f"optim_wrapper.type={name_of(cfg, OPTIM_WRAPPERS)!r} {why}, and optim_wrapper.optimizer.type='AdaHessian' "
        f'needs the Hessian: write {write}'
    )


_BASE = OPTIMIZERS.get('Optimizer')  # registered with torch's, and none itself

OPTIM_WRAPPER_CONSTRUCTORS.register_module(
    name='DefaultOptimWrapperConstructor', module=NormOptimWrapperConstructor, force=True
)
