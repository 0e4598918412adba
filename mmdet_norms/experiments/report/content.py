"""What the report says, as data: settings, differences from a baseline, falls with the batch size, caveats."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import harmonic_mean, mean

from ...errors import UserError, did_you_mean
from .. import effects
from ..effects import Effect
from ..runs import FAILED, Run
from .metrics import Metric, headline, metrics, of_classes
from .published import published

NORM_NAMES = {
    'bn': 'BN', 'syncbn': 'SyncBN', 'gn': 'GN', 'gn-ws': 'GN + WS', 'cbn': 'CBN', 'mabn': 'MABN', 'brn': 'BRN',
    'sn': 'SN', 'rbn': 'RBN', 'bin': 'BIN', 'bnet3': 'BNET-3', 'bnet5': 'BNET-5', 'bnet7': 'BNET-7', 'an': 'AN',
    'an-gn': 'AN (GN)', 'frozen': 'frozen BN',
}  # fmt: skip
COSTS = ('seconds_per_iteration', 'images_per_second', 'peak_memory_mb', 'parameters')
_PLACE = ('batch_size', 'seed')
_MOST_CLASSES = 12


@dataclass(frozen=True)
class Method:
    """What is compared: a norm, with whatever else was varied beside batch size and seed.

    Args:
        labels: as (key, value), the norm first.
        name: for people.
    """

    labels: tuple[tuple[str, object], ...]
    name: str

    @property
    def as_dict(self) -> dict:
        return dict(self.labels)


@dataclass(eq=False)
class Setting:
    """A method at a batch size: the runs of all its seeds."""

    method: Method
    batch_size: int | None
    runs: list[Run] = field(default_factory=list)

    def values(self, key: str) -> dict:
        """Seed -> value of a metric, of the runs that came to their end."""
        found = ((run, run.results.get(key)) for run in self.runs if run.is_finished)
        return {run.labels['seed']: value for run, value in found if value is not None and value >= 0}

    def cost(self, key: str) -> float | None:
        """Mean over the seeds; of images per second the harmonic one, which is that of the mean time."""
        known = [run.cost.get(key) for run in self.runs if run.is_finished]
        known = [value for value in known if isinstance(value, (int, float))]
        middle = harmonic_mean if key == 'images_per_second' else mean
        return middle(known) if known else None

    def classes(self, metric: Metric) -> dict[str, float]:
        """Class -> mean over the seeds of a metric."""
        found: dict[str, list[float]] = {}
        for classes in self.classes_of_seeds(metric).values():
            for name, value in classes.items():
                found.setdefault(name, []).append(value)
        return {name: mean(values) for name, values in found.items()}

    def classes_of_seeds(self, metric: Metric) -> dict[object, dict[str, float]]:
        """Seed -> class -> value of a metric."""
        return {run.labels['seed']: of_classes(run.results, metric) for run in self.runs if run.is_finished}


@dataclass(frozen=True, eq=False)
class Difference:
    """Of a setting from the baseline at the same batch size."""

    setting: Setting
    baseline: Setting
    effect: Effect


@dataclass(frozen=True, eq=False)
class Fall:
    """Of a method from a larger batch size to a smaller one.

    Args:
        more: how much more that is than what the baseline loses; None for the baseline.
    """

    large: Setting
    small: Setting
    effect: Effect
    more: Effect | None


class Content:
    """All of it; numbers in the unit of results.json.

    Args:
        runs: what was found.
        grids: what each grid.json says.
        metric: a key of results.json to compare by; by default the box AP or whatever most runs have.
        baseline: a norm, or ``KEY=VALUE`` of a label; by default ``bn``, else the first norm.

    Its ``ordered`` are the methods, baselines first.

    Raises:
        UserError: no run is finished, or none has that metric or baseline.
    """

    def __init__(
        self, runs: Sequence[Run], grids: Sequence[dict] = (), metric: str | None = None, baseline: str | None = None
    ) -> None:
        self.runs, self.grids = list(runs), list(grids)
        finished = [run for run in runs if run.is_finished and run.results]
        if not finished:
            states = ', '.join(f'{count} {status}' for status, count in Counter(run.status for run in runs).items())
            raise UserError(f'no run has come to its end yet with results ({states}): there is nothing to compare')
        self.metric = headline([run.results for run in finished], metric)
        self.compared = [run for run in finished if self.metric.key in run.results]
        kept = {id(run) for run in self.compared}
        self.others = [run for run in finished if id(run) not in kept]
        tasks = {_task(run) for run in self.compared}
        self.not_finished = [run for run in runs if not run.is_finished or not run.results]
        shown = self.compared + [run for run in self.not_finished if not run.cfg or _task(run) in tasks]
        self.metrics = [m for m in metrics(run.results for run in self.compared) if self._has_values(m)]
        self.settings = _settings(shown)
        self.baseline_name, self._baseline_key = _baseline(baseline, self.methods)
        self.ordered = sorted(self.methods, key=lambda method: self.baseline_of(method) is not None)
        self.settings.sort(key=lambda s: (_size(s.batch_size), self.ordered.index(s.method)))
        self.differences = self.differences_in(self.metric)
        self.falls = self._falls()

    @cached_property
    def methods(self) -> list[Method]:
        return list(dict.fromkeys(setting.method for setting in self.settings))

    @cached_property
    def batch_sizes(self) -> list[int | None]:
        return sorted({setting.batch_size for setting in self.settings}, key=_size)

    @cached_property
    def seeds(self) -> list:
        found = {run.labels['seed'] for run in self.compared}
        return sorted(found, key=lambda seed: (seed, '') if isinstance(seed, int) else (float('inf'), str(seed)))

    def at(self, method: Method, batch_size: int | None) -> Setting | None:
        """The setting, if there is one."""
        found = (s for s in self.settings if s.method == method and s.batch_size == batch_size)
        return next(found, None)

    def values(self, setting: Setting, metric: Metric | None = None) -> dict:
        """Seed -> value of the metric that runs are compared by."""
        return setting.values((metric or self.metric).key)

    def baseline_of(self, method: Method) -> Method | None:
        """What a method is compared with; None if it is a baseline, or has none."""
        key, value = self._baseline_key
        if str(method.as_dict.get(key)) == value:
            return None
        others = [m for m in self.methods if str(m.as_dict.get(key)) == value]
        rest = {k: v for k, v in method.labels if k not in (key, 'config')}
        same = [m for m in others if {k: v for k, v in m.labels if k not in (key, 'config')} == rest]
        return next(iter(same or (others if len(others) == 1 else ())), None)

    def difference(self, setting: Setting) -> Difference | None:
        """That of a setting."""
        return next((d for d in self.differences if d.setting is setting), None)

    def differences_in(self, metric: Metric) -> list[Difference]:
        """Of every setting from its baseline, in a metric."""
        found = []
        for setting, other in self._beside_baselines():
            effect = effects.effect(self.values(setting, metric), self.values(other, metric), metric.step)
            found += [(setting, other, effect)] if effect else []
        # which norm to take is asked at one batch size: its comparisons are corrected together
        by_size = {size: [i for i, (s, *_) in enumerate(found) if s.batch_size == size] for size in self.batch_sizes}
        corrected = {}
        for places in by_size.values():
            corrected.update(zip(places, effects.corrected([found[i][2] for i in places])))
        return [Difference(setting, other, corrected[i]) for i, (setting, other, _) in enumerate(found)]

    def class_differences(self, metric: Metric) -> dict[Setting, dict[str, float]]:
        """Class -> difference from the baseline at the same batch size, over the seeds that have both."""
        found: dict[Setting, dict[str, float]] = {}
        for setting, baseline in self._beside_baselines():
            ours, base = (side.classes_of_seeds(metric) for side in (setting, baseline))
            gaps: dict[str, list[float]] = {}
            for seed in ours.keys() & base.keys():
                for name in ours[seed].keys() & base[seed].keys():
                    gaps.setdefault(name, []).append(ours[seed][name] - base[seed][name])
            names = dict.fromkeys(name for classes in ours.values() for name in classes)
            found[setting] = {name: mean(gaps[name]) for name in names if name in gaps}
        return {setting: differences for setting, differences in found.items() if differences}

    def _beside_baselines(self) -> Iterator[tuple[Setting, Setting]]:
        """Every setting that has its baseline at the same batch size, and that."""
        for setting in self.settings:
            baseline = self.baseline_of(setting.method)
            if other := baseline and self.at(baseline, setting.batch_size):
                yield setting, other

    @cached_property
    def headlines(self) -> list[Metric]:
        """The metric to compare by, and the same of the other kind: mask AP beside box AP."""
        kind, _, ap = self.metric.key.partition('_')
        same = (f'bbox_{ap}', f'segm_{ap}') if kind in ('bbox', 'segm') else ()
        return [self.metric, *(metric for metric in self.metrics if metric.key in same and metric != self.metric)]

    def published(self, setting: Setting) -> dict | None:
        """The published row of what its runs trained."""
        return next((row for run in setting.runs if (row := published(run))), None)

    def best(self, batch_size: int | None) -> list[Setting]:
        """The settings at a batch size that have values, best mean first."""
        known = [s for s in self.settings if s.batch_size == batch_size and self.values(s)]
        return sorted(known, key=lambda s: -self.metric.sign * mean(self.values(s).values()))

    @cached_property
    def notes(self) -> list[str]:
        """What a reader has to know before believing a table."""
        return list(_notes(self))

    def _has_values(self, metric: Metric) -> bool:
        return any(run.results.get(metric.key, -1) >= 0 for run in self.compared)

    def _falls(self) -> list[Fall]:
        """From the largest batch size that a method has to its smallest."""
        found = []
        for method in self.ordered:
            sizes = [size for size in self.batch_sizes if size is not None]
            known = [s for size in sizes if (s := self.at(method, size)) and self.values(s)]
            if len(known) < 2:
                continue
            small, large = known[0], known[-1]
            effect = effects.effect(self.values(small), self.values(large), self.metric.step)
            baseline, more = self.baseline_of(method), None
            ends = [baseline and self.at(baseline, end.batch_size) for end in (small, large)]
            if all(ends) and effect:
                sides = [self.values(end) for end in (small, large, *ends)]
                more = effects.effect_of_effects(sides, self.metric.step)
            found += [(large, small, effect, more)] if effect else []
        ours = effects.corrected([effect for *_, effect, _ in found])
        mores = effects.corrected([more for *_, more in found])
        return [Fall(large, small, e, m) for (large, small, *_), e, m in zip(found, ours, mores)]


def most_different(differences: Iterable[Mapping[str, float]]) -> tuple[list[str], str]:
    """The classes of :meth:`Content.class_differences` that differ most, and in words that these are not all."""
    known = list(differences)
    names = list(dict.fromkeys(name for found in known for name in found))
    most = {name: max(abs(found[name]) for found in known if name in found) for name in names}
    shown = sorted(sorted(names, key=lambda name: -most[name])[:_MOST_CLASSES], key=names.index)
    return shown, f'; the {len(shown)} classes of {len(names)} that differ most' * (len(shown) < len(names))


def _settings(runs: Sequence[Run]) -> list[Setting]:
    varied = _varied(runs)
    found: dict[tuple, Setting] = {}
    for run in runs:
        labels = {'norm': run.labels['norm'], **run.labels}
        key = tuple((k, _plain(v)) for k, v in labels.items() if k not in _PLACE)
        name = NORM_NAMES.get(str(labels['norm']), str(labels['norm']))
        more = ', '.join(_label(k, v) for k, v in key if k != 'norm' and k in varied)
        name += f' ({more})' if more else ''
        place = key, run.labels['batch_size']
        found.setdefault(place, Setting(Method(key, name), run.labels['batch_size'])).runs.append(run)
    return list(found.values())


def _label(key: str, value: object) -> str:
    """``'rho 0.5'`` of ``model.neck.norm_cfg.rho=0.5``; a config or folder says by itself what it is."""
    return str(value) if key in ('config', 'run') else f'{key.rpartition(".")[2]} {value}'


def _varied(runs: Sequence[Run]) -> set[str]:
    keys = {key for run in runs for key in run.labels}
    return {key for key in keys if len({_plain(run.labels.get(key)) for run in runs}) > 1}


def _plain(value: object) -> object:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _baseline(wanted: str | None, methods: Sequence[Method]) -> tuple[str, tuple[str, str]]:
    """Its name for people, and the label that makes a method one."""
    norms = list(dict.fromkeys(str(method.as_dict['norm']) for method in methods))
    if wanted is None:
        wanted = 'bn' if 'bn' in norms else norms[0]
    key, is_pair, value = wanted.partition('=')
    if not is_pair:
        key, value = 'norm', wanted
    values = list(dict.fromkeys(str(m.as_dict[key]) for m in methods if key in m.as_dict))
    if value not in values:
        keys = list(dict.fromkeys(key for method in methods for key in method.as_dict))
        known = f'the runs have {", ".join(values)}' if values else f'the runs have the labels {", ".join(keys)}'
        raise UserError(f'--baseline {wanted}: no run has it{did_you_mean(value, values)}; {known}')
    return (NORM_NAMES.get(value, value) if key == 'norm' else _label(key, value)), (key, value)


def _task(run: Run) -> bool:
    """Whether it is a classifier's."""
    return any(key.startswith('accuracy/') for key in run.results) or 'ImageClassifier' in str(
        (run.cfg.get('model') or {}).get('type')
    )


def _size(batch_size: int | None) -> float:
    return float('inf') if batch_size is None else batch_size


def _notes(content: Content):
    counts = Counter(run.status for run in content.not_finished if not run.is_finished)
    for status, count in counts.items():
        text = 'failed' if status == FAILED else f'{"is" if count == 1 else "are"} {status}'
        yield f'{count} of {len(content.runs)} runs {text}, and counted in no mean.'
    empty = sum(run.is_finished for run in content.not_finished)
    if empty:
        yield (
            f'{empty} {"run" if empty == 1 else "runs"} came to the end without a result, and '
            f'{"is" if empty == 1 else "are"} in no mean: the evaluation of a detector that detects nothing has none. '
            'Where that is so, the means of its norm are too high.'
        )
    if content.others:
        names = sorted({metric.key for metric in metrics(run.results for run in content.others)})
        have = 'run has' if len(content.others) == 1 else 'runs have'
        yield (
            f'{len(content.others)} {have} no {content.metric.name} and are left out; --metric {names[0]} makes a '
            'report of them.'
        )
    ones = [setting for setting in content.settings if len(content.values(setting)) == 1]
    if ones:
        some = '1 setting has' if len(ones) == 1 else f'{len(ones)} settings have'
        which = 'Every setting has' if len(ones) == len(content.settings) else some
        yield f'{which} one seed: how much of a difference is chance cannot be said.'
    sets = {_data(run) for run in content.compared} - {None}
    if len(sets) > 1:
        yield f'The runs were evaluated on different data ({", ".join(sorted(sets))}): they do not compare.'
    if len({run.of.partition(',')[0] for run in content.compared}) > 1:
        yield 'Some results are of a validation and some of a test, as there is nothing else of those runs.'
    for size in content.batch_sizes:
        lengths = {
            run.iterations for s in content.settings if s.batch_size == size for run in s.runs if run.is_finished
        }
        if len(lengths - {None}) > 1:
            said = ', '.join(map(str, sorted(lengths - {None})))
            yield f'At batch size {size} the runs were trained for different numbers of iterations ({said}).'
    within = Counter(
        (run.labels['norm'], kind) for run in content.compared for kind in run.cost.get('in_warm_up') or ()
    )
    for (norm, kind), count in within.items():
        norm = NORM_NAMES.get(str(norm), str(norm))
        trainings = '1 training' if count == 1 else f'{count} trainings'
        yield (
            f'{norm}: {trainings} ended within the warm-up of {kind}, and measured what it is until then, another '
            'method: train longer, or shorten it where it can be (docs/norms.md).'
        )
    devices = {run.cost['device'] for run in content.compared if run.cost.get('device')}
    if len(devices) > 1:
        yield f'Costs were measured on different devices ({", ".join(sorted(devices))}).'


def _data(run: Run) -> str | None:
    """The validation set, as the config names it."""
    dataset: Mapping = (run.cfg.get('val_dataloader') or {}).get('dataset') or {}
    evaluator = run.cfg.get('val_evaluator') or {}
    evaluator = evaluator[0] if isinstance(evaluator, (list, tuple)) and evaluator else evaluator
    named = evaluator.get('ann_file') if isinstance(evaluator, Mapping) else None
    if named:
        return str(named)
    parts = [str(part) for part in (dataset.get('data_root'), dataset.get('ann_file')) if part]
    return str(Path(*parts)) if parts else None
