"""The answer in words: which norm, at which batch size, by how much, at what cost, how sure."""

import math
from collections.abc import Iterator, Sequence
from statistics import mean

from .. import effects
from ..effects import Effect, interval, number, p_value, seeds
from .content import Content, Difference, Fall, Setting

_COSTS = (('seconds_per_iteration', 'time per iteration'), ('peak_memory_mb', 'memory'))
_NEAR = 0.02  # of a cost: less is the noise of a measurement


def verdict(content: Content) -> str:
    """One line: ``'MABN ahead of BN at batch size 2; no difference seen at 16'``."""
    said: dict[str, list[str]] = {}
    for size in content.batch_sizes:
        said.setdefault(_verdict_at(content, size), []).append('an unknown one' if size is None else str(size))
    sizes = list(said.values())
    parts = [f'{what} at {_listed(sizes)}' for what, sizes in said.items()] if len(content.batch_sizes) > 1 else [*said]
    text = '; '.join(parts)
    if len(content.batch_sizes) > 1:
        text = text.replace(' at ', f' at batch size{"s" if len(sizes[0]) > 1 else ""} ', 1)
    return text[0].upper() + text[1:]


def answer(content: Content) -> list[str]:
    """Paragraphs: of each batch size, and of what it changes."""
    paragraphs = [' '.join(_at(content, size)) for size in content.batch_sizes]
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


def _verdict_at(content: Content, size: int | None) -> str:
    ranked = content.best(size)
    if not ranked:
        return 'nothing finished'
    best, base = ranked[0], content.baseline_name
    differences = [d for d in content.differences if d.setting in ranked]
    ahead = [d for d in differences if d.effect.is_seen and d.effect.difference > 0]
    behind = [d for d in differences if d.effect.is_seen and d.effect.difference < 0]
    if ahead:
        names = [d.setting.method.name for s in ranked for d in ahead if d.setting is s]
        return f'{_listed(names)} ahead of {base}'
    equal = [setting.method.name for setting in _equal(content, ranked)]
    has = f'{best.method.name} has' if len(equal) == 1 else f'{_listed(equal)} have'
    what = 'the highest' if len(equal) < len(ranked) or len(equal) == 1 else 'the same'
    if not differences:
        return f'only {best.method.name} finished' if len(ranked) == 1 else f'{has} {what} mean'
    if all(d.effect.p is None for d in differences):
        return f'{has} {what} value, of one seed'
    likely = [d for d in differences if d.effect.is_likely and d.effect.difference > 0]
    if likely:
        return f'{max(likely, key=lambda d: d.effect.difference).setting.method.name} perhaps ahead of {base}'
    if behind and len(behind) == len(differences):
        return f'{base} ahead of {_listed([d.setting.method.name for d in behind])}'
    return f'nothing seen ahead of {base}' if behind else f'no difference seen from {base}'


def _at(content: Content, size: int | None) -> Iterator[str]:
    where = f'At batch size {size}' if size is not None else 'At an unknown batch size'
    ranked = content.best(size)
    if not ranked:
        yield f'{where} no run has come to its end.'
        return
    equal = _equal(content, ranked)
    if len(equal) > 1:
        yield from _of_equal_ones(content, where, equal, ranked)
        return
    best, metric = ranked[0], content.metric
    difference = content.difference(best)
    head = f'{best.method.name} has the highest {metric.name}, {value(content, best)}'
    if difference is None:
        rivals = sorted((d for d in content.differences if d.setting in ranked), key=lambda d: -d.effect.difference)
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
    if effect.p is None:
        yield f'{where}, {head}, {gap} above {base}, of one seed: how sure that is cannot be said.'
    elif effect.is_seen:
        yield f'{where}, {head}: {gap} above {base} ({details}, {p_value(effect)}).'
    elif effect.is_likely:
        yield f'{where}, {head}. Against {base} that is {words(content, difference.effect)}.'
    else:
        yield f'{where}, {head}, but against {base} there is {words(content, difference.effect)}.'
    yield from _second(content, ranked)
    yield from _cost(content, difference)


def _equal(content: Content, ranked: Sequence[Setting]) -> list[Setting]:
    """Those that have the mean of the best one, which is among them."""
    best, *others = (mean(content.values(setting).values()) for setting in ranked)
    return [ranked[0], *(setting for setting, value in zip(ranked[1:], others) if math.isclose(value, best))]


def _of_equal_ones(content: Content, where: str, equal: Sequence[Setting], ranked: Sequence[Setting]) -> Iterator[str]:
    """Several with one mean: none is the best, however sure or unsure that is."""
    names, metric = _listed([setting.method.name for setting in equal]), content.metric
    what = 'the same' if len(equal) == len(ranked) else 'the same, highest'
    yield f'{where}, {names} have {what} {metric.name}, {value(content, equal[0])}.'
    known = [difference for setting in equal if (difference := content.difference(setting)) is not None]
    if known:
        said = '; '.join(f'{d.setting.method.name} {words(content, d.effect)}' for d in known)
        yield f'Against {content.baseline_name}: {said}.'
    for difference in known:
        yield from _cost(content, difference)


def _second(content: Content, ranked: Sequence[Setting]) -> Iterator[str]:
    """Whether the runner-up is told apart from the best."""
    if len(ranked) < 3 or content.difference(ranked[1]) is None:
        return
    found = effects.effect(content.values(ranked[0]), content.values(ranked[1]), content.metric.step)
    if found is None or found.p is None or found.is_seen:
        return
    found = scaled(content, found)
    name, digits = ranked[1].method.name, content.metric.digits
    yield f'{name}, {number(found.difference, digits)} below it, is not told apart from it ({interval(found, digits)}).'


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
        falls = [fall for fall in falls if fall.effect.p is not None]
        seen = sorted((f for f in falls if f.effect.is_seen or f.effect.is_likely), key=lambda f: f.effect.difference)
        unseen = [fall.small.method.name for fall in falls if fall not in seen]
        said = [_fall(content, fall) for fall in seen]
        said += [f'no change is seen of {_listed(unseen)}'] if unseen else []
        if said:
            yield f'From batch size {pair[0]} to {pair[1]}, {_listed(said)}.'


def _fall(content: Content, fall: Fall) -> str:
    effect, digits = scaled(content, fall.effect), content.metric.digits
    verb = ('' if effect.is_seen else 'perhaps ') + ('loses' if effect.difference < 0 else 'gains')
    low, high = (number(end, digits) for end in sorted((abs(effect.low), abs(effect.high))))
    return f'{fall.small.method.name} {verb} {number(abs(effect.difference), digits)} ({low} to {high})'


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
    else:
        yield 'A difference counts as seen at p < 0.05.'


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} and {names[-1]}'


def _unit(content: Content) -> str:
    return f' {content.metric.unit}' if content.metric.unit else ''
