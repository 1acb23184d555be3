"""Which layers an initializer may set, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError, unknown
from nfnets.init.lsuv import find_knobs
from nfnets.scale.knob import Knob
from nfnets.scale.one_pass import Write, check_model, check_values
from nfnets.scale.report import Row

FROZEN = "requires_grad is False"


def settable(
    model: Any, what: str, layers: Collection[str] | None = None, strict: bool = True
) -> tuple[dict[str, Knob], list[Row]]:
    """The layers whose plain weights can be set, and a row for each that is left.

    Args:
        model: with values.
        what: who asks, for the error messages.
        layers: paths of the layers to set; None for all.
        strict: refuse a model with layers whose weight is computed from others; otherwise they are rows.

    Returns:
        Layers by path, and rows of those that are `frozen`, `shared` or `refused`.

    Raises:
        UserError: no model, no values, no such layers, or a computed weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).requires_grad_(False))
        >>> knobs, left = settable(model, "He")
        >>> list(knobs), [(row.path, row.action) for row in left]
        (['0'], [('1', 'frozen')])
    """
    check_model(model)
    check_values(model)
    if layers is not None:
        paths = dict(model.named_modules())
        for path in layers:
            if path not in paths:
                raise unknown("layer", path, paths)
    found, left = find_knobs(model, layers=layers)
    if not found and not left:
        raise UserError(
            f"{type(model).__name__} has no convolution or linear layer: nothing for {what} to initialize"
        )
    knobs: dict[str, Knob] = {}
    owner: dict[int, str] = {}
    for path, layer in found.items():
        first = owner.setdefault(id(layer.direction), path)
        if first != path:
            left.append(Row(path, "shared", f"its weight is that of {first}"))
        elif layer.parameter is not layer.direction:
            left.append(Row(path, "refused", "a gain or norm beside its weight sets its size"))
        elif layer.frozen:
            left.append(Row(path, "frozen", FROZEN))
        else:
            knobs[path] = layer
    refused = [row for row in left if row.action == "refused"]
    if strict and refused:
        listed = "; ".join(f"{row.path}: {row.reason}" for row in refused[:3])
        raise UserError(
            f"{what} sets plain weights: {listed}. Remove the parametrization, initialize before you convert, "
            "or pass strict=False to leave them as they are"
        )
    return knobs, left


def in_order(model: nn.Module, rows: Iterable[Row]) -> list[Row]:
    """Rows in the order in which the model registers its modules."""
    place = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(rows, key=lambda row: place.get(row.path, len(place)))


def fan_in(layer: Knob, module: Any) -> float:
    """Weights that one output reads: in/groups · kernel, of a transposed convolution a stride's share of them.

    Args:
        layer: the module's knob.
        module: the layer.

    Example:
        >>> from nfnets.scale.knob import knob
        >>> [fan_in(knob(m), m) for m in (nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose1d(4, 8, 2, 2))]
        [18, 4]
    """
    full = layer.direction.numel() // layer.units
    taps = full / math.prod(module.stride) if layer.transposed else full
    return int(taps) if taps == int(taps) else taps


def zero_bias(layer: Knob, write: Write) -> None:
    """A bias that learns starts at 0."""
    if layer.bias is not None and layer.bias.requires_grad:
        write(layer.bias, torch.zeros_like(layer.bias))


def full(weight: Tensor) -> Tensor:
    """Room to draw a weight in, in at least fp32: half precision is rounded once, at the end."""
    return torch.empty_like(weight, dtype=torch.float32 if weight.dtype.itemsize < 4 else weight.dtype)
