"""What to do first, for the model at hand: no advice that it has followed already, or cannot follow."""

from __future__ import annotations

from collections.abc import Sequence

from nfnets.signal.measured import Point
from nfnets.signal.rules.rule import Rule

_STANDARDIZED = (
    "the weights are standardized already: convert again on images like these, or inspect this layer's gain "
    "and bias"
)
_BY_HAND = (
    "standardize the weights: nfnets.layers.ScaledStdConv2d and ScaledStdLinear in place of these layers"
)


def remedy(rule: Rule, points: Sequence[Point]) -> str:
    """The rule's remedy, or another where the model makes that one no use.

    Args:
        rule: which was broken.
        points: the model's.

    Returns:
        One line.
    """
    if rule.name == "mean-shift":
        if any(p.gain is not None for p in points):
            return _STANDARDIZED
        if not any(p.kind == "norm" for p in points):
            return _BY_HAND
    return rule.remedy
