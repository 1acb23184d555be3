"""What to do first, for the model at hand: no advice that it has followed already, or cannot follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nfnets.signal.measured import Point
from nfnets.signal.rules.rule import Rule

_LSUV = "initialize for the activation, by kaiming_normal_ with mode fan_in or nfnets.init.lsuv_"
_AGAIN = (
    "the weights are standardized already: convert again on 32 images or more like these, as fewer do not tell what "
    "single channels' means are, or inspect this layer's gain and bias"
)
_CONVERT = "nfnets.convert(model, images, method="


class Traits(NamedTuple):
    """What advice depends on."""

    standardized: bool
    """Some weights are: it was converted by `nf` or built so."""
    batch_norm: bool
    """There is something to convert."""
    residual: bool
    given: bool
    """The finding is at an input of the model."""


def traits(points: Sequence[Point], at: Point) -> Traits:
    """Of the model whose points these are, at one of them."""
    return Traits(
        any(p.gain is not None for p in points),
        any(p.batch_norm for p in points),
        any(p.role == "join" for p in points),
        at.kind == "input",
    )


def _mean_shift(model: Traits) -> str | None:
    if model.standardized:
        return _AGAIN
    if not model.batch_norm:
        return "standardize the weights: nfnets.layers.ScaledStdConv2d and ScaledStdLinear in place of these layers"
    return None


def _growth(model: Traits) -> str | None:
    return None if model.residual else _LSUV


def _noise(model: Traits) -> str | None:
    what = "each multiplies the mean square by 1/(1 − p), and no norm layer takes that back: "
    if model.batch_norm:
        return f'{what}{_CONVERT}"nf") measures constants that do, or lower p'
    if model.standardized:
        return f"{what}convert again with it on, as constants are measured in training, or lower p"
    return f"{what}lower p, or initialize with it on by nfnets.init.lsuv_"


def _cosine(model: Traits) -> str | None:
    if model.given:
        return "the samples are alike before any layer: look at what loads and augments them"
    if model.standardized:
        return "add shortcuts, or shape the activation (TAT)"
    return None


def _one_layer(model: Traits) -> str | None:
    return "inspect this layer's gain and the constants scale and alpha" if model.standardized else None


_FITTING = {
    "mean-shift": _mean_shift,
    "growth": _growth,
    "noise": _noise,
    "cosine": _cosine,
    "odd-layer": _one_layer,
    "jump": _one_layer,
    "branch": _one_layer,
}


def remedy(rule: Rule, points: Sequence[Point], at: Point) -> str:
    """The rule's remedy, or another where the model makes that one no use.

    Args:
        rule: which was broken.
        points: the model's.
        at: where.

    Returns:
        One line.
    """
    fitting = _FITTING.get(rule.name)
    return (fitting(traits(points, at)) if fitting else None) or rule.remedy
