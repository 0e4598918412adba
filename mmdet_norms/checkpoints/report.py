"""What a conversion did, and how keys are listed for people."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class Report:
    """What a conversion did. Keys are new names, except in ``renamed`` (old -> new) and ``dropped`` (old -> why).

    Args:
        source: the layout.
        kind: 'detector', 'backbone' or 'classifier'.
        unwrapped: entries and prefixes that were around the state dict.
        unchanged: number of tensors that are as they were, name included.
        warnings: what probably makes the weights another function than the published one.
        notes: what else one should know.
        verified: whether a config was given, which the result then fits exactly.
        geometry: of a detector, the ``--geometry`` in which it was trained; None: today's.
    """

    source: str
    kind: str = ''
    unwrapped: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    cast: dict[str, str] = field(default_factory=dict)
    reordered: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    initialised: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verified: bool = False
    geometry: str | None = None


def pattern(key: str) -> str:
    """``layer1.0.bn1.weight`` -> ``layer*.*.bn*``: keys that differ in numbers and in the tensor's name look alike."""
    return re.sub(r'\d+', '*', key.rpartition('.')[0] or key)


def list_keys(keys: Iterable[str], remarks: Mapping[str, str] | None = None, most: int = 6) -> str:
    """Keys one per line, with remarks; more than ``most`` that look alike share a line, which names the first."""
    remarks = remarks or {}
    groups = defaultdict(list)
    for key in keys:
        groups[pattern(key)].append(key)
    lines = []
    for name, members in groups.items():
        remarked = [key + remarks.get(key, '') for key in members]
        if len(members) > most:
            tensors = ','.join(dict.fromkeys(key.rpartition('.')[2] for key in members))
            lines.append(f'  {name}.{{{tensors}}}: {len(members)}, the first is {remarked[0]}')
        else:
            lines += [f'  {key}' for key in remarked]
    return '\n'.join(lines)
