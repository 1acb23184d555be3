"""Weight normalization with its data-dependent start."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nfnets.errors import UserError
from nfnets.init.lsuv import lsuv_
from nfnets.init.weights import full, settable, zero_bias
from nfnets.scale.knob import Knob
from nfnets.scale.one_pass import check, transaction
from nfnets.scale.report import Report, Row

FIRST_STD = 0.05
"""Of v, the paper's."""


def weight_norm_(
    model: nn.Module,
    *inputs: Any,
    strict: bool = True,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Weight-normalize every convolution and linear, and start it so that each channel has mean 0 and variance 1.

        W = g · v / ‖v‖ per unit,   v ~ N(0, 0.05²),   g = 1/σ[t],   b = −μ[t]/σ[t],   t = v · x / ‖v‖

    with σ as `torch.std` takes it, in execution order, each layer passing on what it puts out now, so that one forward
    pass is enough. A layer without bias gets one. g and v are those of `torch.nn.utils.parametrizations.weight_norm`:
    what a `state_dict` holds changes, so make the optimizer afterwards.
    `torch.nn.utils.parametrize.remove_parametrizations` makes plain layers of them again.

    Args:
        model: changed in place, in the mode that it is in.
        *inputs: one training batch, as `model(*inputs)` takes it: 16 values of each channel at the least.
        strict: refuse a model with standardized or parametrized weights; otherwise leave those as `refused`.
        generator: source of randomness; torch's global one by default.
        layers: paths of the layers to set; None for all.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per layer.

    Raises:
        UserError: no layers, attention or grouped transposed convolutions (they have no g per output channel), computed
            weights, inputs the model rejects; nothing is changed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> images = torch.randn(64, 8)
        >>> report = weight_norm_(model, images)
        >>> print(model[0])
        ParametrizedLinear(
          in_features=8, out_features=16, bias=True
          (parametrizations): ModuleDict(
            (weight): ParametrizationList(
              (0): _WeightNorm()
            )
          )
        )
        >>> model(images).var(0).round(decimals=2).tolist()
        [1.0, 1.0, 1.0, 1.0]

    Paper: arXiv 1602.07868 §3. The forward is torch's; checked against measured channels.
    """
    check(model, inputs, kwargs)
    knobs, left = settable(model, "weight norm", layers, strict)
    for path, layer in list(knobs.items()):
        if reason := _without_g(model.get_submodule(path), layer):
            if strict:
                raise UserError(f"{path}: {reason}; name the other layers by layers=, or pass strict=False")
            left.append(Row(path, "refused", reason))
            del knobs[path]
    added = [path for path, layer in knobs.items() if layer.bias is None]
    for path in added:
        layer = model.get_submodule(path)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        layer.bias = nn.Parameter(weight.new_zeros(knobs[path].units))
    try:
        with transaction() as write:
            drawn = {}
            for path, layer in knobs.items():
                value = full(layer.direction).normal_(0, FIRST_STD, generator=generator)
                drawn[path] = value.to(layer.direction.dtype)
                write(layer.direction, drawn[path])
                zero_bias(layer, write)
            found = lsuv_(model, *inputs, orthonormal=False, per_channel=True, layers=[*knobs], **kwargs)
    except BaseException:
        for path in added:
            model.get_submodule(path).bias = None  # type: ignore[assignment]
        raise
    for path, layer in knobs.items():
        module = model.get_submodule(path)
        parametrizations.weight_norm(module, dim=1 if layer.transposed else 0)
        with torch.no_grad():  # g is the norm that was found, v what was drawn
            module.parametrizations["weight"].original1.copy_(drawn[path])  # type: ignore[index, union-attr]
    rows = [replace(row, reason=row.reason or _said(row.path, added)) for row in found]
    return Report("weight norm", [*rows, *left])


def _said(path: str, added: list[str]) -> str:
    return "g = 1/σ, b = −μ/σ" + (", a bias added" if path in added else "")


def _without_g(module: nn.Module, layer: Knob) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "attention has no weight of its own to normalize"
    if layer.transposed and layer.groups > 1:
        return "a grouped transposed convolution has no g per output channel"
    return ""
