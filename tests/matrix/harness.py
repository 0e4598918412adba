"""A convolution and its norm in the middle of a training, and what is compared of it."""

import copy
import io
import re
from pathlib import Path

import torch
from mmcv.cnn import ConvModule

import mmdet_norms  # noqa: F401  (registers the norms)
from mmdet_norms.layers import contract_of, link_convs

from .norms import NORMS

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 6


def build(norm: str, *, link: bool = False, seed: int = 0, **norm_cfg) -> ConvModule:
    """Convolution and norm, as a config names them, with weights that are nowhere at their default."""
    torch.manual_seed(seed)
    chosen = NORMS[norm]
    module = ConvModule(4, 8, 3, padding=1, norm_cfg={**chosen.cfg, **norm_cfg}, conv_cfg=chosen.conv, act_cfg=None)
    with torch.no_grad():
        for parameter in module.norm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if norm == 'FrozenBN':
            module.norm.running_var.uniform_(0.5, 2)
            for buffer in (module.norm.weight, module.norm.bias, module.norm.running_mean):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    if link:
        link_convs(module)
    return module.train()


def batch(seed: int = 0, shape: tuple = (2, 4, 6, 6), **kwargs) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return x.to(**kwargs)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    """Something that a normalization does not make constant."""
    y = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    ramp = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return (y.square() * (ramp + 0.5) + y * ramp).sum() / max(y.numel(), 1)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def train(module, seeds, optimizer=None) -> None:
    optimizer = optimizer or sgd(module)
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(module(batch(seed))).backward()
        optimizer.step()
    module.zero_grad()


def ready(norm: str, **kwargs) -> ConvModule:
    """A module in the middle of its training."""
    module = build(norm, **kwargs)
    train(module, range(WARM_UP))
    return module


def state(module) -> dict:
    return copy.deepcopy(module.state_dict())


def counts(module) -> list[int]:
    values = module.norm.state_dict()
    return [int(values[name]) for name in contract_of(module.norm).counters]


def gradients(module, x, run=None) -> dict:
    """Output and all gradients of one training step."""
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = (module if run is None else run)(x)
    loss_of(y).backward()
    return dict(y=y.detach(), x=x.grad, **{key: p.grad for key, p in module.named_parameters()})


def same(first: dict, second: dict, rtol: float = 0, atol: float = 0) -> None:
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for key in first:
        if first[key] is None or second[key] is None:
            assert first[key] is second[key], key
            continue
        torch.testing.assert_close(first[key], second[key], rtol=rtol, atol=atol, msg=lambda t, key=key: f'{key}: {t}')


def finite(*values) -> None:
    for value in values:
        if isinstance(value, dict):
            for key, entry in value.items():
                assert entry is None or entry.isfinite().all(), f'{key} is not finite'
        else:
            assert value.isfinite().all()


def through_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def raises(error, pattern, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error as raised:
        assert re.search(pattern, str(raised)), f'{type(raised).__name__} says something else: {raised}'
    else:
        raise AssertionError(f'no {error.__name__}')
