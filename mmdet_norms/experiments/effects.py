"""How far two sets of seeds differ, how sure that is, and how to say it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95
ALPHA = 1 - LEVEL
INTERVAL = f'{LEVEL * 100:.0f} % interval'


@dataclass(frozen=True)
class Effect:
    """A mean difference, in the unit of the values.

    Args:
        difference: of the means: of the pairs if it is paired.
        low: end of the interval; None where one seed gives none.
        high: the other end.
        p: of no difference, two-sided; None as above.
        seeds: that it rests on: of each side, if it is not paired.
        paired: whether each seed of one side was set against the same seed of the other.
        adjusted: p after the correction for several comparisons (:func:`corrected`).
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    paired: bool
    adjusted: float | None = None

    @property
    def is_seen(self) -> bool:
        """Whether there is a difference beyond what chance, and the number of comparisons, would give."""
        p = self.p if self.adjusted is None else self.adjusted
        return p is not None and p < ALPHA

    @property
    def is_likely(self) -> bool:
        """Whether there would be one, had nothing else been compared."""
        return self.p is not None and self.p < ALPHA and not self.is_seen

    def times(self, scale: float) -> 'Effect':
        """The same in another unit."""
        low, high = (None if end is None else end * scale for end in (self.low, self.high))
        return replace(self, difference=self.difference * scale, low=low, high=high)


def effect(ours: Mapping[int, float], others: Mapping[int, float], step: float = 0.0) -> Effect | None:
    """The difference of ``ours`` from ``others``; None if either has no value.

    Seeds that both have are paired (Student's t of the differences), since they share the order of the data and the
    first weights. Without two such seeds, but two on each side, it is Welch's t.

    Args:
        ours: seed -> value.
        others: the same of what it is compared with.
        step: to which the values are rounded. Differences that agree to less are no surer than this.
    """
    common = sorted(ours.keys() & others.keys(), key=str)
    if len(common) < 2 and min(len(ours), len(others)) > 1:
        return _welch(list(ours.values()), list(others.values()), step)
    if common:
        return _one_sample(np.array([ours[seed] - others[seed] for seed in common]), step)
    if not ours or not others:
        return None
    difference = float(np.mean(list(ours.values())) - np.mean(list(others.values())))
    return Effect(difference, None, None, None, 1, paired=False)


def effect_of_effects(sides: Sequence[Mapping[int, float]], step: float = 0.0) -> Effect | None:
    """How much more ``sides[0] - sides[1]`` is than ``sides[2] - sides[3]``, paired over the seeds that all have."""
    common = sorted(set.intersection(*(set(side) for side in sides)), key=str)
    if not common:
        return None
    a, b, c, d = sides
    return _one_sample(np.array([a[s] - b[s] - c[s] + d[s] for s in common]), step * math.sqrt(2))


def corrected(effects: Sequence[Effect | None]) -> list[Effect | None]:
    """The same with p values after Holm's correction for all of those that have one."""
    ranked = sorted((i for i, e in enumerate(effects) if e is not None and e.p is not None), key=lambda i: effects[i].p)
    adjusted, largest = list(effects), 0.0
    for rank, i in enumerate(ranked):
        largest = max(largest, min(1.0, effects[i].p * (len(ranked) - rank)))
        adjusted[i] = replace(effects[i], adjusted=largest)
    return adjusted


def in_words(found: Effect, digits: int = 1) -> str:
    """``'no difference seen: +0.4, 95 % interval -0.9 to 1.7, 3 seeds'``."""
    said = signed(found.difference, digits)
    if found.p is None:
        return f'{said}, one seed: no interval'
    if found.is_likely:
        alone = p_value(replace(found, adjusted=None))
        several = p_value(found).removeprefix('p ').removeprefix('= ')
        said = f'not certain: {said}, {interval(found, digits)}, {alone} by itself, {several} among all comparisons'
        return f'{said}, {seeds(found)}'
    details = f'{interval(found, digits)}, {p_value(found)}, {seeds(found)}'
    return f'{said}, {details}' if found.is_seen else f'no difference seen: {said}, {details}'


def interval(found: Effect, digits: int = 1) -> str:
    """``'95 % interval -0.9 to 1.7'``, or ``'no interval'``."""
    if found.low is None:
        return 'no interval'
    return f'{INTERVAL} {number(found.low, digits)} to {number(found.high, digits)}'


def p_value(found: Effect) -> str:
    """``'p = 0.012'``, after the correction if there was one; ``'no p value'`` of one seed."""
    p = found.p if found.adjusted is None else found.adjusted
    return 'no p value' if p is None else p_in_words(p)


def p_in_words(p: float) -> str:
    """``'p = 0.012'``."""
    return 'p < 0.001' if p < 0.001 else f'p = {p:.2g}'


def seeds(found: Effect) -> str:
    """``'3 seeds'``; of sides that share none, so many each."""
    many = f'{found.seeds} seed{"s" if found.seeds != 1 else ""}'
    return many if found.paired else f'{many} each, not paired'


def signed(value: float, digits: int = 1) -> str:
    """``'+0.4'``, ``'-0.4'``, ``'0.0'``: a minus that is read as one is left to whoever sets the text."""
    text = f'{value:+.{digits}f}'
    return text[1:] if float(text) == 0 else text


def number(value: float, digits: int = 1) -> str:
    """``'0.4'``, and never ``'-0.0'``."""
    text = f'{value:.{digits}f}'
    return text[1:] if text.startswith('-') and float(text) == 0 else text


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation over the seeds; None of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _one_sample(differences: np.ndarray, step: float) -> Effect:
    count, mean = len(differences), float(np.mean(differences))
    if count < 2:
        return Effect(mean, None, None, None, count, paired=True)
    # of a difference of two values that are rounded to `step`
    deviation = max(float(np.std(differences, ddof=1)), step / math.sqrt(6))
    return _of_t(mean, deviation / math.sqrt(count), count - 1, count, True)


def _welch(ours: Sequence[float], others: Sequence[float], step: float) -> Effect:
    variances = [max(float(np.var(side, ddof=1)), step**2 / 12) / len(side) for side in (ours, others)]
    mean, error = float(np.mean(ours) - np.mean(others)), math.sqrt(sum(variances))
    count = min(len(ours), len(others))
    if error == 0:
        return _of_t(mean, 0.0, 1, count, False)
    freedom = sum(variances) ** 2 / sum(v**2 / (len(side) - 1) for v, side in zip(variances, (ours, others)))
    return _of_t(mean, error, freedom, count, False)


def _of_t(mean: float, error: float, freedom: float, count: int, paired: bool) -> Effect:
    if error == 0:
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0, count, paired)
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Effect(mean, mean - reach, mean + reach, p, count, paired)
