"""A probe's warnings while training runs: what it starts with, once for each rule."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from nfnets.signal.measured import Measured, Point
from nfnets.signal.rules import DEFAULT, Finding, headline, judge

# Sampled steps that rules of a whole run look at, the first beside them.
_LATEST = 4


class SignalWarning(UserWarning):
    """A probe saw a rule broken while training."""


@dataclass(frozen=True)
class Alarm:
    """What a sampled step is warned of.

    Attributes:
        cause: the finding that the verdict starts with.
        message: one line: where, what, by how much, and what to do.
    """

    cause: Finding
    message: str

    def as_dict(self) -> dict[str, str | float]:
        """For a log: the rule, the point, the number, its limit, and the message."""
        cause = self.cause
        return {
            "signal/rule": cause.rule,
            "signal/point": cause.name,
            "signal/value": cause.value,
            "signal/limit": cause.limit,
            "signal/message": self.message,
        }


class Watch:
    """Judges sampled steps as they come.

    Example:
        >>> watch = Watch()
        >>> sick = [Point("net", "fc", "linear", nonfinite=True, max=float("nan"))]
        >>> watch.see(sick).message.split(";")[0]
        'net: starts at fc: NaN or inf in the output'
        >>> watch.see(sick) is None
        True
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._first: list[Point] = []
        self._latest: list[list[Point]] = []

    def see(self, points: Sequence[Point]) -> Alarm | None:
        """Judges one more step.

        What follows from a cause is not said once a cause was: it is in the report.

        Args:
            points: of this step.

        Returns:
            What to warn of, where that is a rule no step broke before.
        """
        earlier = [*self._first, *(p for step in self._latest for p in step)]
        alarm = self._judged([*earlier, *points], True) or self._judged([*points], False)
        if not self._first:
            self._first = [*points]
        else:
            self._latest = [*self._latest, [*points]][-_LATEST:]
        return alarm

    def _judged(self, points: list[Point], whole: bool) -> Alarm | None:
        rules = [r for r in DEFAULT if r.steps == whole and r.name not in self._said]
        verdict = judge(Measured(points), [r for r in rules if r.cause or not self._said])
        for cause in verdict.causes:
            self._said.add(cause.rule)
            what = next(r.what for r in verdict.rules if r.name == cause.rule)
            return Alarm(cause, f"{headline(cause, what)}; {cause.remedy}")
        return None


def warn(alarm: Alarm) -> None:
    """Says it through `warnings`.

    Args:
        alarm: of `Watch.see`.
    """
    warnings.warn(alarm.message, SignalWarning, stacklevel=2)
