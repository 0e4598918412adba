"""The answer in words: which norm, at which batch size, by how much, at what cost, how sure."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean

from .. import effects
from ..effects import Effect, interval, number, p_value, seeds, signed
from .content import Content, Difference, Fall, Setting

_COSTS = (('seconds_per_iteration', 'time per iteration'), ('peak_memory_mb', 'memory'))
_PLACES = {
    'above': 'ahead of',
    'perhaps above': 'perhaps ahead of',
    'below': 'behind',
    'perhaps below': 'perhaps behind',
}
_NEAR = 0.02  # of a cost: less is the noise of a measurement


def verdict(content: Content) -> str:
    """One line: ``'MABN ahead of BN at batch size 2; no difference seen from BN at 16'``."""
    said: dict[str, list[str]] = {}
    for size in content.batch_sizes:
        for what in _verdict_at(content, size):
            said.setdefault(what, []).append('an unknown one' if size is None else str(size))
    sizes = list(said.values())
    parts = [f'{what} at {_listed(sizes)}' for what, sizes in said.items()] if len(content.batch_sizes) > 1 else [*said]
    text = '; '.join(parts)
    if len(content.batch_sizes) > 1:
        text = text.replace(' at ', f' at batch size{"s" if len(sizes[0]) > 1 else ""} ', 1)
    return text[0].upper() + text[1:]


def answer(content: Content) -> list[str]:
    """Paragraphs: of each batch size, and of what it changes."""
    paragraphs = [' '.join([*_at(content, size), *_others(content, size)]) for size in content.batch_sizes]
    return [text for text in (*paragraphs, ' '.join(_falls(content))) if text]


def method(content: Content) -> str:
    """What intervals and p values are; empty where there are none."""
    return ' '.join(_how_sure(content))


def value(content: Content, setting: Setting) -> str:
    """The mean of a setting, in the unit that people read."""
    metric = content.metric
    return f'{number(mean(content.values(setting).values()) * metric.scale, metric.digits)}{_unit(content)}'


def scaled(content: Content, effect: Effect) -> Effect:
    """An effect in that unit."""
    return effect.times(content.metric.scale)


def words(content: Content, effect: Effect) -> str:
    """An effect, and whether it is one."""
    return effects.in_words(scaled(content, effect), content.metric.digits)


def ratio(setting: Setting, other: Setting, key: str) -> float | None:
    """Of a cost of two settings."""
    ours, theirs = setting.cost(key), other.cost(key)
    return ours / theirs if ours and theirs else None


def _verdict_at(content: Content, size: int | None) -> list[str]:
    """What is seen, and those of which nothing can be: they are no part of a difference that is not seen."""
    ranked = content.best(size)
    if not ranked:
        return ['nothing finished']
    best, base = ranked[0], content.baseline_name
    differences = _ranked(content, size)
    tested = [d for d in differences if d.effect.p is not None]
    equal = [setting.method.name for setting in _equal(content, ranked)]
    has = f'{best.method.name} has' if len(equal) == 1 else f'{_listed(equal)} have'
    what = f'the {content.metric.extreme}' if len(equal) < len(ranked) or len(equal) == 1 else 'the same'
    if not differences:
        return [f'only {best.method.name} finished' if len(ranked) == 1 else f'{has} {what} mean']
    untested = [d for d in differences if d.effect.p is None]
    digits = content.metric.digits
    ones = [f'{d.setting.method.name} ({signed(scaled(content, d.effect).difference, digits)})' for d in untested]
    if not tested:
        said = f'{has} {what} value, of one seed' if _is_ranked(content, ranked) else f'one seed only of {_some(ones)}'
        return [said]
    groups = _groups(tested, content.metric.sign)
    groups = {where: [d.setting.method.name for d in found] for where, found in groups.items()}
    if len(groups.get('below', ())) == len(tested):
        said = f'{base} ahead of {_some([d.setting.method.name for d in tested])}'
    else:
        parts = [f'{_some(names)} {_PLACES[where]}' for where, names in groups.items()]
        said = ', '.join(f'{part} {"it" if i else base}' for i, part in enumerate(parts))
    return [said or f'no difference seen from {base}', *([f'one seed only of {_some(ones)}'] if ones else ())]


def _at(content: Content, size: int | None) -> Iterator[str]:
    where = f'At batch size {size}' if size is not None else 'At an unknown batch size'
    ranked = content.best(size)
    if not ranked:
        yield f'{where} no run has come to its end.'
        return
    if not _is_ranked(content, ranked):
        yield from _of_other_seeds(content, where, size)
        return
    equal = _equal(content, ranked)
    if len(equal) > 1:
        yield from _of_equal_ones(content, where, equal, ranked)
        return
    best, metric = ranked[0], content.metric
    difference = content.difference(best)
    head = f'{best.method.name} has the {metric.extreme} {metric.name}, {value(content, best)}'
    if difference is None:
        rivals = _ranked(content, size)
        if len(ranked) == 1:
            alone = f'{best.method.name} has a {metric.name} of {value(content, best)}'
            yield f'{where}, {alone}; there is nothing to compare it with.'
            return
        if not rivals:
            yield f'{where}, {head}.'
            return
        if all(d.effect.is_seen for d in rivals):
            yield f'{where}, {head}; the next is {rivals[0].setting.method.name}, {words(content, rivals[0].effect)}.'
        else:
            yield f'{where}, {head}; {rivals[0].setting.method.name} comes next ({words(content, rivals[0].effect)}).'
        return
    effect, base = scaled(content, difference.effect), difference.baseline.method.name
    gap, details = number(abs(effect.difference), metric.digits), f'{interval(effect, metric.digits)}, {seeds(effect)}'
    side = 'below' if metric.is_lower_better else 'above'
    if effect.p is None:
        yield f'{where}, {head}, {gap} {side} {base}, of one seed: how sure that is cannot be said.'
    elif effect.is_seen:
        yield f'{where}, {head}: {gap} {side} {base} ({details}, {p_value(effect)}).'
    elif effect.is_likely:
        yield f'{where}, {head}. Against {base} that is {words(content, difference.effect)}.'
    else:
        yield f'{where}, {head}, but against {base} there is {words(content, difference.effect)}.'
    yield from _second(content, ranked)
    yield from _cost(content, difference)


def _others(content: Content, size: int | None) -> Iterator[str]:
    """Those that :func:`_at` leaves out, if any can be told from chance at all."""
    differences, ranked, base = _ranked(content, size), content.best(size), content.baseline_name
    if all(d.effect.p is None for d in differences) or not _is_ranked(content, ranked):
        return
    told = _equal(content, ranked)
    if len(told) == 1 and content.difference(told[0]) is None:
        told = [differences[0].setting]  # the baseline is the best, which the next one is set against
    left = [d for d in differences if d.setting not in told]
    for where, found in _groups(left).items():
        said = [f'{d.setting.method.name} by {_extent(content, d.effect)}' for d in found]
        yield f'{where.capitalize()} {base}: {_listed(said)}.'
    unseen = [d for d in left if d.effect.p is not None and not d.effect.is_seen and not d.effect.is_likely]
    if unseen:
        widest = max(unseen, key=lambda d: d.effect.high - d.effect.low)
        found, digits = scaled(content, widest.effect), content.metric.digits
        reach = f'{number(found.low, digits)} to {number(found.high, digits)}'
        reach = (
            f'; the widest interval is that of {widest.setting.method.name}, {reach}' if unseen[1:] else f' ({reach})'
        )
        yield f'No difference from {base} is seen of {_listed([d.setting.method.name for d in unseen])}{reach}.'
    for d in left:
        if d.effect.p is None:
            where = f'{_gap(content, d.effect)} {"below" if d.effect.difference < 0 else "above"}'
            yield f'{d.setting.method.name} is {where} {base} in one seed: how sure that is cannot be said.'


def _ranked(content: Content, size: int | None) -> list[Difference]:
    """The differences at a batch size, best first."""
    found = [d for d in content.differences if d.setting.batch_size == size]
    return sorted(found, key=lambda d: -content.metric.sign * d.effect.difference)


def _groups(differences: Sequence[Difference], sign: int = 1) -> dict[str, list[Difference]]:
    """Where they are from the baseline, as far as that can be said: the largest first.

    Args:
        sign: -1 takes what is below for what is above.
    """
    found: dict[str, list[Difference]] = {}
    for where in _PLACES:
        known = [d for d in differences if (d.effect.is_likely if 'perhaps' in where else d.effect.is_seen)]
        known = [d for d in known if (sign * d.effect.difference > 0) == ('above' in where)]
        if known:
            found[where] = sorted(known, key=lambda d: -abs(d.effect.difference))
    return found


def _gap(content: Content, effect: Effect) -> str:
    return number(abs(scaled(content, effect).difference), content.metric.digits)


def _extent(content: Content, effect: Effect) -> str:
    """How large one is that leaves 0 out: ``'3.0 (0.3 to 5.6)'``."""
    ends = scaled(content, effect)
    low, high = (number(end, content.metric.digits) for end in sorted((abs(ends.low), abs(ends.high))))
    return f'{_gap(content, effect)} ({low} to {high})'


def _equal(content: Content, ranked: Sequence[Setting]) -> list[Setting]:
    """Those that have the mean of the best one, which is among them."""
    best, *others = (mean(content.values(setting).values()) for setting in ranked)
    return [ranked[0], *(setting for setting, value in zip(ranked[1:], others) if math.isclose(value, best))]


def _of_equal_ones(content: Content, where: str, equal: Sequence[Setting], ranked: Sequence[Setting]) -> Iterator[str]:
    """Several with one mean: none is the best, however sure or unsure that is."""
    names, metric = _listed([setting.method.name for setting in equal]), content.metric
    what = 'the same' if len(equal) == len(ranked) else f'the same, {metric.extreme}'
    yield f'{where}, {names} have {what} {metric.name}, {value(content, equal[0])}.'
    known = [difference for setting in equal if (difference := content.difference(setting)) is not None]
    if known:
        said = '; '.join(f'{d.setting.method.name} {words(content, d.effect)}' for d in known)
        yield f'Against {content.baseline_name}: {said}.'
    for difference in known:
        yield from _cost(content, difference)


def _is_ranked(content: Content, ranked: Sequence[Setting]) -> bool:
    """Whether the means have the order of the paired differences; where seeds are missing they may not."""
    known = {d.setting: content.metric.sign * d.effect.difference for d in content.differences}
    known.update({d.baseline: 0.0 for d in content.differences})
    found = [known[setting] for setting in ranked if setting in known]
    return all(a >= b or math.isclose(a, b, abs_tol=1e-9) for a, b in pairwise(found))


def _of_other_seeds(content: Content, where: str, size: int | None) -> Iterator[str]:
    """The mean is the best because seeds are missing: only differences over common seeds are said."""
    said = '; '.join(f'{d.setting.method.name} {words(content, d.effect)}' for d in _ranked(content, size))
    yield f'{where}, not all have the same seeds, and the means are not to be compared.'
    yield f'Against {content.baseline_name}, over the seeds of both: {said}.'


def _second(content: Content, ranked: Sequence[Setting]) -> Iterator[str]:
    """Whether the runner-up is told apart from the best."""
    if len(ranked) < 3 or content.difference(ranked[1]) is None:
        return
    sides = [content.values(setting) for setting in ranked[:2]][:: content.metric.sign]
    found = effects.effect(*sides, content.metric.step)
    if found is None or found.p is None or found.is_seen or found.difference < 0:  # of common seeds, not of all
        return
    found = scaled(content, found)
    name, digits = ranked[1].method.name, content.metric.digits
    gap = f'{number(found.difference, digits)} {"above" if content.metric.is_lower_better else "below"} it'
    yield f'{name}, {gap}, is not told apart from it ({interval(found, digits)}).'


def _cost(content: Content, difference: Difference) -> Iterator[str]:
    ours, base, said = difference.setting, difference.baseline, []
    for key, name in _COSTS:
        times = ratio(ours, base, key)
        if times:
            theirs = base.method.name
            said.append(
                f'as much {name} as {theirs}' if abs(times - 1) < _NEAR else f"{times:.2f} times {theirs}'s {name}"
            )
    if said:
        yield f'{ours.method.name} takes {" and ".join(said)}.'


def _falls(content: Content) -> Iterator[str]:
    for pair in dict.fromkeys((fall.large.batch_size, fall.small.batch_size) for fall in content.falls):
        falls = [fall for fall in content.falls if (fall.large.batch_size, fall.small.batch_size) == pair]
        ones = [fall for fall in falls if fall.effect.p is None]
        falls = [fall for fall in falls if fall.effect.p is not None]
        seen = [fall for fall in falls if fall.effect.is_seen or fall.effect.is_likely]
        seen.sort(key=lambda fall: content.metric.sign * fall.effect.difference)
        unseen = [fall.small.method.name for fall in falls if fall not in seen]
        said = [_fall(content, fall) for fall in seen]
        said += [f'no change is seen of {_listed(unseen)}'] if unseen else []
        said += [_fall(content, fall) for fall in ones] if said else []
        if said:
            yield f'From batch size {pair[0]} to {pair[1]}, {_listed(said)}.'


def _fall(content: Content, fall: Fall) -> str:
    effect, name = fall.effect, fall.small.method.name
    verb = 'loses' if effect.difference < 0 else 'gains'
    if content.metric.is_lower_better:
        verb = 'falls by' if effect.difference < 0 else 'rises by'
    if effect.p is None:
        return f'{name} {verb} {_gap(content, effect)} in one seed'
    return f'{name} {verb if effect.is_seen else f"perhaps {verb}"} {_extent(content, effect)}'


def _how_sure(content: Content) -> Iterator[str]:
    tested = [d for d in content.differences if d.effect.p is not None]
    if not tested:
        return
    paired = 'paired by seed' if all(d.effect.paired for d in tested) else 'paired by seed where seeds are shared'
    yield f"Intervals are of Student's t over the seeds, {paired}."
    most = max(sum(d.setting.batch_size == size for d in tested) for size in content.batch_sizes)
    if most > 1:
        each = ' of each batch size' if len(content.batch_sizes) > 1 else ''
        yield f"A difference counts as seen at p < 0.05 after Holm's correction for the {most} comparisons{each}."
        if any(d.effect.is_likely for d in tested):
            yield '"Perhaps" is what only its own p, without the correction, says.'
    else:
        yield 'A difference counts as seen at p < 0.05.'


def _some(names: Sequence[str]) -> str:
    """For a headline: not all of many."""
    return _listed(names if len(names) < 5 else [*names[:3], f'{len(names) - 3} others'])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} and {names[-1]}'


def _unit(content: Content) -> str:
    return f' {content.metric.unit}' if content.metric.unit else ''
