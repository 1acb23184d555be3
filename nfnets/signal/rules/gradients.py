"""Rules of what comes back: gradients that are not finite, that do not arrive, or change by orders of magnitude."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nfnets.signal.measured import Point
from nfnets.signal.rules.places import finite, trunk
from nfnets.signal.rules.rule import Broken, Rule

# Largest over smallest gradient variance along the trunk. ResNet-50 with a small input reaches 1e3.
GRADIENT = 1e5


def sick_gradients(p: Point) -> list[float]:
    """What is not finite of that which was measured of the gradients at a point, the output's and the weight's."""
    known = (p.grad_min, p.grad_max, p.grad_var, p.weight_grad_norm)
    return [v for v in known if v is not None and not math.isfinite(v)]


def _nonfinite_gradient(points: Sequence[Point]) -> Broken:
    if any(p.nonfinite for p in points):
        return  # what `finite` names has made these
    for p in reversed(points):  # as the gradients came
        if found := sick_gradients(p):
            yield p, found[0], math.inf


def _unreached(points: Sequence[Point]) -> Broken:
    """Trained layers without a gradient although later points have one, the last of them first: behind it it got lost.

    What lies before the first weight that is trained needs none: a frozen stem is no fault.
    """
    known = [i for i, p in enumerate(points) if p.grad_var is not None]
    for p in reversed(points[: known[-1]] if known else ()):
        if p.grad_var is None and p.frozen is False:
            yield p, 0.0, 0.0


def _gradient(points: Sequence[Point]) -> Broken:
    known = [p for p in trunk(points) if finite(p.grad_var) and (p.grad_var or 0.0) > 0]
    if len(known) < 2:
        return
    low = min(known, key=lambda p: p.grad_var or 0.0)
    for p in known:
        ratio = (p.grad_var or 0.0) / (low.grad_var or 1.0)
        if ratio > GRADIENT:
            yield p, ratio, GRADIENT


def _idle(points: Sequence[Point]) -> str:
    known = [p for p in points if p.grad_var is not None]
    # The output itself always has one.
    if known and not any(p.grad_var or p.grad_mean_sq for p in known if p.role != "head"):
        return "all gradients are 0, as behind a head of zeros"
    return "" if known else "no gradients"


RULES = (
    Rule(
        "finite-gradient",
        "NaN or inf in a gradient, while every output is finite",
        "what follows the first layer listed makes it (the loss, where that is the last layer): a root, quotient or "
        "logarithm of zero, or fp16 overflowed (a GradScaler's first steps may)",
        _nonfinite_gradient,
        "grad_var",
        cause=True,
    ),
    Rule(
        "no-gradient",
        "no gradient arrives at this trained layer although later ones have one",
        "look between this layer and the next for detach(), torch.no_grad(), .data, .item() or an operation that is "
        "not differentiable",
        _unreached,
        "grad_var",
        cause=True,
    ),
    Rule(
        "gradient",
        "the gradient's variance changes by orders of magnitude along the trunk",
        "as for growth and vanishing: bring the forward variance to 1; clip by AGC meanwhile",
        _gradient,
        "grad_var",
        _idle,
    ),
)
