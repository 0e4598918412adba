"""What the numbers of results.json are called, and in which unit people read them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...engine.results import COLUMNS, PER_CLASS_SUFFIX, TOP1_OF_CLASS, accuracies, coco_kinds, other_keys
from ...errors import UserError, did_you_mean

KIND_NAMES = {'bbox': 'box', 'segm': 'mask'}

# Words of a key of which less is better: CrowdHuman's mMR, losses, errors, what a tracker misses.
_LOWER = {'mmr', 'mr', 'loss', 'losses', 'error', 'err', 'mae', 'mse', 'rmse', 'nll', 'ece', 'fp', 'fn', 'idsw'}


@dataclass(frozen=True)
class Metric:
    """A number of results.json.

    Args:
        key: there.
        name: in tables and figures, such as ``'box AP50'``.
        scale: to the unit in which it is shown.
        unit: its name; empty of AP, which is read as 0 to 100.
        digits: after the point.
        step: to which it is rounded in the file.
        is_lower_better: as of an error.
    """

    key: str
    name: str
    scale: float = 100.0
    unit: str = ''
    digits: int = 1
    step: float = 0.001
    is_lower_better: bool = False

    @property
    def sign(self) -> int:
        """What to multiply a difference with, so that better is more."""
        return -1 if self.is_lower_better else 1

    @property
    def extreme(self) -> str:
        """What the best value is."""
        return 'lowest' if self.is_lower_better else 'highest'


def metrics(results: Iterable[Mapping[str, float]]) -> list[Metric]:
    """Those that are no result of one class, the ones that people look at first in front."""
    merged = {key: value for result in results for key, value in result.items()}
    found = [
        Metric(f'{kind}_{key}', f'{_kind_name(kind)} {column}')
        for kind in coco_kinds(merged)
        for column, key in COLUMNS.items()
        if f'{kind}_{key}' in merged
    ]
    found += [Metric(key, f'{name} accuracy', unit='%') for name, key in accuracies(merged).items()]
    return found + [
        Metric(key, key, scale=1.0, digits=3, step=0.0, is_lower_better=not _LOWER.isdisjoint(_words(key)))
        for key in other_keys(merged)
    ]


def headline(results: Sequence[Mapping[str, float]], wanted: str | None = None) -> Metric:
    """The one that runs are compared by: ``wanted``, else the first one that most runs have.

    Raises:
        UserError: no run has it; the message names those that are there.
    """
    known = metrics(results)
    if wanted is not None:
        for metric in known:
            if wanted in (metric.key, metric.name):
                return metric
        names = [metric.key for metric in known]
        said = f'; choose one of: {", ".join(names)}' if names else ', nor any other result'
        raise UserError(f'--metric {wanted}: no finished run has it{did_you_mean(wanted, names)}{said}')
    counts = {metric.key: sum(metric.key in result for result in results) for metric in known}
    most = [metric for metric in known if 2 * counts[metric.key] > len(results)]
    return most[0] if most else max(known, key=lambda metric: counts[metric.key])


def of_classes(results: Mapping[str, float], metric: Metric) -> dict[str, float]:
    """The same by class, where the evaluation says it: COCO's AP, top-1 accuracy."""
    if metric.key.endswith('_mAP'):
        start, end = f'{metric.key.removesuffix("_mAP")}_', PER_CLASS_SUFFIX
    elif metric.key == 'accuracy/top1':
        start, end = TOP1_OF_CLASS, ''
    else:
        return {}
    return {
        key[len(start) : len(key) - len(end)]: value
        for key, value in results.items()
        if key.startswith(start) and key.endswith(end) and value >= 0
    }


def _words(key: str) -> list[str]:
    return re.split(r'[^a-z0-9]+', key.lower())


def _kind_name(kind: str) -> str:
    prefix, _, last = kind.rpartition('/')
    return f'{prefix.split("/")[0]} {KIND_NAMES[last]}'.strip()
