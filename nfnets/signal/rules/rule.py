"""What a rule is, and what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from nfnets.signal.measured import Point


@dataclass(frozen=True)
class Finding:
    """One layer that broke one rule."""

    rule: str
    model: str
    name: str
    step: int
    value: float
    limit: float
    remedy: str
    over: float | None = None
    """The point's variance over that of the point before it."""

    @property
    def limited(self) -> bool:
        """Whether the rule is one of more or less; there are layers with no gradient, and values that are NaN."""
        return math.isfinite(self.limit) and self.limit != 0

    def __str__(self) -> str:
        where = f"{self.model}: {self.name or '(input)'}" + (f" at step {self.step}" if self.step else "")
        return f"{self.rule}: {where}: {self.value:.4g} (limit {self.limit:.4g})"


Broken = Iterator[tuple[Point, float, float]]


def _always(points: Sequence[Point]) -> str:
    return ""


@dataclass(frozen=True)
class Rule:
    """A named test of one model's points at one step.

    Args:
        name: what a user selects it by.
        what: the sickness, in a few words.
        remedy: what most likely cures it.
        find: yields `(point, value, limit)` for each point that breaks the rule.
        needs: the column of `Point` that it judges by, where that need not have been measured.
        idle: why these points give it nothing to judge, or "" where they do; then it does not count as passed.
        cause: names what is wrong with one layer, so that it goes before rules that name what follows from that.
        steps: judges all steps of a model together.

    Example:
        >>> loud = Rule("loud", "values above 10", "scale it", lambda ps: ((p, p.max, 10.0) for p in ps if p.max > 10))
        >>> from nfnets.signal import SignalReport, check
        >>> bool(check(SignalReport([Point("net", "fc", "linear", max=3.0)]), [loud]))
        True
    """

    name: str
    what: str
    remedy: str
    find: Callable[[Sequence[Point]], Iterable[tuple[Point, float, float]]]
    needs: str = ""
    idle: Callable[[Sequence[Point]], str] = _always
    cause: bool = False
    steps: bool = False
