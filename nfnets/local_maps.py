"""Local Q and C maps: what an activation makes of the mean square of its input, and of the cosine of two of them.

For φ, with two inputs of mean square q that are normal with correlation c,

    Q(q) = E[φ(√q z)²]        C(c) = E[φ(x) φ(y)] / Q(1),  x, y ~ N(0, 1) of correlation c

Their derivatives at 1 are integrals over one normal: Q'(1) = E[φ φ' z], C'(1) = E[φ'²] / Q(1), C''(1) = E[φ''²] / Q(1),
and C(0) = E[φ]² / Q(1). Papers: arXiv 2110.01765 (DKS), 2203.08120 (TAT).
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq, root
from torch import Tensor, nn

from nfnets.activations import Act, Activation, describe, resolve
from nfnets.errors import UserError
from nfnets.quadrature import normal_rule

TERMS = 160
"""Hermite coefficients that a C map is made of; what is left of E[φ²] is put on the last."""


class Constants(NamedTuple):
    """φ̂(x) = output_scale · (φ(input_scale · x + input_shift) + output_shift); for LeakyReLU its slope, too."""

    input_scale: float = 1.0
    input_shift: float = 0.0
    output_shift: float = 0.0
    output_scale: float = 1.0
    negative_slope: float | None = None


class Integrals(NamedTuple):
    """What of an activation the conditions are about, under N(0, 1)."""

    mean: float
    square: float
    q_slope: float
    """Q'(1) · 1: E[φ φ' z]."""
    slope: float
    """E[φ'²]."""
    curvature: float
    """E[φ''²]; infinite where φ' jumps."""


def leaky_relu_map(c: Any, slope: float) -> Any:
    """C map of LeakyReLU, in closed form.

        C(c) = ((1 − a)² (√(1 − c²) + (π − arccos c) c) / π + 2 a c) / (1 + a²)

    Args:
        c: correlation, a number or an array.
        slope: a, of the negative side.

    Example:
        >>> round(float(leaky_relu_map(0.0, 0.0)), 6)  # ReLU: 1/π
        0.31831
    """
    c = np.clip(c, -1.0, 1.0)
    bent = (np.sqrt(1 - c * c) + (math.pi - np.arccos(c)) * c) / math.pi
    return ((1 - slope) ** 2 * bent + 2 * slope * c) / (1 + slope * slope)


def c_map(activation: Activation, c: Any) -> Any:
    """C map of any activation, by its Hermite coefficients: C(c) = Σ a_k² c^k / Σ a_k².

    Args:
        activation: as for `nfnets.gains.gain`.
        c: correlation, a number or an array.

    Returns:
        Of the same shape; exact to about 1e-6 for smooth activations, 1e-4 near |c| = 1 for those with kinks.

    Raises:
        UserError: an activation that does not vary.

    Example:
        >>> round(float(c_map("relu", 0.5)), 4)
        0.609
    """
    squares = _energies(resolve(activation), describe(activation))
    return np.polynomial.polynomial.polyval(np.asarray(c, dtype=float), squares)


def _energies(act: Act, name: str) -> np.ndarray:
    z, mass = _nodes(act, 1.0, 0.0)
    y = _values(act, torch.from_numpy(z)).numpy()
    total = float(mass @ (y * y))
    if not 0 < total < math.inf:
        raise UserError(f"activation {name}: expected one that is not zero everywhere under N(0, 1)")
    before, now = np.zeros_like(z), np.ones_like(z)
    found = np.empty(TERMS)
    for k in range(TERMS):  # orthonormal polynomials: √(k+1) h_{k+1} = z h_k − √k h_{k−1}
        found[k] = float(mass @ (y * now)) ** 2
        before, now = now, (z * now - math.sqrt(k) * before) / math.sqrt(k + 1)
    found[-1] += max(0.0, total - found.sum())
    return found / total


def integrals(act: Act, scale: float = 1.0, shift: float = 0.0, derivatives: int = 2) -> Integrals:
    """Moments of φ(scale · z + shift) and its derivatives by z.

    Args:
        act: from `nfnets.activations.resolve`.
        scale, shift: of the input.
        derivatives: 1 leaves the curvature out (NaN).
    """
    z, mass = _nodes(act, scale, shift)
    x = torch.from_numpy(z * scale + shift).requires_grad_()
    with torch.enable_grad():
        y = _values(act, x)
        (first,) = (
            torch.autograd.grad(y.sum(), x, create_graph=derivatives > 1) if y.requires_grad else (0 * x,)
        )
    second = np.full_like(z, math.nan)
    if derivatives > 1:
        twice = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else 0 * x
        second = twice.detach().numpy() * scale * scale
        if any(abs(_slope(act, k, 1e-7) - _slope(act, k, -1e-7)) > 1e-4 for k in act.kinks or ()):
            second = np.full_like(z, math.inf)
    value, slope = y.detach().numpy(), first.detach().numpy() * scale
    return Integrals(
        float(mass @ value),
        float(mass @ value**2),
        float(mass @ (value * slope * z)),
        float(mass @ slope**2),
        float(mass @ second**2),
    )


def _slope(act: Act, at: float, beside: float) -> float:
    x = torch.tensor([at + beside], dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        y = _values(act, x)
    return float(torch.autograd.grad(y.sum(), x)[0]) if y.requires_grad else 0.0


def _values(act: Act, x: Tensor) -> Tensor:
    return act.fn(x.clone())  # a clone: some work in place


def _nodes(act: Act, scale: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    z, mass = normal_rule([(k - shift) / scale for k in act.kinks or ()] if scale else [])
    return z.ravel(), mass.ravel()


# -- constants ------------------------------------------------------------------------------------------------------

_STARTS = {"input_scale": (1.0, 0.1), "input_shift": (0.0, 1.0, -1.0), "output_shift": (0.0, 1.0, -1.0)}
_RANGES = {
    "input_scale": (0.0, 2.0),
    "input_shift": (-3.0, 3.0),
    "output_shift": (-3.0, 3.0),
    "slope": (0.0, 1.0),
}
_TRIES = 50
STEEPEST = 2.0
"""input_scale · output_scale from which a solution of TAT is left for another: its Q map is unstable (the authors')."""


def leaky_constants(slope: float) -> Constants:
    """TAT's for LeakyReLU: Q(q) = q for the output scale √(2 / (1 + a²)).

    Example:
        >>> leaky_constants(1.0).output_scale
        1.0
    """
    return Constants(output_scale=math.sqrt(2 / (1 + slope * slope)), negative_slope=slope)


def tat_constants(activation: Activation, curvature: float) -> Constants:
    """TAT's for a smooth activation: Q(1) = Q'(1) = C'(1) = 1 and C''(1) = `curvature`.

    Args:
        activation: as for `nfnets.gains.gain`; its slope may not jump.
        curvature: of its own C map at 1, above 0.

    Returns:
        The four constants.

    Raises:
        UserError: an activation whose slope jumps, or without a solution.

    Example:
        >>> [round(c, 4) for c in tat_constants("tanh", 0.00345)[:4]]
        [0.0618, 0.5224, -0.4801, 20.9931]

    Paper: arXiv 2203.08120. Checked against PyPI `dks` 0.1.2.
    """
    return _solved(activation, "TAT", curvature)


def dks_constants(activation: Activation, slope: float) -> Constants:
    """DKS's: Q(1) = Q'(1) = 1, C(0) = 0 and C'(1) = `slope`; ReLU and LeakyReLU by a slope of their own.

    Args:
        activation: as for `nfnets.gains.gain`.
        slope: of its own C map at 1, above 1.

    Returns:
        The four constants, and a negative slope where the activation is a ReLU.

    Raises:
        UserError: an activation without a solution.

    Paper: arXiv 2110.01765. Checked against PyPI `dks` 0.1.2.
    """
    return _solved(activation, "DKS", slope)


def is_leaky(activation: Activation) -> bool:
    """Whether an activation is a ReLU or LeakyReLU, which both methods take by their negative slope."""
    return isinstance(activation, nn.ReLU | nn.LeakyReLU) or (
        isinstance(activation, str) and resolve(activation).name in ("relu", "leakyrelu")
    )


def _solved(activation: Activation, method: str, target: float) -> Constants:
    leaky, act = is_leaky(activation), resolve(activation)
    found = (
        _known(act.name, leaky, method, target) if act.name or leaky else _search(act, leaky, method, target)
    )
    if found is None:
        conditions = "C''(1)" if method == "TAT" else "C'(1)"
        raise UserError(
            f"activation {describe(activation)}: no constants give it Q(1) = Q'(1) = 1 and {conditions} = "
            f"{target:.4g}, as {method} needs; use tanh, softplus, silu, or LeakyReLU"
        )
    return found


@lru_cache(maxsize=256)
def _known(name: str, leaky: bool, method: str, target: float) -> Constants | None:
    return _search(resolve(name or "relu"), leaky, method, target)


def _search(act: Act, leaky: bool, method: str, target: float) -> Constants | None:
    """The first solution from a fixed list of starting points, as there may be several."""
    dks = method == "DKS"
    if not dks and (leaky or math.isinf(integrals(act).curvature)):
        return None
    names = (
        ("slope", "input_shift")
        if leaky
        else ("input_scale", "input_shift", *(() if dks else ("output_shift",)))
    )
    starts = [*product(*({"slope": (0.0, 0.5), **_STARTS}[name] for name in names))]
    random = np.random.default_rng(0)
    low, high = (np.array([_RANGES[name][i] for name in names]) for i in (0, 1))
    starts += [tuple(random.uniform(low, high)) for _ in range(_TRIES - len(starts))]

    def moments(p: np.ndarray) -> tuple[Constants, Integrals]:
        scale, slope = (1.0, float(p[0])) if leaky else (float(p[0]), None)
        shape = act if slope is None else Act(lambda x: torch.where(x > 0, x, slope * x), (0.0,))
        raw = integrals(shape, scale, float(p[1]), 1 if dks else 2)
        shift = -raw.mean if dks else float(p[2])
        square = raw.square + 2 * shift * raw.mean + shift * shift
        gain = 1 / math.sqrt(square) if square > 0 else math.inf
        along = _along(shape, scale, float(p[1])) if shift else 0.0  # E[φ' z], by which a shift changes Q'
        all_ = Integrals(
            gain * (raw.mean + shift),
            1.0,
            gain * gain * (raw.q_slope + shift * along),
            gain * gain * raw.slope,
            gain * gain * raw.curvature,
        )
        return Constants(scale, float(p[1]), shift, gain, slope), all_

    def errors(p: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            _, got = moments(p)
        wanted = [got.q_slope - 1, got.slope - (target if dks else 1)]
        return np.array(wanted if dks else [*wanted, got.curvature - target])

    for start in starts:
        try:
            solution = root(errors, np.asarray(start), method="hybr")
            if not solution.success or not np.abs(errors(solution.x)).max() < 1e-7:
                continue
        except (ValueError, OverflowError, ZeroDivisionError, UserError):
            continue
        p = np.array(solution.x)
        if not leaky:  # z and −z are alike, and of an odd function so is its mirror image: one of each pair
            p[0] = abs(p[0])
            mirror = p * np.array([1, -1, -1][: len(p)])
            if p[1] < 0 and np.abs(errors(mirror)).max() < 1e-7:
                p = mirror
        constants, _ = moments(p)
        if dks or constants.input_scale * constants.output_scale < STEEPEST:
            return constants
    return None


def _along(act: Act, scale: float, shift: float) -> float:
    """E[φ'(z) z] for φ(scale · z + shift), by parts: E[φ (z² − 1)]."""
    z, mass = _nodes(act, scale, shift)
    y = _values(act, torch.from_numpy(z * scale + shift)).numpy()
    return float(mass @ (y * (z * z - 1)))


def increasing(function: Any, target: float, low: float, high: float) -> float | None:
    """Where an increasing function has a value; None where it does not reach it. `high` grows if it is infinite."""
    if not function(low) <= target:
        return None
    top = high
    if math.isinf(high):
        top = max(2 * low, low + 1)
        while function(top) < target:
            if top > 1e12:
                return None
            top *= 2
    if function(top) < target:
        return None
    solve: Any = brentq
    return float(solve(lambda x: function(x) - target, low, top, xtol=1e-14, rtol=1e-13))
