"""``paramwise_cfg.norm_decay_mult`` for norms that are not torch's classes."""

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..registry import NOT_TORCH_NORMS


class NormOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's ``DefaultOptimWrapperConstructor`` whose ``norm_decay_mult`` also means this package's norms.

    mmengine finds norms by torch's classes. BNET, CBN, MABN, AN and SN are none of them, so their parameters would get
    the full weight decay (as in the published code) whatever ``norm_decay_mult`` says. Here it scales the decay of
    every parameter of theirs, BNET's taps and AN's attention included; ``custom_keys`` still come first, and all other
    rules are mmengine's (``bias_lr_mult`` reaches their biases, as in MABN's published recipe).

    Importing the package puts it in the place of ``DefaultOptimWrapperConstructor``, so a config names nothing.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        """Add the parameters of ``module`` and its children to the list of groups."""
        start = len(params)
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        norm_decay_mult = self.paramwise_cfg.get('norm_decay_mult')
        if norm_decay_mult is None or self.base_wd is None or not isinstance(module, NOT_TORCH_NORMS):
            return
        names = {id(value): f'{prefix}.{name}' for name, value in module.named_parameters()}
        for group in params[start:]:
            if not any(key in names[id(group['params'][0])] for key in self.paramwise_cfg.get('custom_keys', {})):
                group['weight_decay'] = self.base_wd * norm_decay_mult


OPTIM_WRAPPER_CONSTRUCTORS.register_module(
    name='DefaultOptimWrapperConstructor', module=NormOptimWrapperConstructor, force=True
)
