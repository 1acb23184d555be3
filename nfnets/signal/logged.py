"""A sampled step as numbers by name, for experiment trackers: Weights & Biases, MLflow, TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from nfnets.errors import UserError
from nfnets.given import shown
from nfnets.signal.measured import Measured, Point

Log = Callable[[dict[str, float], int], Any]
"""Takes the values by name and the step."""

STATISTICS = ("mean_sq", "var", "residual_var", "grad_var", "update_ratio", "clipped")
"""Of every point that is logged, where they were measured."""


def check_log(log: Any) -> None:
    """Refuse what cannot be called; a TensorBoard writer is what people try first."""
    if log is not None and not callable(log):
        how = "a callable that takes a dictionary and a step"
        if hasattr(log, "add_scalar"):
            raise UserError(
                f"log={type(log).__name__}: expected {how}; pass "
                "lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()]"
            )
        raise UserError(f"log={shown(log)}: expected {how}; pass mlflow.log_metrics, say")


def plain(name: str) -> str:
    """A point's name in letters that every tracker takes."""
    return re.sub(r"[^\w./ -]", "-", name)


def shown_rows(points: Sequence[Point]) -> list[Point]:
    """Stem, joins and head; everything where there is no join."""
    short = [p for p in points if p.role in ("stem", "join", "head")]
    return short if any(p.role == "join" for p in short) else list(points)


def summary(report: Measured) -> dict[str, float]:
    """The three numbers of a report's last step that an experiment's log should have.

    Example:
        >>> summary(Measured([Point("net", "layer1.0", "join", "join", mean_sq=0.25, var=2.0)]))
        {'signal/mean_sq': 0.25, 'signal/var': 2.0}
    """
    points = report.select()
    trunk = [point for point in points if point.role == "join"] or points
    columns = {"mean_sq": trunk, "var": trunk, "dead": points}
    values = {
        name: [value for point in chosen if (value := getattr(point, name)) is not None]
        for name, chosen in columns.items()
    }
    return {f"signal/{name}": max(each) for name, each in values.items() if each}


def values(points: Sequence[Point]) -> dict[str, float]:
    """One step's numbers: the summary, and `STATISTICS` of the stem, the joins and the head.

    Args:
        points: of one model and step. Where there is no join, all of them are logged.

    Returns:
        By `signal/point/statistic`, in letters that every tracker takes (MLflow refuses `#`).

    Example:
        >>> values([Point("net", "layer1.0#2", "join", "join", mean_sq=0.25, var=2.0)])
        {'signal/mean_sq': 0.25, 'signal/var': 2.0, 'signal/layer1.0-2/mean_sq': 0.25, 'signal/layer1.0-2/var': 2.0}
    """
    out = summary(Measured(list(points)))
    for point in shown_rows(points):
        name = plain(point.name)
        known = {each: getattr(point, each) for each in STATISTICS}
        out |= {f"signal/{name}/{each}": value for each, value in known.items() if value is not None}
    return out
