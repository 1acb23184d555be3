"""DKS and TAT: networks whose activations and weights are shaped so that depth does not merge or scatter inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nfnets.activations import describe
from nfnets.errors import UserError, unknown
from nfnets.graph import Graph
from nfnets.init.activations import replace_modules
from nfnets.init.drawn import filled
from nfnets.init.measured import mean_cosine
from nfnets.init.orthogonal import scaled_orthogonal_
from nfnets.init.reading import few_samples, refuse_any_norm
from nfnets.init.squares import Squares, promised, unmixed
from nfnets.init.weights import fan_in, full, settable, zero_bias
from nfnets.kernel_flow import Flow, is_weighted_call, refuse_unknown
from nfnets.local_maps import (
    Constants,
    dks_constants,
    increasing,
    is_leaky,
    leaky_constants,
    leaky_relu_map,
    tat_constants,
)
from nfnets.nested import tensors_in
from nfnets.noise import drops
from nfnets.predict import activation_at, pools
from nfnets.scale.knob import Knob
from nfnets.scale.one_pass import check, transaction
from nfnets.scale.report import Report, Row
from nfnets.tailored import TailoredActivation

Weights = Literal["delta", "orthogonal", "normal"]


def tat_(
    model: nn.Module,
    *inputs: Any,
    eta: float = 0.9,
    tau: float = 0.3,
    shortcut_weight: float | None = None,
    weights: Weights = "delta",
    strict: bool = True,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Tailored activation transformation: activations between linear and their own, by as much as the depth allows.

        ReLU, LeakyReLU    √(2/(1 + a²)) · LeakyReLU_a(x), the one a with  max over subnetworks C(0) = eta
        smooth ones        γ (φ(α x + β) + δ):  Q(1) = Q'(1) = C'(1) = 1,  max over subnetworks C''(1) = tau

    C maps are composed along the traced graph: weighted layers keep the cosine of two inputs, activations apply their
    map, sums and concatenations average by mean squares, pools and reshapes are taken to keep it. So a sum needs no
    weights of its own: with `shortcut_weight` w, a branch's last layers put out (1 − w²)/w² times the mean square of
    the shortcut, which makes it w · shortcut + √(1 − w²) · branch but for a factor, and what reads the sum divides by
    its mean square. Weights are scaled orthogonal at the kernel's center (`scaled_orthogonal_`), biases 0.

    An activation is taken to read normal values. One that reads a sum with another's output in it (post-activation
    blocks with identity shortcuts) does not: mean squares drift there, and the report says so.

    Activations are exchanged for `nfnets.layers.TailoredActivation`, the last ones (no weighted layer behind them)
    are left. Initialize before you make the optimizer of a net whose activations have parameters.

    Args:
        model: a network without norm layers, with its activations as modules; changed in place.
        *inputs: example inputs, as `model(*inputs)` takes them. Their mean square is measured: the first layers divide
            by it. The theory is exact where it is the same at every position.
        eta: for ReLU: the largest cosine that two orthogonal inputs may come to, between 0 and 1.
        tau: for smooth activations: the largest curvature of the net's C map, above 0.
        shortcut_weight: w, between 0 and 1; by default w² = L/(L + 1) for L residual branches, so that the stream's
            mean square grows by less than e in all.
        weights: `"delta"`, `"orthogonal"` over the whole kernel, or `"normal"` with variance 1/fan_in.
        strict: refuse a model with standardized or parametrized weights; otherwise leave those as `refused`.
        generator: source of randomness; torch's global one by default.
        layers: paths of the layers to set; None for all. The others are left, all activations are exchanged.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per layer and activation, with the root mean square and the cosine that are promised, and the
        constants.

    Raises:
        UserError: norm layers, activations that are functions, of both families or without a solution, operations
            without a C map, a target out of range or of reach; nothing is changed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.ReLU())))
        >>> _ = model.append(nn.Linear(64, 10))
        >>> report = tat_(model, torch.randn(8, 64))
        >>> {name: round(value, 4) for name, value in report.constants.items()}
        {'output_scale': 1.3915, 'negative_slope': 0.1814}

    Paper: arXiv 2203.08120. Constants checked against PyPI `dks` 0.1.2.
    """
    _between("eta", eta, 0.0, 1.0)
    _between("tau", tau, 0.0, math.inf)

    def constants(found: Flow, activations: Mapping[str, nn.Module]) -> dict[str, Constants]:
        leaky = [is_leaky(a) for a in activations.values()]
        if any(leaky) and not all(leaky):
            others = next(p for p, is_one in zip(activations, leaky, strict=True) if not is_one)
            first = next(p for p, is_one in zip(activations, leaky, strict=True) if is_one)
            raise UserError(
                f"TAT with ReLU at {first} and {describe(activations[others])} at {others}: it takes either (leaky) "
                "ReLUs or smooth activations; use DKS (the method dks), or one kind of activation"
            )
        if all(leaky):
            slope = _slope(found, eta)
            return dict.fromkeys(activations, leaky_constants(slope))
        curvature = increasing(lambda k: found.largest(0.0, lambda _, y: y + k), tau, 0.0, math.inf)
        return {path: tat_constants(a, _reached(curvature, "tau", tau)) for path, a in activations.items()}

    settings = _Settings("TAT", constants, shortcut_weight, weights, strict, generator, layers)
    return _shape(model, inputs, kwargs, settings)


def dks_(
    model: nn.Module,
    *inputs: Any,
    zeta: float = 1.5,
    shortcut_weight: float | None = None,
    weights: Weights = "delta",
    strict: bool = True,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Deep kernel shaping: activations whose local maps keep the whole net's kernel well behaved.

        γ (φ(α x + β) + δ):  Q(1) = Q'(1) = 1,  C(0) = 0,  max over subnetworks C'(1) = zeta

    ReLU and LeakyReLU are taken by a negative slope of their own in place of α. Everything else is as in `tat_`.

    Args:
        model: as for `tat_`.
        *inputs: as for `tat_`.
        zeta: the largest slope of the net's C map at 1, above 1.
        shortcut_weight, weights, strict, generator, layers, **kwargs: as for `tat_`.

    Returns:
        A `Report`, as `tat_`.

    Raises:
        UserError: as `tat_`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.Softplus())))
        >>> report = dks_(model.append(nn.Linear(64, 10)), torch.randn(8, 64))
        >>> sorted(report.constants)
        ['input_scale', 'input_shift', 'output_scale', 'output_shift']

    Paper: arXiv 2110.01765. Constants checked against PyPI `dks` 0.1.2.
    """
    _between("zeta", zeta, 1.0, math.inf)

    def constants(found: Flow, activations: Mapping[str, nn.Module]) -> dict[str, Constants]:
        slope = increasing(lambda k: found.largest(1.0, lambda _, y: y * k), zeta, 1.0, math.inf)
        return {path: dks_constants(a, _reached(slope, "zeta", zeta)) for path, a in activations.items()}

    settings = _Settings("DKS", constants, shortcut_weight, weights, strict, generator, layers)
    return _shape(model, inputs, kwargs, settings)


@dataclass(frozen=True)
class _Settings:
    what: str
    constants: Callable[[Flow, Mapping[str, nn.Module]], dict[str, Constants]]
    shortcut_weight: float | None
    weights: str
    strict: bool
    generator: torch.Generator | None
    layers: Collection[str] | None


def _between(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        bounds = f"above {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}, both excluded"
        raise UserError(f"{name}={value}: expected a number {bounds}")


def _slope(found: Flow, eta: float) -> float:
    """The negative slope with which orthogonal inputs come to the cosine eta."""

    def largest(bend: float) -> float:
        return found.largest(0.0, lambda _, c: float(leaky_relu_map(c, 1 - bend)))

    bend = increasing(largest, eta, 0.0, 1.0)
    if bend is None:
        raise UserError(
            f"eta={eta}: this net is too shallow for it, with plain ReLUs orthogonal inputs come to {largest(1.0):.3f} "
            f"only; pass eta={math.floor(largest(1.0) * 100) / 100:g} or less"
        )
    return 1 - bend


def _reached(local: float | None, name: str, value: float) -> float:
    if local is None:
        raise UserError(f"{name}={value}: no local map gives this net that value; pass another")
    return local


# -- one net --------------------------------------------------------------------------------------------------------


def _shape(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], to: _Settings) -> Report:
    if to.weights not in get_args(Weights):
        raise unknown("weights", str(to.weights), get_args(Weights))
    if to.shortcut_weight is not None:
        _between("shortcut_weight", to.shortcut_weight, 0.0, 1.0)
    check(model, inputs, kwargs)
    knobs, left = settable(model, to.what, to.layers, to.strict)
    graph = few_samples(model, inputs, kwargs)
    refuse_any_norm(graph, to.what)
    activations = _activations(graph, to.what)
    given = [t for t in tensors_in(inputs, kwargs) if t.is_floating_point()]
    start = float(torch.cat([t.detach().double().flatten() for t in given]).square().mean()) if given else 1.0
    if not 0 < start < math.inf:
        raise UserError(
            f"the inputs have the mean square {start:g}: expected a finite number above 0; pass real ones"
        )
    squares = Squares(model, graph, knobs, activations, to.what, to.shortcut_weight)
    found = squares.settled(start)
    refuse_unknown(found, to.what)
    constants = to.constants(found, activations)
    scales = squares.input_scales(found)
    modules = {path: _tailored(activations[path], constants[path], scales[path]) for path in activations}
    cosine = mean_cosine(given[0]) if given and given[0].ndim > 1 else math.nan
    outputs = promised(graph, found, modules, cosine)
    rows: dict[str, Row] = {}
    with transaction() as write:
        for node in graph.nodes:
            if node.kind != "module" or node.path in rows:
                continue
            if node.path in modules:
                reason = _shown(modules[node.path])
            elif node.path in knobs and is_weighted_call(node):
                layer = knobs[node.path]
                gain = math.sqrt(found.square[node.index] / found.square[node.inputs[0]])
                drawn, reason = _weight(layer, node.module, gain, to)
                write(layer.direction, drawn.to(layer.direction.dtype))
                zero_bias(layer, write)
            else:
                continue
            rows[node.path] = Row(node.path, "set", reason, **outputs[node.index])
    replace_modules(model, {model.get_submodule(path): module for path, module in modules.items()})
    missing = [Row(path, "unreached", "no call of it") for path in knobs if path not in rows]
    return Report(
        to.what,
        [*rows.values(), *left, *missing],
        _assumed(graph, start, squares, found),
        _named(constants, activations),
    )


def _activations(graph: Graph, what: str) -> dict[str, nn.Module]:
    """The activations that a weighted layer follows, as they were before any tailoring, by path."""
    weighted = [node.index for node in graph.nodes if is_weighted_call(node)]
    found: dict[str, nn.Module] = {}
    for node in graph.nodes:
        if activation_at(node) is None or not graph.followed(node.index, weighted):
            continue
        if node.module is None:
            raise UserError(
                f"{what} replaces activations, but {node.name} at {node.path or 'the root'} is called as a function: "
                "make it a module of its own (nn.ReLU() and the like)"
            )
        module = node.module
        found[node.path] = module.activation if isinstance(module, TailoredActivation) else module
        if isinstance(module, nn.PReLU | nn.RReLU | nn.GLU):
            raise UserError(
                f"{what} has no constants for {type(module).__name__} at {node.path}: use nn.LeakyReLU() there"
            )
    if not found:
        raise UserError(f"no activation that a weighted layer follows: nothing for {what} to shape")
    return found


def _tailored(activation: nn.Module, found: Constants, scale: float) -> TailoredActivation:
    if found.negative_slope is None:
        return TailoredActivation(
            activation, found.input_scale * scale, found.input_shift, found.output_shift, found.output_scale
        )
    leaky = nn.LeakyReLU(found.negative_slope)
    if found.input_shift == found.output_shift == 0:  # homogeneous: the scale may as well stand behind
        return TailoredActivation(leaky, output_scale=found.output_scale * scale)
    return TailoredActivation(leaky, scale, found.input_shift, found.output_shift, found.output_scale)


def _shown(module: TailoredActivation) -> str:
    inner = describe(module.activation)
    return f"{inner}: {module.extra_repr()}"


def _weight(layer: Knob, module: Any, gain: float, to: _Settings) -> tuple[Tensor, str]:
    weight = full(layer.direction)
    strides = math.prod(module.stride) if layer.transposed else 1  # so few taps reach one output
    if to.weights == "normal":
        std = gain / math.sqrt(fan_in(layer, module))
        return filled(weight, std, "normal", to.generator), f"normal, std {std:.4g}"
    plain = layer.rows(weight)
    if weight.ndim > 2:
        plain = plain.unflatten(1, (-1, *weight.shape[2:]))
    plain = plain.clone()
    odd = all(size % 2 for size in plain.shape[2:])
    delta = to.weights == "delta" and weight.ndim > 2 and odd and strides == 1
    scaled_orthogonal_(plain, gain * math.sqrt(strides), delta, layer.groups, to.generator)
    where = " at the center" if delta else ""
    return layer.from_rows(plain.flatten(1)), f"scaled orthogonal{where}, gain {gain:.4g}"


def _assumed(graph: Graph, start: float, squares: Squares, found: Flow) -> list[str]:
    lines = [f"inputs of mean square {start:.4g}, the same at every position"]
    if pooled := [node.path or node.name for node in graph.nodes if pools(node)]:
        lines.append(f"pools keep mean squares and cosines ({', '.join(dict.fromkeys(pooled))})")
    if drops(squares.model):
        lines.append("dropout is off: in training it lowers cosines and raises mean squares by 1/(1 − p)")
    if twice := unmixed(graph, found):
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        lines.append(
            f"{twice[0]}{more} read normal values of mean 0, though what another activation put out comes in unmixed"
        )
    if squares.shortcuts:
        lines.append(f"a branch has {squares.share:.4g} of the mean square of its shortcut")
    return lines


def _named(constants: Mapping[str, Constants], activations: Mapping[str, nn.Module]) -> dict[str, float]:
    """The constants by name; with the activation's where a net has several kinds."""
    found: dict[Constants, str] = {}
    for path, each in constants.items():
        found.setdefault(each, type(activations[path]).__name__)
    several = len(found) > 1
    named = {}
    for each, kind in found.items():
        neutral = Constants()
        for name, value in each._asdict().items():
            if value is not None and (value != getattr(neutral, name) or each.negative_slope is None):
                named[f"{kind} {name}" if several else name] = value
    return named
