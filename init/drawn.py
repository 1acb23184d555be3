"""Weights from a distribution that knows the layer's shape alone: He, Glorot, LeCun, truncated normal, orthogonal."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nfnets.errors import UserError, unknown
from nfnets.init.fixup import fan_out
from nfnets.init.orthogonal import delta_orthogonal_, orthonormal_rows, scaled_orthogonal_
from nfnets.init.weights import fan_in, full, in_order, settable, zero_bias
from nfnets.scale.knob import Knob
from nfnets.scale.one_pass import transaction
from nfnets.scale.report import Report, Row

Weights = Literal["he", "glorot", "lecun", "truncated_normal", "orthogonal", "delta_orthogonal"]
Distribution = Literal["normal", "uniform", "truncated"]
SHORT = 0.8796256610342398
"""Standard deviation of N(0, 1) cut off at ±2."""
TITLES = {
    "he": "He",
    "glorot": "Glorot",
    "lecun": "LeCun",
    "truncated_normal": "truncated normal",
    "orthogonal": "orthogonal",
    "delta_orthogonal": "delta-orthogonal",
}


def draw_(
    model: nn.Module,
    *inputs: Any,
    weights: Weights = "he",
    gain: float | None = None,
    distribution: Distribution | None = None,
    strict: bool = True,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Draw every weight of convolutions and linears anew from its shape alone, and set every bias to 0.

        he                 std = √2 · gain / √fan_in
        glorot             std = gain · √(2 / (fan_in + fan_out))
        lecun              std = gain / √fan_in
        truncated_normal   std = gain / √fan_in, nothing beyond two standard deviations
        orthogonal         gain · Q, rows or columns orthonormal, Q of shape out × (in · kernel)
        delta_orthogonal   gain · Q at the kernel's center and 0 elsewhere; where that cannot be (in > out, an even
                           kernel) `scaled_orthogonal_`, and the report says so

    fan_in is in/groups · kernel (over the stride, if transposed), fan_out is out/groups · kernel. Norm layers,
    embeddings and recurrent layers are left; of attention the output projection is set. No inputs are needed.

    Args:
        model: changed in place, where it is; half precision is drawn in fp32 and rounded.
        *inputs: taken, so that every initializer can be called alike; not read.
        weights: which of the above.
        gain: factor on every weight; 1 by default, √2 for the orthogonal ones (a ReLU keeps half of the mean square).
        distribution: of He, Glorot and LeCun: `"normal"` (the default), `"uniform"` on ±√3 · std, or `"truncated"` at
            two standard deviations of a wider normal, so that `std` is right.
        strict: refuse a model with standardized or parametrized weights; otherwise leave those as `refused`.
        generator: source of randomness; torch's global one by default.
        layers: paths of the layers to set; None for all.
        **kwargs: as `*inputs`.

    Returns:
        A `Report`: a row per layer, with what was set, or why it was left.

    Raises:
        UserError: an unknown name, a gain that is no number above 0, no layers, computed weights; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> report = draw_(model, weights="he")
        >>> report["2"].reason
        'std √(2/576)'

    Paper: arXiv 1502.01852 (He), Glorot and Bengio 2010, LeCun et al. 1998, arXiv 1312.6120 (orthogonal), 1806.05393
    (delta-orthogonal). Checked against `torch.nn.init` (the same numbers from the same generator) and SciPy.
    """
    if weights not in get_args(Weights):
        raise unknown("weights", str(weights), get_args(Weights))
    gain = (math.sqrt(2) if "orthogonal" in weights else 1.0) if gain is None else gain
    if isinstance(gain, bool) or not isinstance(gain, int | float) or not 0 < gain < math.inf:
        raise UserError(f"gain={gain}: expected a finite number above 0; pass gain=1.0")
    kind = distribution or ("truncated" if weights == "truncated_normal" else "normal")
    if kind not in get_args(Distribution):
        raise unknown("distribution", str(kind), get_args(Distribution))
    if distribution is not None and weights not in ("he", "glorot", "lecun"):
        raise UserError(
            f"distribution={distribution!r} with {weights}: it is for he, glorot and lecun; leave it out"
        )
    knobs, left = settable(model, TITLES[weights], layers, strict)
    rows = []
    with transaction() as write:
        for path, layer in knobs.items():
            module = model.get_submodule(path)
            value, reason = _draw(layer, module, weights, float(gain), kind, generator)
            write(layer.direction, value.to(layer.direction.dtype))
            zero_bias(layer, write)
            attention = isinstance(module, nn.MultiheadAttention)
            rows.append(Row(path, "set", reason + (", the output projection alone" if attention else "")))
    return Report(f"{TITLES[weights]}, gain {gain:g}", in_order(model, [*rows, *left]))


def _draw(
    layer: Knob, module: nn.Module, weights: str, gain: float, kind: str, generator: torch.Generator | None
) -> tuple[Tensor, str]:
    weight = full(layer.direction)
    if "orthogonal" in weights:
        return (_orthogonal if weights == "orthogonal" else _delta)(layer, weight, gain, generator)
    incoming, outgoing = fan_in(layer, module), fan_out(layer)
    above, fan = {
        "he": (2, incoming),
        "glorot": (2, incoming + outgoing),
    }.get(weights, (1, incoming))
    factor = "" if gain == 1 else f"{gain:g} · "
    return filled(weight, gain * math.sqrt(above / fan), kind, generator), f"std {factor}√({above}/{fan})"


def filled(weight: Tensor, std: float, distribution: str, generator: torch.Generator | None = None) -> Tensor:
    """The tensor, filled with a distribution of mean 0 and this standard deviation.

    Args:
        weight: room for it.
        std: standard deviation.
        distribution: `"normal"`, `"uniform"`, or `"truncated"`: at twice the standard deviation of the uncut normal.
        generator: source of randomness.
    """
    if distribution == "uniform":
        bound = math.sqrt(3.0) * std
        return weight.uniform_(-bound, bound, generator=generator)
    if distribution == "truncated":
        wide = std / SHORT
        return nn.init.trunc_normal_(weight, 0.0, wide, -2 * wide, 2 * wide, generator=generator)
    return weight.normal_(0, std, generator=generator)


def _orthogonal(
    layer: Knob, weight: Tensor, gain: float, generator: torch.Generator | None
) -> tuple[Tensor, str]:
    rows = orthonormal_rows(layer.units, weight.numel() // layer.units, weight, generator) * gain
    return layer.from_rows(
        rows
    ), f"{gain:.4g} · orthonormal {'rows' if layer.units**2 <= weight.numel() else 'columns'}"


def _delta(layer: Knob, weight: Tensor, gain: float, generator: torch.Generator | None) -> tuple[Tensor, str]:
    if weight.ndim == 2:
        return _orthogonal(layer, weight, gain, generator)
    plain = layer.rows(weight).unflatten(1, (-1, *weight.shape[2:])).clone()  # (out, in/groups, *kernel)
    shown = f"{gain:.4g} · orthogonal"
    if any(size % 2 == 0 for size in plain.shape[2:]):
        scaled_orthogonal_(plain, gain, groups=layer.groups, generator=generator)
        return layer.from_rows(plain.flatten(1)), f"{shown}, an even kernel has no center"
    narrow = plain.shape[1] > plain.shape[0] // layer.groups
    draw = scaled_orthogonal_ if narrow else delta_orthogonal_
    more: dict[str, Any] = {"delta": True} if narrow else {}
    draw(plain, gain, groups=layer.groups, generator=generator, **more)
    reason = f"{shown} at the center" + (", the mean square kept: more inputs than outputs" if narrow else "")
    return layer.from_rows(plain.flatten(1)), reason
