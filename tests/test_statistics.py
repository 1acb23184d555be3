"""Intervals against scipy's own and against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from nfnets.errors import UserError
from nfnets.train.compare.statistics import holm, holm_confidences, mean_interval, paired_difference, wilson

ACCURACIES = st.lists(st.floats(0.05, 0.95), min_size=2, max_size=12)


@given(ACCURACIES, st.sampled_from([0.8, 0.95, 0.99]))
def test_mean_interval_is_scipys(values: list[float], confidence: float) -> None:
    if np.ptp(values) < 1e-6:
        return
    ours = mean_interval(values, confidence)
    theirs = stats.ttest_1samp(values, 0.0)
    low, high = theirs.confidence_interval(confidence)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((np.mean(values), low, high), rel=1e-9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-300)


def test_paired_difference_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 30):
        a = rng.normal(0.9, 0.02, n)
        b = a + rng.normal(-0.01, 0.005, n)
        ours = paired_difference(a.tolist(), b.tolist())
        theirs = stats.ttest_rel(a, b)
        low, high = theirs.confidence_interval(0.95)
        assert (ours.low, ours.high, ours.p) == pytest.approx((low, high, theirs.pvalue))
        assert ours.n == n
        assert ours.half == pytest.approx((high - low) / 2)


def test_pairing_removes_what_seeds_share() -> None:
    shared = np.array([0.1, -0.2, 0.3, 0.05])
    noise = np.array([0.001, -0.001, 0.0015, 0.0])
    paired = paired_difference((0.6 + shared + noise).tolist(), (0.59 + shared).tolist())
    unpaired = stats.ttest_ind(0.6 + shared + noise, 0.59 + shared).confidence_interval()
    assert paired.low > 0 > unpaired.low


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(0.3, 1.0, (4000, 3))
    covered = sum((i := mean_interval(row.tolist())).low <= 0.3 <= i.high for row in draws)
    assert covered / len(draws) == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_no_interval_and_equal_seeds_have_width_zero() -> None:
    one = mean_interval([0.5])
    assert one.mean == 0.5
    assert all(math.isnan(x) for x in (one.low, one.half, one.p))
    same = paired_difference([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    shifted = mean_interval([0.1, 0.1, 0.1])
    assert shifted.half == 0.0
    assert shifted.p == 0.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    # Holm is the closure of Bonferroni: a hypothesis' adjusted p is the largest, over all intersections that
    # contain it, of (size of the intersection) × (its smallest p). Enumerate them all.
    m = len(p_values)
    for i, ours in enumerate(holm(p_values)):
        subsets = (s for r in range(1, m + 1) for s in itertools.combinations(range(m), r) if i in s)
        expected = max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets)
        assert ours == pytest.approx(expected)


def test_holm_leaves_untestable_comparisons_out_of_the_count() -> None:
    adjusted = holm([0.02, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])
    assert adjusted[2] == 0.5
    assert holm([]) == []


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_is_scipys(total: int, share: float) -> None:
    correct = round(share * total)
    theirs = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson(correct, total) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_inverts_the_score_test() -> None:
    # By its definition the bounds are the p at which the score test sits exactly at the critical value.
    correct, total = 17, 60
    z = stats.norm.ppf(0.975)
    observed = correct / total

    def excess(p: float) -> float:
        return (observed - p) ** 2 - z**2 * p * (1 - p) / total

    low = optimize.brentq(excess, 1e-9, observed)
    high = optimize.brentq(excess, observed, 1 - 1e-9)
    assert wilson(correct, total) == pytest.approx((low, high))


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([]),
        lambda: mean_interval([1.0, 2.0], confidence=95),
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: holm([1.5]),
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
    ],
)
def test_bad_input_is_one_line(call) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)


@given(st.lists(st.lists(st.floats(-0.05, 0.06), min_size=3, max_size=3), min_size=1, max_size=6))
def test_holms_intervals_leave_out_zero_exactly_where_holm_rejects(differences: list[list[float]]) -> None:
    # Holm by its own words: go down from the smallest p while p_(k) < α / (m − k + 1).
    p_values = [mean_interval(d).p for d in differences]
    m, rejected = len(p_values), set()
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        if p_values[i] >= 0.05 / (m - rank):
            break
        rejected.add(i)
    for i, confidence in enumerate(holm_confidences(p_values)):
        interval = mean_interval(differences[i], confidence)
        if min(abs(interval.low), abs(interval.high)) > 1e-9:
            assert (interval.low > 0 or interval.high < 0) == (i in rejected)
        assert confidence >= 0.95


def test_holms_intervals_cover_together_where_nothing_is_different() -> None:
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(1500):
        differences = rng.normal(0, 1, (4, 5)).tolist()
        levels = holm_confidences([mean_interval(d).p for d in differences])
        intervals = [mean_interval(d, level) for d, level in zip(differences, levels, strict=True)]
        missed += any(not i.low <= 0 <= i.high for i in intervals)
    assert missed / 1500 == pytest.approx(0.05, abs=0.02)
