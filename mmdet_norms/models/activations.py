"""Activations by name: those that mmcv's registry lacks, and what the ``act_cls`` of a model means."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import did_you_mean
from ..layers._args import ConfigError
from ..registry import MODELS

ACTIVATIONS = {
    'relu': dict(type='ReLU', inplace=True),
    'lrelu': dict(type='LeakyReLU', inplace=True),
    'swish': dict(type='SiLU'),
    'mish': dict(type='Mish'),
    'mila': dict(type='Mila'),
    'bent_id': dict(type='BentIdentity'),
}
"""``act_cls`` -> ``act_cfg``."""

if 'Mish' not in MODELS.module_dict:
    MODELS.register_module(name='Mish', module=nn.Mish)


@MODELS.register_module()
class Mila(nn.Module):
    r"""Mish with a shift: :math:`y = x \tanh(\mathrm{softplus}(\beta + x))`; any shape; differentiable at will.

    fp16 and bf16 are computed in fp32 and returned as they came.

    Args:
        beta: the shift. Default -0.25; 0 is Mish.
        inplace: taken, because mmcv's ``ConvModule`` gives it to every activation; not used, as the derivative needs x.

    Source: Misra, arXiv:1908.08681 (Mish).
    """

    def __init__(self, beta: float = -0.25, inplace: bool = False) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        return (wide * torch.tanh(F.softplus(wide + self.beta))).to(x.dtype)

    def extra_repr(self) -> str:
        return f'beta={self.beta}'


@MODELS.register_module()
class BentIdentity(nn.Module):
    r"""Bent identity: :math:`y = x + (\sqrt{x^2 + 1} - 1) / 2`; any shape; differentiable at will.

    The difference is written as a quotient, :math:`x^2 / (\sqrt{x^2 + 1} + 1)`, which keeps its digits near 0. fp16 and
    bf16 are computed in fp32, where x may be as large as 1e19, and returned as they came.

    Args:
        inplace: taken, because mmcv's ``ConvModule`` gives it to every activation; not used, as the derivative needs x.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        square = wide * wide
        return (wide + square / (2 * (torch.sqrt(square + 1) + 1))).to(x.dtype)


@torch.fx.wrap  # symbolic tracing, as conv-BN fusion does it, cannot look into dtypes
def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def act_cfg_of(model: str, act_cls: str, act_cfg: Mapping | None = None) -> dict:
    """The ``act_cfg`` of a model that takes both keys.

    Args:
        model: its class, for messages.
        act_cls: a key of :data:`ACTIVATIONS`.
        act_cfg: of any registered activation, in place of ``act_cls='relu'``.

    Raises:
        ConfigError: a name that is none, with the closest one and all; both keys at once; an ``act_cfg`` whose type
            nobody registered.
    """
    if act_cfg is None:
        if not isinstance(act_cls, str) or act_cls not in ACTIVATIONS:
            raise ConfigError(
                f'{model}: act_cls={act_cls!r} is unknown{did_you_mean(act_cls, ACTIVATIONS)}; choose one of: '
                f'{", ".join(ACTIVATIONS)}. Any other activation goes into act_cfg=dict(type=...)'
            )
        return dict(ACTIVATIONS[act_cls])
    if act_cls != 'relu':
        raise ConfigError(f'{model}: act_cls={act_cls!r} and act_cfg={act_cfg!r} both name an activation; keep one')
    kind = act_cfg.get('type') if isinstance(act_cfg, Mapping) else None
    if kind is None or (isinstance(kind, str) and MODELS.get(kind) is None):
        types = [cfg['type'] for cfg in ACTIVATIONS.values()]
        raise ConfigError(
            f'{model}: act_cfg={act_cfg!r} names no registered activation{did_you_mean(kind, types)}; write '
            f"dict(type='Mish') or another of: {', '.join(types)}, or of mmcv's"
        )
    return dict(act_cfg)
