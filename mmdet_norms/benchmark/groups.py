"""Candidates that are measured against each other in one interleaved run, and what comes out."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from .. import cores
from ..kernels import gpu
from .measure import Case, count_calls, explain, interleave, quartiles, ratios

LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
PRECISIONS = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
ONE_PASS = 'one pass'
CONV_ONLY = 'conv only'
_REFERENCE = ' (reference)'
_SHARED = 0.25  # of a core, that others may use beside the threads


def reference_of(name: str) -> str:
    """What the published formulation of a layer is called in a table."""
    return name + _REFERENCE


@dataclass
class Setting:
    """What holds for all candidates of a measurement.

    Args:
        device: where to run.
        precision: key of :data:`PRECISIONS`; below fp32 means autocast (and half inputs of bare layers).
        layout: key of :data:`LAYOUTS`.
    """

    device: torch.device
    precision: str = 'fp32'
    layout: str = 'nchw'

    @property
    def memory_format(self) -> torch.memory_format:
        """torch's name of the layout."""
        return LAYOUTS[self.layout]

    @property
    def half(self) -> torch.dtype | None:
        """The type that autocast uses; None in fp32."""
        return PRECISIONS[self.precision]

    def autocast(self):
        """A context for a forward pass."""
        return nullcontext() if self.half is None else torch.autocast(self.device.type, self.half)


@dataclass
class Entry:
    """One candidate.

    Args:
        case: what to time.
        over: the name of the case that its ratio is to; None for a baseline.
        facts: called after the timing; returns more columns of the row (bytes, parameters).
    """

    case: Case
    over: str | None = None
    facts: Callable[[], Mapping[str, object]] = dict


@dataclass
class Group:
    """Candidates of one interleaved run.

    Args:
        level: 'layer', 'conv', 'classifier' or 'detector'.
        mode: what a call does, e.g. 'forward+backward'.
        setting: device, precision, layout.
        size: of the input, as in a tensor's shape.
        entries: the candidates.
        images: images of a call, for images/s; 0 where that means nothing.
    """

    level: str
    mode: str
    setting: Setting
    size: tuple[int, ...]
    entries: list[Entry] = field(default_factory=list)
    images: int = 0

    @property
    def title(self) -> str:
        """For tables, pictures and the progress bar."""
        size = 'x'.join(map(str, self.size))
        return f'{self.level}, {self.mode}, {size}, {self.setting.precision}, {self.setting.layout}'

    def count_calls(self, repeats: int, warmup: int) -> int:
        """Calls that :meth:`measure` times or warms up with."""
        return count_calls((entry.case for entry in self.entries), repeats, warmup)

    def measure(self, repeats: int, warmup: int, on_call: Callable[[str], None] | None = None) -> dict:
        """Time the candidates, then ask each for its facts.

        Returns:
            level, mode, size, ...; ``load``, how busy others kept the cores meanwhile, and ``doubt``, what that does to
            the ratios or None; and ``rows``, one per candidate: ``name``, ``ms`` (median), ``ms_q1``, ``ms_q3``,
            ``ms_min``, ``times_ms``; ``ratio`` (median over the repeats of the ratio within a repeat), ``ratio_q1``,
            ``ratio_q3``, ``over``; ``passes``, where the group has a case :data:`ONE_PASS`; ``images_per_s``; what
            ``facts`` adds, such as ``saved_bytes``; ``saved_ratio`` and ``peak_ratio`` to the row of ``over``,
            ``state_ratio`` to that of the published formulation; ``note`` says what failed.
        """
        before = cores.Usage()
        times = interleave([entry.case for entry in self.entries], repeats, warmup, self.setting.device, on_call)
        load = cores.load_between(before, cores.Usage())
        one_pass = times.ms.pop(ONE_PASS, None)
        rows = [
            self._row(entry, times.ms, times.failed, one_pass) for entry in self.entries if entry.case.name != ONE_PASS
        ]
        _add_ratios(rows)
        return dict(
            level=self.level,
            mode=self.mode,
            size=list(self.size),
            precision=self.setting.precision,
            layout=self.setting.layout,
            title=self.title,
            repeats=repeats,
            load=dict(cores=load.cores, others=load.others, threads=torch.get_num_threads()),
            doubt=None if self.setting.device.type != 'cpu' else doubt(load, torch.get_num_threads()),
            one_pass_ms=one_pass and statistics.median(one_pass),
            rows=rows,
        )

    def _row(self, entry: Entry, ms: dict, failed: dict, one_pass: list | None) -> dict:
        name = entry.case.name
        row = dict(name=name, over=entry.over)
        if name in failed:
            return dict(row, note=failed[name])
        row.update(_summary('ms', ms[name]), ms_min=min(ms[name]))
        if entry.over in ms:
            row.update(_summary('ratio', ratios(ms[name], ms[entry.over])))
        if one_pass:
            row['passes'] = statistics.median(ratios(ms[name], one_pass))
        if self.level == 'classifier':
            row['calls_per_s'] = 1e3 / row['ms']
        if self.images:
            row['images_per_s'] = self.images / row['ms'] * 1e3
        try:
            row.update(entry.facts())
        except Exception as error:
            row['note'] = explain(error)
        row['times_ms'] = ms[name]
        return row


def doubt(load: cores.Load, threads: int) -> str | None:
    """Why ratios are doubtful that were measured beside others; None if they are not.

    Each layer's work is cut into pieces for the threads, and its time is that of the slowest: a layer of many small
    pieces loses more to a neighbour than one of few.
    """
    if load.others is None or threads <= load.free + _SHARED:
        return None
    fewer = cores.threads_for(load)
    mend = f', with --threads {fewer}' if fewer < threads else ''
    return (
        f'ratios are doubtful: {threads} thread{"s" * (threads > 1)} on {load.cores:g} cores, of which others kept '
        f'{load.others:.1f} busy; measure again when they are done{mend}'
    )


def _summary(name: str, values: list[float]) -> dict[str, float]:
    q1, median, q3 = quartiles(values)
    return {name: median, f'{name}_q1': q1, f'{name}_q3': q3}


def _add_ratios(rows: Iterable[dict]) -> None:
    """Bytes over those of the row that the time is compared with; of state, over the published formulation's."""
    by_name = {row['name']: row for row in rows}
    for row in by_name.values():
        for kind, base in (('saved', row['over']), ('peak', row['over']), ('state', reference_of(row['name']))):
            size, base_size = row.get(f'{kind}_bytes'), by_name.get(base, {}).get(f'{kind}_bytes')
            if size is not None and base_size:
                row[f'{kind}_ratio'] = size / base_size


def add_triton(group: Group) -> Group:
    """Measure candidates that have a ratio without the Triton kernels and once more with them: ``NAME, Triton``."""
    entries, group.entries = group.entries, []
    for entry in entries:
        name = entry.case.name
        if entry.over is None or name == CONV_ONLY or name.endswith(_REFERENCE):
            group.entries.append(entry)
        else:
            group.entries += [_switched(entry, name, False), _switched(entry, f'{name}, Triton', True)]
    return group


def _switched(entry: Entry, name: str, on: bool) -> Entry:
    def inside(call: Callable) -> Callable:
        def run():
            with gpu.switched(on):
                return call()

        return run

    case = entry.case
    return Entry(
        Case(name, inside(case.run), case.reset, inside(case.settle), case.settle_calls),
        entry.over,
        inside(entry.facts),
    )
