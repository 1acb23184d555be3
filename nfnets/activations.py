"""Activations by name, module or callable: the function, and where it has kinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.copying import deep_copy
from nfnets.errors import UserError, unknown
from nfnets.given import shown
from nfnets.tailored import TailoredActivation

Activation = str | nn.Module | Callable[[Tensor], Tensor]


class Act(NamedTuple):
    """A function of a float64 tensor and what is known of it."""

    fn: Callable[[Tensor], Tensor]
    # Where it or its derivatives jump. None: not known, so it is integrated adaptively.
    kinks: tuple[float, ...] | None = ()
    # Its row in TABLE; "" for one with settings of its own.
    name: str = ""


def _leaky(slope: float) -> Act:
    return Act(lambda x: F.leaky_relu(x, slope), (0.0,))


def _hard_mish(x: Tensor) -> Tensor:
    return 0.5 * x * (x + 2).clamp(0, 2)


TABLE: dict[str, Act] = {
    "identity": Act(lambda x: x),
    "relu": Act(F.relu, (0.0,)),
    "relu6": Act(F.relu6, (0.0, 6.0)),
    "leakyrelu": _leaky(0.01),
    "prelu": _leaky(0.25),  # torch's and timm's initial slope
    "rrelu": _leaky((1 / 8 + 1 / 3) / 2),  # torch's default bounds, at evaluation
    "silu": Act(F.silu),
    "quickgelu": Act(lambda x: x * torch.sigmoid(1.702 * x)),
    "gelu": Act(F.gelu),
    "gelutanh": Act(lambda x: F.gelu(x, approximate="tanh")),
    "elu": Act(F.elu, (0.0,)),
    "celu": Act(F.celu, (0.0,)),
    "selu": Act(F.selu, (0.0,)),
    "sigmoid": Act(torch.sigmoid),
    "tanh": Act(torch.tanh),
    "softplus": Act(F.softplus),
    "logsigmoid": Act(F.logsigmoid),
    "softsign": Act(F.softsign, (0.0,)),
    "mish": Act(F.mish),
    "hardswish": Act(F.hardswish, (-3.0, 3.0)),
    "hardsigmoid": Act(F.hardsigmoid, (-3.0, 3.0)),
    "hardtanh": Act(F.hardtanh, (-1.0, 1.0)),
    "hardmish": Act(_hard_mish, (-2.0, 0.0)),
    "hardshrink": Act(F.hardshrink, (-0.5, 0.5)),
    "softshrink": Act(F.softshrink, (-0.5, 0.5)),
    "tanhshrink": Act(F.tanhshrink),
    "erf": Act(torch.erf),
    "atan": Act(torch.atan),
    "asinh": Act(torch.asinh),
    "sin": Act(torch.sin, None),  # oscillates at any distance
    "square": Act(torch.square),
    "abs": Act(torch.abs, (0.0,)),
    "glu": Act(torch.sigmoid),
    "logsoftmax": Act(lambda x: x),
}
TABLE = {name: act._replace(name=name) for name, act in TABLE.items()}

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
_SPELLED = {
    "leakyrelu": "leaky_relu",
    "gelutanh": "gelu_tanh",
    "quickgelu": "quick_gelu",
    "logsigmoid": "log_sigmoid",
    "logsoftmax": "log_softmax",
}


def spelled(name: str) -> str:
    """A row of TABLE as people write it."""
    return _SPELLED.get(name, name)


NAMES: tuple[str, ...] = tuple(sorted(spelled(name) for name in TABLE))

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
_MODULES: tuple[tuple[type[nn.Module], Callable[[Any], Act]], ...] = (
    (nn.Identity, lambda m: TABLE["identity"]),
    (nn.ReLU6, lambda m: TABLE["relu6"]),
    (nn.ReLU, lambda m: TABLE["relu"]),
    (nn.LeakyReLU, lambda m: TABLE["leakyrelu"] if m.negative_slope == 0.01 else _leaky(m.negative_slope)),
    (nn.RReLU, lambda m: _leaky((m.lower + m.upper) / 2)),
    (nn.SiLU, lambda m: TABLE["silu"]),
    (nn.GELU, lambda m: TABLE["gelutanh" if m.approximate == "tanh" else "gelu"]),
    (nn.ELU, lambda m: TABLE["elu"] if m.alpha == 1 else Act(lambda x: F.elu(x, m.alpha), (0.0,))),
    (nn.CELU, lambda m: TABLE["celu"] if m.alpha == 1 else Act(lambda x: F.celu(x, m.alpha), (0.0,))),
    (nn.SELU, lambda m: TABLE["selu"]),
    (nn.Sigmoid, lambda m: TABLE["sigmoid"]),
    (nn.Tanh, lambda m: TABLE["tanh"]),
    # Beyond its threshold torch's softplus is the identity: a jump of at most exp(-threshold)/beta.
    (
        nn.Softplus,
        lambda m: (
            TABLE["softplus"]
            if (m.beta, m.threshold) == (1, 20)
            else Act(lambda x: F.softplus(x, m.beta, m.threshold), (m.threshold / m.beta,))
        ),
    ),
    (nn.LogSigmoid, lambda m: TABLE["logsigmoid"]),
    (nn.Softsign, lambda m: TABLE["softsign"]),
    (nn.Mish, lambda m: TABLE["mish"]),
    (nn.Hardswish, lambda m: TABLE["hardswish"]),
    (nn.Hardsigmoid, lambda m: TABLE["hardsigmoid"]),
    (nn.Hardtanh, lambda m: Act(lambda x: x.clamp(m.min_val, m.max_val), (m.min_val, m.max_val))),
    (nn.Hardshrink, lambda m: Act(lambda x: F.hardshrink(x, m.lambd), (-m.lambd, m.lambd))),
    (nn.Softshrink, lambda m: Act(lambda x: F.softshrink(x, m.lambd), (-m.lambd, m.lambd))),
    (nn.Threshold, lambda m: Act(lambda x: F.threshold(x, m.threshold, m.value), (m.threshold,))),
    (nn.GLU, lambda m: TABLE["glu"]),
    (nn.LogSoftmax, lambda m: TABLE["logsoftmax"]),
    (TailoredActivation, lambda m: _tailored(m)),
)


def _key(name: str) -> str:
    key = name.lower().translate(_DROPPED)
    return _ALIASES.get(key, key)


def runs_forward_of(module: nn.Module, cls: type[nn.Module]) -> bool:
    # timm's subclasses only restate the forward (for scripting); anybody else's may compute something else.
    return type(module).forward is cls.forward or type(module).__module__.startswith("timm.layers.")


def resolve(activation: Activation) -> Act:
    """The function behind a name, a module with its settings, or a callable.

    Example:
        >>> resolve("swish").name, resolve(nn.Hardtanh(-2.0, 3.0)).kinks
        ('silu', (-2.0, 3.0))
    """
    if isinstance(activation, str):
        key = _key(activation)
        if key not in TABLE:
            raise unknown("activation", activation, NAMES)
        return TABLE[key]
    if isinstance(activation, nn.Module):
        for cls, build in _MODULES:
            if isinstance(activation, cls) and runs_forward_of(activation, cls):
                return build(activation)
        key = _key(type(activation).__name__)
        if type(activation).__module__.startswith("timm.layers.activations") and key in TABLE:
            return TABLE[key]
        return Act(_on_cpu(activation), None)
    if callable(activation) and not isinstance(activation, type):
        try:
            name = _FUNCTIONS.get(activation, "")
        except TypeError:  # not hashable
            name = ""
        return TABLE[name] if name else Act(activation, None)
    raise UserError(
        f"activation {shown(activation)}: expected a name, a module or a callable on tensors; "
        "pass 'relu', nn.ReLU() or F.relu"
    )


def _tailored(module: TailoredActivation) -> Act:
    """Its kinks are where its argument meets those of what it wraps."""
    inner = resolve(module.activation)
    if inner.kinks is None or module.input_scale == 0:
        return Act(_on_cpu(module), None)
    kinks = tuple((kink - module.input_shift) / module.input_scale for kink in inner.kinks)
    fn = inner.fn
    return Act(
        lambda x: (
            module.output_scale * (fn(module.input_scale * x + module.input_shift) + module.output_shift)
        ),
        kinks,
    )


def _on_cpu(module: nn.Module) -> nn.Module:
    # In float64, at evaluation, without hooks that a probe may have put there; the original stays as it is.
    twin = deep_copy(module).to(device="cpu", dtype=torch.float64).eval()
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


def describe(activation: object) -> str:
    """An activation as it stands in a message."""
    if isinstance(activation, str):
        return activation
    if isinstance(activation, nn.Module):
        return str(activation).splitlines()[0]
    return getattr(activation, "__name__", repr(activation))
