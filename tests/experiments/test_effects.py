"""Differences between seeds: the numbers of scipy and of textbooks, and the words for them."""

import numpy as np
import pytest
from scipy import stats

from mmdet_norms.experiments import effects
from mmdet_norms.experiments.effects import effect, in_words

OURS, OTHERS = {0: 30.1, 1: 31.0, 2: 29.4}, {0: 28.0, 1: 29.9, 2: 28.1}


def test_common_seeds_are_paired():
    found = effect(OURS, OTHERS | {7: 99.0})
    expected = stats.ttest_rel(list(OURS.values()), list(OTHERS.values()))
    low, high = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, low, high))
    assert found.paired and found.seeds == 3


def test_seeds_of_which_none_is_common_are_not_paired():
    ours, others = list(OURS.values()), [28.0, 29.9, 28.1, 27.5]
    found = effect(OURS, dict(enumerate(others, 5)))
    expected = stats.ttest_ind(ours, others, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, low, high))
    assert not found.paired and 'not paired' in in_words(found)


def test_one_seed_has_no_interval_and_none_no_difference():
    found = effect({0: 3.0}, {0: 2.0, 1: 5.0})
    assert (found.difference, found.low, found.p, found.is_seen) == (1.0, None, None, False)
    assert in_words(found) == '+1.0, one seed: no interval'
    assert effect({4: 3.0}, {0: 2.0}).difference == 1.0
    assert effect({}, {0: 2.0}) is None and effect({0: 2.0}, {}) is None


def test_seeds_that_agree_are_no_surer_than_the_rounding():
    """mmdet rounds to three decimals: two seeds with the same difference of 0.001 are no proof."""
    same = effect({0: 0.302, 1: 0.402}, {0: 0.301, 1: 0.401}, step=0.001)
    assert not same.is_seen and same.low < 0 < same.high
    assert effect({0: 0.3, 1: 0.4}, {0: 0.3, 1: 0.4}).p == 1  # and without a step, no division by zero
    assert effect({0: 0.3, 1: 0.3}, {2: 0.3, 3: 0.3}).p == 1


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(1000, 3))
    pairs = [(shared[i] + rng.normal(2, 1, 3), shared[i] + rng.normal(0, 1, 3)) for i in range(1000)]
    found = [effect(dict(enumerate(a)), dict(enumerate(b))) for a, b in pairs]
    assert np.mean([e.low < 2 < e.high for e in found]) == pytest.approx(0.95, abs=0.02)


def test_holm():
    """The example of Holm's correction in every textbook: 0.01, 0.04, 0.03, 0.005."""
    found = effects.corrected([None, *(_of(p) for p in (0.01, 0.04, 0.03, 0.005)), effect({0: 1.0}, {0: 0.0})])
    assert [e.adjusted for e in found[1:5]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert found[0] is None and found[5].adjusted is None
    assert found[1].is_seen and not found[2].is_seen


def test_words_of_what_is_seen_and_what_is_not():
    assert in_words(effect(OURS, OTHERS)) == '+1.5, 95 % interval 0.2 to 2.8, p = 0.039, 3 seeds'
    noise = effects.Effect(0.4, -0.9, 1.7, 0.31, 3, True)
    assert in_words(noise) == 'no difference seen: +0.4, 95 % interval -0.9 to 1.7, p = 0.31, 3 seeds'
    sure = effects.Effect(4.1, 2.9, 5.3, 0.0004, 3, True)
    assert in_words(sure) == '+4.1, 95 % interval 2.9 to 5.3, p < 0.001, 3 seeds'
    by_chance = effects.Effect(1.2, 0.1, 2.3, 0.04, 3, True, adjusted=0.2)
    assert in_words(by_chance) == (
        'not certain: +1.2, 95 % interval 0.1 to 2.3, p = 0.04 by itself, 0.2 among all comparisons, 3 seeds'
    )
    assert by_chance.is_likely and not by_chance.is_seen and not sure.is_likely and not noise.is_likely
    assert effects.signed(-0.01) == '0.0' and effects.number(-0.01) == '0.0'


def test_difference_of_differences():
    a, b, c, d = ({0: 5.0, 1: 6.0}, {0: 4.0, 1: 4.5}, {0: 3.0, 1: 3.5, 2: 9.0}, {0: 1.0, 1: 1.0})
    found = effects.effect_of_effects((a, b, c, d))
    assert found.difference == pytest.approx(((5 - 4 - 3 + 1) + (6 - 4.5 - 3.5 + 1)) / 2) and found.seeds == 2
    assert effects.effect_of_effects((a, b, c, {7: 1.0})) is None


def _of(p):
    return effects.Effect(1.0, 0.0, 2.0, p, 3, True)
