"""Checks of arguments: a wrong ``norm_cfg``, or a wrong map, gives one error that says what is right."""

import difflib
import inspect

import torch
from torch import Tensor, nn

NOT_GROUPED = ' (the norms that take statistics over groups of images are BN, BRN and MABN)'
"""Said of a ``norm_batch`` elsewhere."""


class ConfigError(ValueError, TypeError):
    """An argument that a config got wrong; the message says which, and what to write.

    The tools show it as one message. A class of its own, so that errors of other code keep their traceback; of both
    kinds, because Python raises either for a wrong argument.
    """


def reject_unknown(cls: type, unknown: dict) -> None:
    """Raise if ``norm_cfg`` holds keys that ``cls`` does not know.

    Layers end their signature with ``**unknown`` and pass it here: Python's own message names neither the
    config key nor the choices.

    Raises:
        ConfigError: names the key, its value, the closest valid key and all valid keys.
    """
    if not unknown:
        return
    parameters = inspect.signature(cls.__init__).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    valid.append('requires_grad')
    key, value = next(iter(unknown.items()))
    close = difflib.get_close_matches(key, valid, n=1)
    hint = NOT_GROUPED if key == 'norm_batch' else f' (did you mean {close[0]!r}?)' if close else ''
    raise ConfigError(
        f'norm_cfg of type {cls.__name__!r} has an unknown key {key}={value!r}{hint}; valid keys: {", ".join(valid)}'
    )


def is_number(value) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value, low: int = 1) -> bool:
    """Whether it is an integer of at least ``low``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def check_number(cls: type, key: str, value, low: float, high: float = float('inf')) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a real number with ``low < value <= high``."""
    if not is_number(value) or not low < value <= high:
        upper = '' if high == float('inf') else f' and at most {high:g}'
        raise ConfigError(f'norm_cfg of type {cls.__name__!r}: {key}={value!r} must be a number above {low:g}{upper}')


def check_at_least(cls: type, key: str, value, low: float, note: str = '') -> None:
    """Raise :class:`ConfigError` unless ``value`` is a real number with ``low <= value``, and finite.

    ``note`` ends the message, as that of :func:`check_count`.
    """
    if not is_number(value) or not low <= value < float('inf'):
        raise ConfigError(
            f'norm_cfg of type {cls.__name__!r}: {key}={value!r} must be a number of at least {low:g}{note}'
        )


def check_count(cls: type, key: str, value, low: int, note: str = '') -> None:
    """Raise :class:`ConfigError` unless ``value`` is an integer of at least ``low``."""
    if not is_count(value, low):
        raise ConfigError(
            f'norm_cfg of type {cls.__name__!r}: {key}={value!r} must be an integer of at least {low}{note}'
        )


def check_batch_norm(cls: type, eps, momentum) -> None:
    """Raise :class:`ConfigError` unless these are a batch norm's, by torch's convention.

    Args:
        eps: a number above 0.
        momentum: weight of the newest batch, above 0 and at most 1; None averages over all batches.
    """
    check_number(cls, 'eps', eps, 0)
    if momentum is not None:
        check_number(cls, 'momentum', momentum, 0, 1)


def check_map(layer: nn.Module, channels: int, x: Tensor) -> None:
    """Raise unless ``x`` is what ``layer`` normalizes: ``(N, channels, H, W)`` of floating point numbers.

    Every norm asks this first in its forward, in every mode. Operators would not do: some broadcast other shapes, some
    read maps of fewer dimensions in their own way, and compiled code reads what it is told to. Symbolic tracing and
    ``torch.jit.trace`` go by unasked, as they have no numbers yet.

    Raises:
        ValueError: names the layer, and what it got in place of what.
    """
    if not isinstance(x, Tensor) or torch.jit.is_tracing():
        return
    if x.dim() == 4 and x.shape[1] == channels and x.is_floating_point():
        return
    place = f' {layer.name!r}' if getattr(layer, 'name', None) else ''
    got = f'{type(layer).__name__}({channels}){place} got an input of'
    if x.is_floating_point():
        raise ValueError(f'{got} shape {tuple(x.shape)}; it must be (N, {channels}, H, W)')
    raise ValueError(f'{got} {x.dtype}; it must be of floating point numbers')


def check_residual(layer: nn.Module, channels: int, x: Tensor, residual: Tensor) -> None:
    """Raise unless ``residual`` is shaped as the map that ``layer`` adds it to: it would be spread over it.

    Raises:
        ValueError: names the layer and both shapes.
    """
    if isinstance(x, Tensor) and not torch.jit.is_tracing() and residual.shape != x.shape:
        raise ValueError(
            f'{type(layer).__name__}({channels}) got a residual of shape {tuple(residual.shape)}; it must be that of '
            f'the map, {tuple(x.shape)}'
        )
