"""Gains and moments of activations under a normal input, by quadrature.

The gain γ of an activation is what it must be multiplied by so that N(0, 1) comes out with variance 1:
γ = 1 / std(act(z)), z ~ N(0, 1). The mean is subtracted first: this is not the He gain, which uses the second
moment. Paper: "Characterizing signal propagation to close the performance gap in unnormalized ResNets"
(arXiv 2101.08692).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.errors import UserError, unknown

Constants = Literal["exact", "deepmind"]
Activation = str | nn.Module | Callable[[Tensor], Tensor]

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


class _Act(NamedTuple):
    """A function of a float64 tensor and what is known of it."""

    fn: Callable[[Tensor], Tensor]
    # Where it or its derivatives jump. None: not known, so it is integrated adaptively.
    kinks: tuple[float, ...] | None = ()
    # Its row in _TABLE; "" for one with settings of its own.
    name: str = ""


def _leaky(slope: float) -> _Act:
    return _Act(lambda x: F.leaky_relu(x, slope), (0.0,))


def _hard_mish(x: Tensor) -> Tensor:
    return 0.5 * x * (x + 2).clamp(0, 2)


_TABLE: dict[str, _Act] = {
    "identity": _Act(lambda x: x),
    "relu": _Act(F.relu, (0.0,)),
    "relu6": _Act(F.relu6, (0.0, 6.0)),
    "leakyrelu": _leaky(0.01),
    "prelu": _leaky(0.25),  # torch's and timm's initial slope
    "rrelu": _leaky((1 / 8 + 1 / 3) / 2),  # torch's default bounds, at evaluation
    "silu": _Act(F.silu),
    "quickgelu": _Act(lambda x: x * torch.sigmoid(1.702 * x)),
    "gelu": _Act(F.gelu),
    "gelutanh": _Act(lambda x: F.gelu(x, approximate="tanh")),
    "elu": _Act(F.elu, (0.0,)),
    "celu": _Act(F.celu, (0.0,)),
    "selu": _Act(F.selu, (0.0,)),
    "sigmoid": _Act(torch.sigmoid),
    "tanh": _Act(torch.tanh),
    "softplus": _Act(F.softplus),
    "logsigmoid": _Act(F.logsigmoid),
    "softsign": _Act(F.softsign, (0.0,)),
    "mish": _Act(F.mish),
    "hardswish": _Act(F.hardswish, (-3.0, 3.0)),
    "hardsigmoid": _Act(F.hardsigmoid, (-3.0, 3.0)),
    "hardtanh": _Act(F.hardtanh, (-1.0, 1.0)),
    "hardmish": _Act(_hard_mish, (-2.0, 0.0)),
    "hardshrink": _Act(F.hardshrink, (-0.5, 0.5)),
    "softshrink": _Act(F.softshrink, (-0.5, 0.5)),
    "tanhshrink": _Act(F.tanhshrink),
    "erf": _Act(torch.erf),
    "atan": _Act(torch.atan),
    "asinh": _Act(torch.asinh),
    "sin": _Act(torch.sin, None),  # oscillates at any distance
    "square": _Act(torch.square),
    "abs": _Act(torch.abs, (0.0,)),
    "glu": _Act(torch.sigmoid),
    "logsoftmax": _Act(lambda x: x),
}
_TABLE = {name: act._replace(name=name) for name, act in _TABLE.items()}

# Other spellings (torch, timm, JAX, Hugging Face), after lower-casing and dropping "_", "-" and " ".
_ALIASES = {
    "swish": "silu",
    "swishme": "silu",
    "linear": "identity",
    "none": "identity",
    "gelunew": "gelutanh",
    "gelupytorchtanh": "gelutanh",
    "geluexact": "gelu",
    "mishme": "mish",
    "hardswishme": "hardswish",
    "hardsigmoidme": "hardsigmoid",
    "hardmishme": "hardmish",
    "arctan": "atan",
}
_DROPPED = str.maketrans("", "", "_- ")
# The names as people write them, for messages.
_SHOWN = {
    "leakyrelu": "leaky_relu",
    "gelutanh": "gelu_tanh",
    "quickgelu": "quick_gelu",
    "logsigmoid": "log_sigmoid",
    "logsoftmax": "log_softmax",
}
NAMES: tuple[str, ...] = tuple(sorted(_SHOWN.get(name, name) for name in _TABLE))

# Functions whose kinks are known. (An unknown callable is integrated adaptively: exact too, but slower.)
_FUNCTIONS: dict[Any, str] = {
    **{
        getattr(torch, n): n
        for n in ("relu", "sigmoid", "tanh", "erf", "atan", "asinh", "sin", "square", "abs")
    },
    **{getattr(torch, n): n for n in ("selu", "celu")},
    **{
        getattr(F, n): n
        for n in ("relu", "relu6", "silu", "elu", "celu", "selu", "softplus", "softsign", "mish")
    },
    **{
        getattr(F, n): n
        for n in ("logsigmoid", "hardswish", "hardsigmoid", "tanhshrink", "gelu", "hardtanh", "glu")
    },
    F.leaky_relu: "leakyrelu",
    F.log_softmax: "logsoftmax",
}

# Only where the class's own forward runs: a subclass that overrides it is integrated as it is.
_MODULES: tuple[tuple[type[nn.Module], Callable[[Any], _Act]], ...] = (
    (nn.Identity, lambda m: _TABLE["identity"]),
    (nn.ReLU6, lambda m: _TABLE["relu6"]),
    (nn.ReLU, lambda m: _TABLE["relu"]),
    (nn.LeakyReLU, lambda m: _TABLE["leakyrelu"] if m.negative_slope == 0.01 else _leaky(m.negative_slope)),
    (nn.RReLU, lambda m: _leaky((m.lower + m.upper) / 2)),
    (nn.SiLU, lambda m: _TABLE["silu"]),
    (nn.GELU, lambda m: _TABLE["gelutanh" if m.approximate == "tanh" else "gelu"]),
    (nn.ELU, lambda m: _TABLE["elu"] if m.alpha == 1 else _Act(lambda x: F.elu(x, m.alpha), (0.0,))),
    (nn.CELU, lambda m: _TABLE["celu"] if m.alpha == 1 else _Act(lambda x: F.celu(x, m.alpha), (0.0,))),
    (nn.SELU, lambda m: _TABLE["selu"]),
    (nn.Sigmoid, lambda m: _TABLE["sigmoid"]),
    (nn.Tanh, lambda m: _TABLE["tanh"]),
    # Beyond its threshold torch's softplus is the identity: a jump of at most exp(-threshold)/beta.
    (
        nn.Softplus,
        lambda m: (
            _TABLE["softplus"]
            if (m.beta, m.threshold) == (1, 20)
            else _Act(lambda x: F.softplus(x, m.beta, m.threshold), (m.threshold / m.beta,))
        ),
    ),
    (nn.LogSigmoid, lambda m: _TABLE["logsigmoid"]),
    (nn.Softsign, lambda m: _TABLE["softsign"]),
    (nn.Mish, lambda m: _TABLE["mish"]),
    (nn.Hardswish, lambda m: _TABLE["hardswish"]),
    (nn.Hardsigmoid, lambda m: _TABLE["hardsigmoid"]),
    (nn.Hardtanh, lambda m: _Act(lambda x: x.clamp(m.min_val, m.max_val), (m.min_val, m.max_val))),
    (nn.Hardshrink, lambda m: _Act(lambda x: F.hardshrink(x, m.lambd), (-m.lambd, m.lambd))),
    (nn.Softshrink, lambda m: _Act(lambda x: F.softshrink(x, m.lambd), (-m.lambd, m.lambd))),
    (nn.Threshold, lambda m: _Act(lambda x: F.threshold(x, m.threshold, m.value), (m.threshold,))),
    (nn.GLU, lambda m: _TABLE["glu"]),
    (nn.LogSoftmax, lambda m: _TABLE["logsoftmax"]),
)


def gain(activation: Activation, constants: Constants = "exact") -> float:
    """The factor that gives an activation of N(0, 1) the variance 1.

    γ = 1 / sqrt(E[act(z)²] − E[act(z)]²),  z ~ N(0, 1)

    Args:
        activation: its name (`relu`, `silu`/`swish`, `gelu`, `gelu_tanh`, `hard_swish`, …), a module with its
            own settings (`nn.LeakyReLU(0.1)`, an `nn.PReLU` at its present slopes), or any elementwise callable.
            `glu` takes two independent N(0, 1) halves, `log_softmax` is taken in the limit of many classes.
        constants: `exact`, or `deepmind` for the numbers that the published NFNet weights were trained with.

    Returns:
        The gain, dimensionless; exact to 1e-9 for the activations known by name.

    Raises:
        UserError: an unknown name, a callable that is not elementwise or is constant, or no DeepMind constant.

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
    act = _resolve(activation)
    if constants == "deepmind":
        if act.name not in DEEPMIND:
            raise UserError(
                f"no DeepMind gain for {_describe(activation)}: expected one of "
                f"{', '.join(sorted(_SHOWN.get(n, n) for n in DEEPMIND))}; pass constants='exact'"
            )
        return DEEPMIND[act.name]
    if act.name == "logsoftmax":
        return 1.0  # log_softmax(z) = z − logsumexp(z), and the second term tends to a constant
    _, var = moments(activation)
    if not var > 0:
        raise UserError(
            f"activation {_describe(activation)}: expected one that varies under N(0, 1), got variance {var:g}; "
            "no gain can normalize it, use another"
        )
    return 1 / math.sqrt(var)


def moments(activation: Activation, mean: float = 0.0, var: float = 1.0) -> tuple[float, float]:
    """Mean and (biased) variance of an activation of a normal input.

    m = E[act(z)],  v = E[(act(z) − m)²],  z ~ N(mean, var)

    Args:
        activation: as for `gain`. An `nn.PReLU` with several slopes gives the average channel mean and variance.
            For `glu` both halves are independent N(mean, var).
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
    if isinstance(activation, nn.PReLU) and _runs_forward_of(activation, nn.PReLU):
        return _prelu_moments(activation, mean, var)
    act = _resolve(activation)
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
    # act = z⁺ − a·z⁻, and z⁺z⁻ = 0 everywhere, so cov(z⁺, z⁻) = −E[z⁺]E[z⁻] and the slopes enter by two moments.
    (plus, plus_var), (minus, minus_var) = (_table_moments("relu", m, var) for m in (mean, -mean))
    slopes = module.weight.detach().double().cpu()
    first, second = float(slopes.mean()), float(slopes.square().mean())
    return plus - first * minus, plus_var + 2 * first * plus * minus + second * minus_var


def _key(name: str) -> str:
    key = name.lower().translate(_DROPPED)
    return _ALIASES.get(key, key)


def _runs_forward_of(module: nn.Module, cls: type[nn.Module]) -> bool:
    # timm's subclasses only restate the forward (for scripting); anybody else's may compute something else.
    return type(module).forward is cls.forward or type(module).__module__.startswith("timm.layers.")


def _resolve(activation: Activation) -> _Act:
    if isinstance(activation, str):
        key = _key(activation)
        if key not in _TABLE:
            raise unknown("activation", activation, NAMES)
        return _TABLE[key]
    if isinstance(activation, nn.Module):
        for cls, build in _MODULES:
            if isinstance(activation, cls) and _runs_forward_of(activation, cls):
                return build(activation)
        key = _key(type(activation).__name__)
        if type(activation).__module__.startswith("timm.layers.activations") and key in _TABLE:
            return _TABLE[key]
        return _Act(_on_cpu(activation), None)
    if callable(activation):
        try:
            name = _FUNCTIONS.get(activation, "")
        except TypeError:  # not hashable
            name = ""
        return _TABLE[name] if name else _Act(activation, None)
    raise UserError(
        f"activation {activation!r}: expected a name, a module or a callable on tensors; "
        "pass 'relu', nn.ReLU() or F.relu"
    )


def _on_cpu(module: nn.Module) -> nn.Module:
    # In float64, at evaluation, without hooks that a probe may have put there; the original stays as it is.
    twin = copy.deepcopy(module).to(device="cpu", dtype=torch.float64).eval()
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


def _describe(activation: Activation) -> str:
    if isinstance(activation, str):
        return activation
    if isinstance(activation, nn.Module):
        return str(activation).splitlines()[0]
    return getattr(activation, "__name__", repr(activation))


# Quadrature: composite Gauss–Legendre on z in [−12, 12], where a normal has all but 4e-33 of its mass. The first
# edges resolve the normal density, the second the activation, whose structure lies at |x| of the order of 1
# however wide the input is.
_REACH = 12.0
_Z_EDGES = np.array([-12, -8, -6, -4.5, -3, -2, -1, 0, 1, 2, 3, 4.5, 6, 8, 12.0])
_X_EDGES = np.array([-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64.0])
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


@lru_cache(maxsize=4096)
def _table_moments(name: str, mean: float, var: float) -> tuple[float, float]:
    return _integrate(_TABLE[name], mean, var)


def _integrate(act: _Act, mean: float, var: float) -> tuple[float, float]:
    std = math.sqrt(var)
    if std == 0:
        return float(_evaluate(act.fn, np.array([mean]))[0]), 0.0
    points = np.concatenate([_X_EDGES, act.kinks or ()])
    edges = np.unique(np.concatenate([_Z_EDGES, (points - mean) / std]))
    edges = edges[(edges >= -_REACH) & (edges <= _REACH)]
    if act.kinks is None:
        _check_elementwise(act.fn)
        edges = _refine(act.fn, edges, mean, std)
    z, mass = _rule(edges)
    y = _evaluate(act.fn, mean + std * z)
    m = float((mass * y).sum())
    return m, float((mass * (y - m) ** 2).sum())


def _rule(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (panels, nodes) and the normal's mass at each."""
    half = np.diff(edges)[:, None] / 2
    z = edges[:-1, None] + half * (1 + _NODES)
    return z, half * _WEIGHTS * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _refine(fn: Callable[[Tensor], Tensor], edges: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Halve every panel whose halves disagree with it, until a jump is enclosed in 1e-12."""
    done, low, high = [edges[-1:]], edges[:-1], edges[1:]
    for _ in range(48):
        middle = (low + high) / 2
        sums = []
        for a, b in ((low, high), (low, middle), (middle, high)):
            half = (b - a)[:, None] / 2
            z = a[:, None] + half * (1 + _NODES)
            y = _evaluate(fn, mean + std * z)
            mass = half * _WEIGHTS * np.exp(-0.5 * z * z)
            sums.append(np.stack([(mass * y).sum(1), (mass * y * y).sum(1)]))
        off = np.abs(sums[0] - sums[1] - sums[2])
        rough = (off > 1e-12 * np.maximum(1.0, np.abs(sums[0]))).any(0)
        done.append(low[~rough])
        if not rough.any():
            return np.sort(np.concatenate(done))
        if rough.sum() > 4096:
            break
        low, high = np.concatenate([low[rough], middle[rough]]), np.concatenate([middle[rough], high[rough]])
    return np.unique(np.concatenate([*done, low]))


def _check_elementwise(fn: Callable[[Tensor], Tensor]) -> None:
    # A softmax, or a dropout in training mode, keeps the shape but not the values of a part of its input.
    x = np.linspace(-3.0, 3.0, 64)
    if not np.allclose(_evaluate(fn, x)[::2], _evaluate(fn, x[::2]), rtol=1e-6, atol=1e-9):
        raise UserError(
            f"activation {_describe(cast(Any, fn))}: expected an elementwise deterministic function, but a value "
            "depends on its neighbors or on chance; pass one that does not"
        )


@torch.no_grad()
def _evaluate(fn: Callable[[Tensor], Tensor], x: np.ndarray) -> np.ndarray:
    given = torch.from_numpy(x.reshape(-1).copy())  # a copy: the activation may work in place
    out = fn(given)
    if not isinstance(out, Tensor) or out.shape != (x.size,):
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"activation {_describe(cast(Any, fn))}: expected an elementwise function, but {x.size} numbers gave "
            f"{got}; pass one that keeps the shape"
        )
    y = out.double().numpy().reshape(x.shape)
    if not np.isfinite(y).all():
        raise UserError(
            f"activation {_describe(cast(Any, fn))}: expected finite values, got NaN or infinity for inputs in "
            f"[{x.min():.3g}, {x.max():.3g}]; it has no gain, use another"
        )
    return y
