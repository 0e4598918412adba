"""What one config has differently from another, key by key; and the config that a file starts from."""

import ast
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from mmdet_norms.console import as_text

_ABSENT = object()


class Difference(NamedTuple):
    """One key: as ``a.b.0.c``, its value before and now as a config writes them; None where it is not there."""

    key: str
    before: str | None
    now: str | None

    def line(self, width: int = 100) -> str:
        """``key: before -> now``, or ``key = now``, values cut to ``width`` characters."""
        if self.now is None:
            return f'{self.key} is left out'
        now = _cut(self.now, width)
        return f'{self.key} = {now}' if self.before is None else f'{self.key}: {_cut(self.before, width // 2)} -> {now}'


def differences(before: Any, now: Any, key: str = '') -> Iterator[Difference]:
    """Every key of ``now`` that ``before`` has otherwise or not at all, and those that are gone; as deep as they go."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*now, *before)):
            if name == '_scope_':  # where a config of a package writes its names, not what they are
                continue
            yield from differences(before.get(name, _ABSENT), now.get(name, _ABSENT), f'{key}.{name}' if key else name)
    elif _of_entries(before) and _of_entries(now) and len(before) == len(now):
        for i, pair in enumerate(zip(before, now)):
            yield from differences(*pair, f'{key}.{i}')
    elif before is _ABSENT or now is _ABSENT or written(before) != written(now):
        yield Difference(key, *(None if value is _ABSENT else written(value) for value in (before, now)))


def written(value: Any) -> str:
    """A value as a config writes it, in one line: ``dict(type='BNET', kernel_size=5)``."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key.isidentifier() for key in value):
            return f'dict({", ".join(f"{key}={written(entry)}" for key, entry in value.items())})'
        return '{' + ', '.join(f'{key!r}: {written(entry)}' for key, entry in value.items()) + '}'
    if isinstance(value, (list, tuple)):
        inside = ', '.join(map(written, value))
        return f'[{inside}]' if isinstance(value, list) else f'({inside}{"," * (len(value) == 1)})'
    return as_text(repr(value))


def base_of(cfg: Config) -> tuple[list[str], Config | None]:
    """What the file of a config names as ``_base_``, and the config which that is; nothing where there is none.

    Python-style configs (``read_base``) do not say what they take from where.
    """
    name = cfg.filename
    if not name or not str(name).endswith('.py'):
        return [], None
    try:
        tree = ast.parse(Path(name).read_text(encoding='utf-8'))
        named = next(
            ast.literal_eval(line.value)
            for line in tree.body
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name) and line.targets[0].id == '_base_'
        )
        names = [named] if isinstance(named, str) else list(named)
        folder = os.path.dirname(os.path.abspath(name))
        paths = [base if '::' in base else os.path.normpath(os.path.join(folder, base)) for base in names]
        return names, Config.fromstring(f'_base_ = {paths!r}', '.py')
    except (StopIteration, OSError, ValueError, TypeError, KeyError):
        return [], None


def _of_entries(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _cut(text: str, width: int) -> str:
    text = re.sub(r'\s+', ' ', text)
    return text if len(text) <= width else f'{text[: width - 4]} ...'
