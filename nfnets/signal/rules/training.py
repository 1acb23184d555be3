"""Rules of a training run: how far a step moves the weights, and whether they die out."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from nfnets.signal.measured import Point
from nfnets.signal.rules.rule import Broken, Rule

# Median over layers of ‖ΔW‖ / ‖W‖. Healthy runs: 2.9e-3 to 1.7e-2; clipped a hundred times too hard 2.9e-5, thirty
# times the rate 0.18. Where branches start at zero most layers hardly move: slow is what is slow in the first layer,
# too, and fast is what is fast both there and in the median of the layers that move at all.
SMALL, LARGE = 1e-4, 0.1
# Sampled steps that it takes to call updates slow: a rate that warms up begins small.
STEPS = 3
# Median over layers of the weight's norm, last sampled step over first.
DECAYED = 0.3


def _ratios(points: Sequence[Point]) -> dict[int, list[Point]]:
    """The points that a step moved, by step."""
    out: dict[int, list[Point]] = {}
    for p in points:
        if p.update_ratio is not None and len(p.weight_shape) > 1:
            out.setdefault(p.step, []).append(p)
    return out


def _typical(found: dict[int, list[Point]]) -> tuple[Point, float] | None:
    """The step in the middle (warm-up and the end of a schedule are small by design), and its first layer."""
    by_step = [
        (max(median(p.update_ratio or 0.0 for p in ps), ps[0].update_ratio or 0.0), ps[0])
        for ps in found.values()
    ]
    if len(by_step) < STEPS:
        return None
    by_step.sort(key=lambda pair: pair[0])
    return by_step[len(by_step) // 2][1], by_step[len(by_step) // 2][0]


def _slow(points: Sequence[Point]) -> Broken:
    typical = _typical(_ratios(points))
    if typical and typical[1] < SMALL:
        yield typical[0], typical[1], SMALL


def _fast(points: Sequence[Point]) -> Broken:
    found = _ratios(points)
    for ps in found.values():
        ratios = [p.update_ratio or 0.0 for p in ps]
        value = min(ratios[0], median(r for r in ratios if not r < max(ratios) / 100))
        if value > LARGE:  # what is no number comes from elsewhere
            yield ps[0], value, LARGE


def _decayed(points: Sequence[Point]) -> Broken:
    first, last = _ends(points)
    shared = [(first[n], last[n]) for n in first.keys() & last.keys() if first[n].weight_norm]
    if len(shared) < 2:
        return
    value = median((b.weight_norm or 0.0) / (a.weight_norm or 1.0) for a, b in shared)
    if value < DECAYED:
        yield next(iter(last.values())), value, DECAYED


def _ends(points: Sequence[Point]) -> tuple[dict[str, Point], dict[str, Point]]:
    steps = sorted({p.step for p in points})
    weighted = [p for p in points if p.weight_norm is not None and len(p.weight_shape) > 1]
    first, last = ({p.name: p for p in weighted if p.step == step} for step in (steps[0], steps[-1]))
    return first, last


def _few_steps(points: Sequence[Point]) -> str:
    return "" if len(_ratios(points)) >= STEPS else f"fewer than {STEPS} steps"


def _one_step(points: Sequence[Point]) -> str:
    return "" if len({p.step for p in points}) > 1 else "one step"


RULES = (
    Rule(
        "slow-updates",
        "a step hardly moves the weights (median ‖ΔW‖ / ‖W‖ over layers)",
        "raise the learning rate; under AGC compare the column clipped: where nearly all units are clipped, raise the "
        "clipping",
        _slow,
        "update_ratio",
        _few_steps,
        cause=True,
        steps=True,
    ),
    Rule(
        "fast-updates",
        "a step rewrites the weights (median ‖ΔW‖ / ‖W‖ over layers)",
        "lower the learning rate or clip (AGC); see that gradients are set to zero before each step",
        _fast,
        "update_ratio",
        cause=True,
        steps=True,
    ),
    Rule(
        "weight-decay",
        "the weights die out (median of their norms, last sampled step over first)",
        "lower the weight decay",
        _decayed,
        "weight_norm",
        _one_step,
        cause=True,
        steps=True,
    ),
)
