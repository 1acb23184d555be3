"""A probe's warnings while training runs: what it starts with, once for each rule."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from nfnets.signal.logged import plain
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

    def values(self) -> dict[str, float]:
        """For a log, which may take nothing but numbers: what was measured, by the rule and the point.

        Example:
            >>> Alarm(Finding("jump", "net", "layer1.0", 4, 30.0, 5.0, ""), "").values()
            {'signal/alarm/jump/layer1.0': 30.0}
        """
        return {f"signal/alarm/{self.cause.rule}/{plain(self.cause.name)}": float(self.cause.value)}


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
        self._unlogged: dict[str, float] = {}
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
            alarm = Alarm(cause, f"{headline(cause, what)}; {cause.remedy}")
            self._unlogged |= alarm.values()
            return alarm
        return None

    def values(self) -> dict[str, float]:
        """For a log: how many rules were warned of so far, and each once.

        Example:
            >>> Watch().values()
            {'signal/alarms': 0.0}
        """
        new, self._unlogged = self._unlogged, {}
        return {"signal/alarms": float(len(self._said))} | new


def warn(alarm: Alarm) -> None:
    """Says it through `warnings`.

    Args:
        alarm: of `Watch.see`.
    """
    warnings.warn(alarm.message, SignalWarning, stacklevel=2)
