"""The points that a rule looks at, and what it compares them with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nfnets.signal.measured import Point

# Times the linear growth of a normalized network, one unit of variance per block.
GROWTH = 8.0


def trunk(points: Sequence[Point]) -> list[Point]:
    """The points that carry the signal: the residual joins, or what enters each activation of a plain network.

    A convolution in front of a norm layer is left out: its mean and scale are the norm layer's to remove. So is what
    has one value a channel, of which no variance tells.
    """
    points = [p for p in points if p.count != 1]
    joins = [p for p in points if p.role == "join"]
    if len(joins) > 1:
        return joins
    if any(p.kind == "conv" for p in points):
        # The classifier of a CNN sees pooled features: a few values a channel, and alike between samples.
        points = [p for p in points if len(p.shape) > 2]
        # So does what a gate is computed from.
        points = [p for p in points if math.prod(p.shape[2:]) > 1] or points
    entering = [p for p in points if p.feeds == "activation" and p.kind != "activation"]
    return entering or [p for p in points if p.kind in ("conv", "linear") and p.feeds != "norm"]


def no_trunk(points: Sequence[Point]) -> str:
    """Why there is nothing to compare along the trunk."""
    return "" if len(trunk(points)) > 1 else "no two points on the trunk"


def reference(points: Sequence[Point]) -> float:
    """The variance that growth and vanishing are measured against: the first finite one of stem and trunk."""
    stem = [p.var for p in points if p.role == "stem"]
    first = [p.var for p in trunk(points)][:1]
    known = [v for v in (*stem, *first) if v is not None and math.isfinite(v) and v > 0]
    return max(known, default=1.0)


def growth_limit(points: Sequence[Point]) -> list[float]:
    """Per trunk point the variance above which it has outgrown linear growth."""
    ref = reference(points)
    return [GROWTH * ref * (j + 2) for j in range(len(trunk(points)))]


def finite(value: float | None) -> bool:
    """Whether a number was measured, and is one."""
    return value is not None and math.isfinite(value)
