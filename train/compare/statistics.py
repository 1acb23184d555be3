"""Intervals and tests for comparisons over seeds: pure functions, numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from nfnets.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Args:
        mean: The estimate.
        low: Lower bound; NaN where one sample gives no interval.
        high: Upper bound; NaN likewise.
        n: Number of samples.
        p: Two-sided p-value of "the mean is zero"; NaN for one sample.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of samples with Student's t interval.

    mean ± t_{(1+confidence)/2, n−1} · s / √n, with s the sample standard deviation (over n − 1).

    Args:
        values: One number per seed, at least one.
        confidence: Coverage, in (0, 1).

    Returns:
        An `Interval`. One sample has no interval (NaN bounds). Equal samples have an interval of width zero.

    Raises:
        UserError: no values, or `confidence` outside (0, 1).

    Example:
        >>> i = mean_interval([0.90, 0.92, 0.91])
        >>> round(i.mean, 3), round(i.half, 4)
        (0.91, 0.0248)

    Student, "The probable error of a mean", Biometrika 6 (1908); checked against `scipy.stats.ttest_1samp`.
    """
    if not values:
        raise UserError("no values: expected at least one number per arm; run at least one seed")
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence}: expected a number between 0 and 1; pass 0.95")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1, math.nan)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    # Identical samples: rounding leaves an error of a few ulps that would read as an overwhelming p-value.
    if error <= 1e-12 * max(abs(v) for v in values):
        return Interval(mean, mean, mean, n, 1.0 if mean == 0 else 0.0)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Interval(mean, mean - half, mean + half, n, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of a − b over pairs (same seed: same data order, augmentation, raw weights) with its interval.

    d_i = a_i − b_i, then `mean_interval(d)`.

    Args:
        a: One number per seed.
        b: The other arm's, in the same order of seeds.
        confidence: Coverage, in (0, 1).

    Returns:
        An `Interval` of the difference; its `p` is that of the paired t-test.

    Raises:
        UserError: the lengths differ, or are zero.

    Example:
        >>> d = paired_difference([0.93, 0.95, 0.94], [0.92, 0.93, 0.93])
        >>> round(d.mean, 4), round(d.low, 4), round(d.high, 4)
        (0.0133, -0.001, 0.0277)

    Checked against `scipy.stats.ttest_rel(a, b).confidence_interval()`.
    """
    if len(a) != len(b):
        raise UserError(
            f"{len(a)} and {len(b)} values: expected the same seeds in both arms; run the missing ones"
        )
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values over several comparisons.

    With p_(1) ≤ … ≤ p_(m):  p̃_(k) = max_{j ≤ k} min(1, (m − j + 1) · p_(j)).

    Args:
        p_values: One per comparison; a NaN (no test possible) stays NaN and does not count among the m.

    Returns:
        The adjusted p-values in the order given.

    Raises:
        UserError: a value outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    bad = [p for p in p_values if not (math.isnan(p) or 0 <= p <= 1)]
    if bad:
        raise UserError(f"p-value {bad[0]}: expected a number between 0 and 1")
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def holm_confidences(p_values: Sequence[float], confidence: float = 0.95) -> list[float]:
    """How confident each of several intervals must be for it to leave out zero exactly where Holm rejects.

    With α = 1 − confidence and p_(1) ≤ … ≤ p_(m): the interval of p_(k) gets 1 − α / (m − min(k, r) + 1), where
    r is the first rank that Holm does not reject. The intervals of what is not rejected, taken together, cover
    with the given confidence (Guilbaud, Biometrical J. 50 (2008)); those of what is rejected are as wide as the
    test that rejected it.

    Args:
        p_values: One per comparison; a NaN (no test possible) does not count among the m.
        confidence: Of the whole, in (0, 1).

    Returns:
        A confidence per comparison, in the order given; a NaN keeps `confidence`.

    Raises:
        UserError: a value outside [0, 1].

    Example:
        >>> [round(c, 4) for c in holm_confidences([0.001, 0.03, 0.5])]
        [0.9833, 0.975, 0.975]

    S. Holm, Scand. J. Statist. 6 (1979).
    """
    alpha = 1 - confidence
    adjusted = holm(p_values)
    tested = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    rejected = sum(adjusted[i] < alpha for i in tested)
    levels = [confidence] * len(p_values)
    for rank, i in enumerate(sorted(tested, key=lambda i: p_values[i])):
        levels[i] = 1 - alpha / (len(tested) - min(rank, rejected))
    return levels


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for one model's accuracy: how far `total` test images can tell.

    (p̂ + z²/2n ± z·√(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)

    Args:
        correct: Images classified correctly.
        total: Images in the split, at least 1.
        confidence: Coverage, in (0, 1).

    Returns:
        Lower and upper bound, both within [0, 1].

    Raises:
        UserError: counts that cannot be.

    Example:
        >>> low, high = wilson(90, 100)
        >>> round(low, 4), round(high, 4)
        (0.8256, 0.9448)

    E. B. Wilson, J. Am. Stat. Assoc. 22 (1927). Checked against
    `scipy.stats.binomtest(…).proportion_ci("wilson")`.
    """
    if total < 1 or not 0 <= correct <= total:
        raise UserError(f"{correct} correct of {total}: expected 0 ≤ correct ≤ total and total ≥ 1")
    z = float(stats.norm.ppf((1 + confidence) / 2))
    p = correct / total
    center = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
