"""Gains and moments of activations under a normal input, by quadrature.

The gain γ of an activation is what it must be multiplied by so that N(0, 1) comes out with variance 1:
γ = 1 / std(act(z)), z ~ N(0, 1). The mean is subtracted first: this is not the He gain, which uses the second
moment. Paper: "Characterizing signal propagation to close the performance gap in unnormalized ResNets"
(arXiv 2101.08692).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nfnets.activations import TABLE, Act, Activation, describe, resolve, runs_forward_of, spelled
from nfnets.errors import UserError, first_line, unknown
from nfnets.quadrature import NODES, REACH, WEIGHTS, X_EDGES, Z_EDGES, rule

Constants = Literal["exact", "deepmind"]

# The constants that DeepMind's models were trained with, for weight compatibility: deepmind-research,
# nfnets/base.py (`nonlinearities`), the same numbers as timm's `models/nfnet.py`. They look like sampling
# estimates (celu and elu differ there although the functions are equal), up to 1.2e-3 from the exact values.
DEEPMIND: dict[str, float] = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,  # of the tanh approximation, which is what jax.nn.gelu computes
    "gelutanh": 1.7015043497085571,
    "glu": 1.8484294414520264,
    "leakyrelu": 1.70590341091156,
    "logsigmoid": 1.9193484783172607,
    "logsoftmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "softsign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}


def gain(activation: Activation, constants: Constants = "exact") -> float:
    """The factor that gives an activation of N(0, 1) the variance 1.

    γ = 1 / sqrt(E[act(z)²] − E[act(z)]²),  z ~ N(0, 1)

    Args:
        activation: its name (`relu`, `silu`/`swish`, `gelu`, `gelu_tanh`, `hard_swish`, …), a module with its
            own settings (`nn.LeakyReLU(0.1)`, an `nn.PReLU` at its present slopes), or any elementwise
            callable. `glu` takes two independent N(0, 1) halves, `log_softmax` is taken in the limit of many
            classes.
        constants: `exact`, or `deepmind` for the numbers that the published NFNet weights were trained with.

    Returns:
        The gain, dimensionless; exact to 1e-9 for the activations known by name.

    Raises:
        UserError: an unknown name, a callable that is not elementwise or is constant; no DeepMind constant.

    Example:
        >>> round(gain("relu"), 9)
        1.71285855
        >>> gain("relu", constants="deepmind")
        1.7139588594436646
        >>> round(gain(torch.nn.LeakyReLU(0.1)), 9)
        1.630636972

    Paper: arXiv 2101.08692, section 4; constants: deepmind-research, nfnets/base.py.
    """
    if constants not in ("exact", "deepmind"):
        raise unknown("set of gain constants", str(constants), ["exact", "deepmind"])
    act = resolve(activation)
    if constants == "deepmind":
        if act.name not in DEEPMIND:
            raise UserError(
                f"no DeepMind gain for {describe(activation)}: expected one of "
                f"{', '.join(sorted(spelled(n) for n in DEEPMIND))}; pass constants='exact'"
            )
        return DEEPMIND[act.name]
    if act.name == "logsoftmax":
        return 1.0  # log_softmax(z) = z − logsumexp(z), and the second term tends to a constant
    _, var = moments(activation)
    if not var > 0:
        raise UserError(
            f"activation {describe(activation)}: expected one that varies under N(0, 1), got variance "
            f"{var:g}; no gain can normalize it, use another"
        )
    return 1 / math.sqrt(var)


def moments(activation: Activation, mean: float = 0.0, var: float = 1.0) -> tuple[float, float]:
    """Mean and (biased) variance of an activation of a normal input.

    m = E[act(z)],  v = E[(act(z) − m)²],  z ~ N(mean, var)

    Args:
        activation: as for `gain`. An `nn.PReLU` with several slopes gives the average channel mean and
            variance. For `glu` both halves are independent N(mean, var).
        mean: of the input.
        var: of the input, 0 or more.

    Returns:
        (mean, variance) of the output.

    Raises:
        UserError: as for `gain`; var negative or not finite; `log_softmax`, whose mean depends on the width.

    Example:
        >>> m, v = moments("relu")
        >>> round(m, 9), round(v, 9)
        (0.39894228, 0.340845057)
        >>> moments("identity", mean=2.0, var=0.0)
        (2.0, 0.0)

    Paper: arXiv 2101.08692, section 4.
    """
    mean, var = float(mean), float(var)
    if not (math.isfinite(mean) and math.isfinite(var) and var >= 0):
        raise UserError(
            f"moments of N(mean={mean:g}, var={var:g}): expected finite numbers and var >= 0; check them"
        )
    if isinstance(activation, nn.PReLU) and runs_forward_of(activation, nn.PReLU):
        return _prelu_moments(activation, mean, var)
    act = resolve(activation)
    if act.name == "logsoftmax":
        raise UserError(
            "moments of log_softmax: expected an elementwise activation (its mean depends on the number of "
            "classes); use gain('log_softmax')"
        )
    if not act.name:
        return _integrate(act, mean, var)
    m, v = _table_moments(act.name, mean, var)
    if act.name == "glu":  # a·σ(b), a and b independent: the moments multiply
        return mean * m, (var + mean * mean) * (v + m * m) - (mean * m) ** 2
    return m, v


def _prelu_moments(module: nn.PReLU, mean: float, var: float) -> tuple[float, float]:
    # act = z⁺ − a·z⁻ and z⁺z⁻ = 0 everywhere: cov(z⁺, z⁻) = −E[z⁺]E[z⁻], the slopes enter by two moments.
    (plus, plus_var), (minus, minus_var) = (_table_moments("relu", m, var) for m in (mean, -mean))
    slopes = module.weight.detach().double().cpu()
    first, second = float(slopes.mean()), float(slopes.square().mean())
    return plus - first * minus, plus_var + 2 * first * plus * minus + second * minus_var


# The nodes' interpolating polynomial at a panel's two ends, and the share of a panel beyond its outermost node.
_ENDS = np.polynomial.legendre.legvander([-1.0, 1.0], 23) @ np.linalg.inv(
    np.polynomial.legendre.legvander(NODES, 23)
)
_BEYOND = (1 - NODES[-1]) / 2


@lru_cache(maxsize=4096)
def _table_moments(name: str, mean: float, var: float) -> tuple[float, float]:
    return _integrate(TABLE[name], mean, var)


def _integrate(act: Act, mean: float, var: float) -> tuple[float, float]:
    std = math.sqrt(var)
    if std == 0:
        return float(_evaluate(act.fn, np.array([mean]))[0]), 0.0
    points = np.concatenate([X_EDGES, act.kinks or ()])
    edges = np.unique(np.concatenate([Z_EDGES, (points - mean) / std]))
    edges = edges[(edges >= -REACH) & (edges <= REACH)]
    if act.kinks is None:
        _check_elementwise(act.fn)
        edges = _refine(act.fn, edges, mean, std)
    z, mass = rule(edges)
    y = _evaluate(act.fn, mean + std * z)
    m = float((mass * y).sum())
    return m, float((mass * (y - m) ** 2).sum())


def _refine(fn: Callable[[Tensor], Tensor], edges: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Halve every panel whose halves disagree with it, until a jump is enclosed in 1e-12.

    A jump between an end and the outermost node shows in no sum, but in the value at that end.
    """
    done, low, high = [edges[-1:]], edges[:-1], edges[1:]
    for _ in range(48):
        middle = (low + high) / 2
        sums = []
        for a, b in ((low, high), (low, middle), (middle, high)):
            half = (b - a)[:, None] / 2
            z = a[:, None] + half * (1 + NODES)
            y = _evaluate(fn, mean + std * z)
            mass = half * WEIGHTS * np.exp(-0.5 * z * z)
            sums.append(np.stack([(mass * y).sum(1), (mass * y * y).sum(1)]))
        off = np.abs(sums[0] - sums[1] - sums[2])
        rough = (off > 1e-12 * np.maximum(1.0, np.abs(sums[0]))).any(0) | _jumps_at_an_end(
            fn, low, high, mean, std
        )
        done.append(low[~rough])
        if not rough.any():
            return np.sort(np.concatenate(done))
        if rough.sum() > 4096:
            break
        low, high = np.concatenate([low[rough], middle[rough]]), np.concatenate([middle[rough], high[rough]])
    return np.unique(np.concatenate([*done, low]))


def _jumps_at_an_end(
    fn: Callable[[Tensor], Tensor], low: np.ndarray, high: np.ndarray, mean: float, std: float
) -> np.ndarray:
    width = high - low
    y = _evaluate(fn, mean + std * (low[:, None] + width[:, None] * (1 + NODES) / 2))
    ends = np.stack(
        [low + 1e-9 * width, high - 1e-9 * width], 1
    )  # inside: a jump at an edge itself is harmless
    beyond = np.abs(_evaluate(fn, mean + std * ends) - y @ _ENDS.T) * np.exp(-0.5 * ends * ends)
    return (beyond * _BEYOND * width[:, None] > 1e-8 * np.maximum(1.0, np.abs(y).max(1, keepdims=True))).any(
        1
    )


def _check_elementwise(fn: Callable[[Tensor], Tensor]) -> None:
    # A softmax, or a dropout in training mode, keeps the shape but not the values of a part of its input.
    x = np.linspace(-3.0, 3.0, 64)
    if not np.allclose(_evaluate(fn, x)[::2], _evaluate(fn, x[::2]), rtol=1e-6, atol=1e-9):
        raise UserError(
            f"activation {describe(fn)}: expected an elementwise deterministic function, but a "
            "value depends on its neighbors or on chance; pass one that does not"
        )


@torch.no_grad()
def _evaluate(fn: Callable[[Tensor], Tensor], x: np.ndarray) -> np.ndarray:
    given = torch.from_numpy(x.reshape(-1).copy())  # a copy: the activation may work in place
    try:
        out = fn(given)
    except Exception as error:
        raise UserError(
            f"activation {describe(fn)} fails on a vector: {first_line(error)}; pass a function of each number alone"
        ) from error
    if not isinstance(out, Tensor) or out.shape != (x.size,):
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"activation {describe(fn)}: expected an elementwise function, but {x.size} numbers "
            f"gave {got}; pass one that keeps the shape"
        )
    y = out.double().numpy().reshape(x.shape)
    if not np.isfinite(y).all():
        raise UserError(
            f"activation {describe(fn)}: expected finite values, got NaN or infinity for inputs "
            f"in [{x.min():.3g}, {x.max():.3g}]; it has no gain, use another"
        )
    return y
