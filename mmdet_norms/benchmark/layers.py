"""A norm layer by itself, and behind its convolution."""

import ast
from collections.abc import Iterator, Sequence

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..errors import did_you_mean
from ..layers import CBN, MABN, CenConv2d, contract_of
from ..placement import PLACEMENTS
from ..reference import REFERENCES, ReferenceCBN, ReferenceMABN
from ..registry import norm_names
from .groups import CONV_ONLY, ONE_PASS, Entry, Group, Setting, reference_of
from .measure import Case, held_bytes, owned_tensors, peak_bytes, saved_bytes

MODES = ('forward', 'forward+backward', 'eval')
BASELINE = 'bn'

LAYERS: dict[str, dict] = {
    'bn': dict(type='BN'),
    'bnet3': dict(type='BNET', kernel_size=3),
    'bnet5': dict(type='BNET', kernel_size=5),
    'bnet7': dict(type='BNET', kernel_size=7),
    'cbn': dict(type='CBN', burnin=0),
    'mabn': dict(type='MABN'),
    'an': dict(type='AN', k=10),
    'an-gn': dict(type='AN', norm='GN', k=10),
    'gn': dict(type='GN'),
    'in': dict(type='IN', affine=True),
    'ln': dict(type='LN2d', over='CHW'),
    'brn': dict(type='BRN'),
    'sn': dict(type='SN'),
    'frozen': dict(type='FrozenBN'),
}
"""norm_cfg of names that ``--layers`` takes; :func:`named_layers` has all."""

DEFAULT = dict(layer=('bn', 'bnet3', 'bnet5', 'bnet7', 'mabn', 'an', 'an-gn'), conv=('bn', 'cbn', 'mabn'))
"""What is measured at each level unless the user says so."""

# Reads and writes of the feature map that no formulation can do without, in passes of one read and one write.
_BATCH_STATISTICS = {'forward': 1.5, 'forward+backward': 4.0, 'eval': 1.0}
_INSTANCE_STATISTICS = dict(_BATCH_STATISTICS, eval=1.5)
LIMITS = dict.fromkeys(('BN', 'BNET', 'MABN'), _BATCH_STATISTICS) | dict.fromkeys(('AN', 'GN'), _INSTANCE_STATISTICS)
"""norm_cfg.type -> mode -> passes, for a map too large for the caches: statistics read it, applying them reads and
writes it, the two sums of the backward pass read two maps, the input's gradient reads two and writes one."""

_PAST_RENORM_DELAY = 2 * MABN.RENORM_DELAY


class ConvNorm(nn.Module):
    """A 3x3 convolution without bias, C to C, and a norm behind it (None: nothing)."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None):
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if isinstance(self.norm, ReferenceCBN):
            return self.norm(x, self.conv.weight)
        return x if self.norm is None else self.norm(x)


def named_layers() -> dict[str, dict]:
    """norm_cfg of each name that ``--layers`` takes: of ``--norm``, too, where it is one norm."""
    placed = {name: next(iter(p.norm_at.values()), p.neck.get('norm_cfg')) for name, p in PLACEMENTS.items()}
    return LAYERS | {name: cfg for name, cfg in placed.items() if isinstance(cfg, dict) and name not in LAYERS}


def norm_cfg_of(name: str) -> dict:
    """The norm_cfg that a name stands for: one of :func:`named_layers`, or a type, ``BNET(kernel_size=9)``.

    Raises:
        ValueError: neither; says what to write.
    """
    names = named_layers()
    if name in names:
        return dict(names[name])
    try:
        call = ast.parse(name, mode='eval').body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        kind = call.func.id
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        kind, arguments = None, {}
    if kind not in norm_names():
        raise ValueError(
            f'layer {name!r} is unknown{did_you_mean(name, names)}; write one of: {", ".join(names)}; or a type of '
            f"norm_cfg with its arguments, such as 'BNET(kernel_size=9)'; types: {', '.join(norm_names())}"
        )
    return dict(arguments, type=kind)


def build_norm(norm_cfg: dict, channels: int, reference: bool = False) -> nn.Module:
    """The layer of a norm_cfg, or the literal formulation of it (:data:`REFERENCES`)."""
    if not reference:
        return build_norm_layer(norm_cfg, channels)[1]
    arguments = {key: value for key, value in norm_cfg.items() if key != 'type'}
    return REFERENCES[norm_cfg['type']](channels, **arguments)


def candidates(names: Sequence[str], reference: bool) -> Iterator[tuple[str, dict, bool]]:
    """(label, norm_cfg, is reference) of what to measure: batch norm, the names, and the yardstick of each."""
    for name in dict.fromkeys([BASELINE, *names]):
        norm_cfg = norm_cfg_of(name)
        yield name, norm_cfg, False
        if reference and norm_cfg['type'] in REFERENCES:
            yield reference_of(name), norm_cfg, True


def layer_group(
    names: Sequence[str], size: tuple[int, int, int, int], mode: str, setting: Setting, reference: bool = True
) -> Group:
    """Norm layers on one feature map of ``size`` (N, C, H, W), and one pass over it as the unit of ``passes``."""
    group = Group('layer', mode, setting, size)
    data = _Data(size, setting, torch.float32 if setting.half is None else setting.half)
    for label, norm_cfg, is_reference in candidates(names, reference):
        limit = LIMITS.get(norm_cfg['type'], {}).get(mode)
        try:
            if norm_cfg['type'] == 'CBN' and mode != 'eval':
                raise ValueError('CBN trains behind its convolution: see --level conv')
            module = build_norm(norm_cfg, size[1], is_reference)
        except (TypeError, ValueError) as error:
            group.entries.append(failed_entry(label, error))
        else:
            group.entries.append(_entry(label, module, data, mode, setting, dict(limit_passes=limit)))
    group.entries.append(Entry(Case(ONE_PASS, data.one_pass)))
    return group


def conv_group(
    names: Sequence[str], size: tuple[int, int, int, int], mode: str, setting: Setting, reference: bool = True
) -> Group:
    """A 3x3 convolution, C to C, and a norm behind it, on an input of ``size`` (N, C, H, W).

    MABN has its centred convolution. The convolution alone is measured as well.
    """
    group = Group('conv', mode, setting, size)
    data = _Data(size, setting, torch.float32)
    channels = size[1]
    entries = [(CONV_ONLY, None, False), *candidates(names, reference)]
    for label, norm_cfg, is_reference in entries:
        try:
            norm = None if norm_cfg is None else build_norm(norm_cfg, channels, is_reference)
        except (TypeError, ValueError) as error:
            group.entries.append(failed_entry(label, error))
            continue
        conv = CenConv2d if isinstance(norm, ReferenceMABN) or contract_of(norm).behind == 'CenConv' else nn.Conv2d
        module = ConvNorm(conv(channels, channels, 3, padding=1, bias=False), norm)
        group.entries.append(_entry(label, module, data, mode, setting, {}))
    return group


class _Data:
    """The input and upstream gradient that all candidates share."""

    def __init__(self, size: tuple[int, ...], setting: Setting, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self._x, self._grad = (
            torch.randn(size, generator=generator).to(setting.device, dtype, memory_format=setting.memory_format)
            for _ in range(2)
        )
        self._buffer = torch.empty_like(self._x)
        self._grads = {dtype: self._grad}

    def input(self, requires_grad: bool) -> Tensor:
        """A leaf of its own over the shared values."""
        return self._x.detach().requires_grad_(requires_grad)

    def grad(self, dtype: torch.dtype) -> Tensor:
        """The upstream gradient in the dtype of an output, made once."""
        if dtype not in self._grads:
            self._grads[dtype] = self._grad.to(dtype)
        return self._grads[dtype]

    def one_pass(self) -> None:
        """Read the map once and write one as large, into memory that is there."""
        torch.mul(self._x, 2, out=self._buffer)


def _entry(label: str, module: nn.Module, data: _Data, mode: str, setting: Setting, facts: dict) -> Entry:
    module = module.to(setting.device, memory_format=setting.memory_format).train(mode != 'eval')
    x = data.input(requires_grad=mode != 'eval')

    def forward() -> Tensor:
        with setting.autocast():
            return module(x)

    def run() -> None:
        if mode == 'eval':
            with torch.no_grad():
                forward()
            return
        y = forward()
        if mode == 'forward+backward':
            y.backward(data.grad(y.dtype))

    def reset() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)

    def measure_memory() -> dict:
        reset()
        measured = dict(facts, peak_bytes=peak_bytes(run, setting.device), state_bytes=held_bytes(module))
        if mode != 'eval':
            measured['saved_bytes'] = saved_bytes(forward, owned_tensors(module))
        reset()
        return measured

    settle_calls = settling_calls(module) if mode != 'eval' else 0
    case = Case(label, run, reset, lambda: settle(module), settle_calls)
    return Entry(case, None if label == BASELINE else BASELINE, measure_memory)


def failed_entry(label: str, error: Exception) -> Entry:
    """A candidate that could not be made: a row with the reason, beside those of the others."""

    def run() -> None:
        raise error

    return Entry(Case(label, run))


# ------------------------------------------------------------------------------------------------ steady state


def settling_calls(model: nn.Module) -> int:
    """Training steps after which CBN's history is full and :func:`settle` finds what it needs."""
    counts = [
        m.buffer_num + 1 if isinstance(m, (CBN, ReferenceCBN)) else 1
        for m in model.modules()
        if isinstance(m, (CBN, MABN, ReferenceCBN, ReferenceMABN))
    ]
    return max(counts, default=0)


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """After one training step: put every MABN past its warm-up and the delay of its renorm factor.

    The window and the running moment get the values of that step, so that nothing jumps.
    """
    for module in model.modules():
        if isinstance(module, (MABN, ReferenceMABN)) and module.training and 0 < int(module.iters) < _PAST_RENORM_DELAY:
            windows = [getattr(module, name) for name in getattr(module, 'WINDOWS', MABN.WINDOWS)]
            row = -1 if hasattr(module, 'norm_batch') else int(module.iters) % len(windows[0])  # the newest
            module.running_var.copy_(windows[0][row].view_as(module.running_var))
            for window in windows:
                window.copy_(window[row].expand_as(window).clone())
            module.iters.fill_(_PAST_RENORM_DELAY)
