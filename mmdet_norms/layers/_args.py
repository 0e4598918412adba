"""Checks of constructor arguments, so that a wrong ``norm_cfg`` gives one error that says what to write."""

import difflib
import inspect


def reject_unknown(cls: type, unknown: dict) -> None:
    """Raise if ``norm_cfg`` holds keys that ``cls`` does not know.

    Layers end their signature with ``**unknown`` and pass it here: Python's own message names neither the
    config key nor the choices.

    Raises:
        TypeError: names the key, its value, the closest valid key and all valid keys.
    """
    if not unknown:
        return
    parameters = inspect.signature(cls).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    valid.append('requires_grad')
    key, value = next(iter(unknown.items()))
    close = difflib.get_close_matches(key, valid, n=1)
    hint = f' (did you mean {close[0]!r}?)' if close else ''
    raise TypeError(
        f'norm_cfg of type {cls.__name__!r} has an unknown key {key}={value!r}{hint}; valid keys: {", ".join(valid)}'
    )


def check_number(cls: type, key: str, value, low: float, high: float = float('inf')) -> None:
    """Raise ``ValueError`` unless ``value`` is a real number with ``low < value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        upper = '' if high == float('inf') else f' and at most {high:g}'
        raise ValueError(f'norm_cfg of type {cls.__name__!r}: {key}={value!r} must be a number above {low:g}{upper}')
