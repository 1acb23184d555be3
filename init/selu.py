"""Self-normalizing networks: SELU, LeCun's weights, alpha dropout."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from nfnets.errors import UserError
from nfnets.graph import Graph
from nfnets.init.activations import replace_modules
from nfnets.init.reading import few_samples, refuse_any_norm
from nfnets.init.weights import fan_in, full, settable, zero_bias
from nfnets.predict import activation_at
from nfnets.scale.one_pass import check, transaction
from nfnets.scale.report import Report, Row
from nfnets.structure.walk import is_weighted, name_of
from nfnets.tailored import TailoredActivation


def selu_(
    model: nn.Module,
    *inputs: Any,
    strict: bool = True,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Make a network self-normalizing: SELU for every activation, weights N(0, 1/fan_in), alpha dropout.

        selu(x) = λ x for x > 0, λ a (eˣ − 1) else;  λ = 1.0507009873554805, a = 1.6732632423543772

    maps mean 0 and variance 1 to themselves, and is drawn to them from nearby. `nn.Dropout` becomes `nn.AlphaDropout`,
    `nn.Dropout2d` and `3d` `nn.FeatureAlphaDropout`, of the same rate, which keep both. Activations that no weighted
    layer follows are left, gates (sigmoid, softmax and their like) too. Biases are 0.

    Args:
        model: a network without norm layers, with its activations as modules; changed in place.
        *inputs: example inputs, as `model(*inputs)` takes them; only shapes matter. The data should have mean 0 and
            variance 1.
        strict: refuse a model with standardized or parametrized weights; otherwise leave those as `refused`.
        generator: source of randomness; torch's global one by default.
        layers: paths of the layers to set; None for all. The others are left, all activations are exchanged.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per layer, activation and dropout.

    Raises:
        UserError: norm layers, activations that are functions, no layers, computed weights, inputs the model rejects;
            nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
        >>> report = selu_(model, torch.randn(4, 8))
        >>> model[1], model[2]
        (SELU(), AlphaDropout(p=0.1, inplace=False))

    Paper: arXiv 1706.02515. Checked against torch's SELU and the fixed point's moments by SciPy.
    """
    check(model, inputs, kwargs)
    knobs, left = settable(model, "SELU", layers, strict)
    graph = few_samples(model, inputs, kwargs)
    twins = {model.get_submodule(path): twin for path, twin in _twins(graph).items()}
    rows: dict[str, Row] = {}
    with transaction() as write:
        for node in graph.nodes:
            if node.kind != "module" or node.path in rows:
                continue
            if node.module in twins:
                rows[node.path] = Row(
                    node.path, "set", f"{type(twins[node.module]).__name__} for {_kind(node.module)}"
                )
            elif node.path in knobs:
                layer = knobs[node.path]
                value = full(layer.direction).normal_(
                    0, math.sqrt(1 / fan_in(layer, node.module)), generator=generator
                )
                write(layer.direction, value.to(layer.direction.dtype))
                zero_bias(layer, write)
                rows[node.path] = Row(
                    node.path, "set", f"std √(1/{fan_in(layer, node.module)})", promised=1.0
                )
    replace_modules(model, twins)
    missing = [Row(path, "unreached", "no call of it") for path in knobs if path not in rows]
    given = "inputs of mean 0 and variance 1, independent over positions"
    return Report("self-normalizing", [*rows.values(), *left, *missing], [given])


def _twins(graph: Graph) -> dict[str, nn.Module]:
    """What stands afterwards where an activation or a dropout stands, by path."""
    refuse_any_norm(graph, "selu_")
    weighted = [node.index for node in graph.nodes if is_weighted(node.module)]
    found: dict[str, nn.Module] = {}
    for node in graph.nodes:
        module = node.module
        if isinstance(module, nn.modules.dropout._DropoutNd):
            kind: Any = (
                nn.AlphaDropout if type(module) in (nn.Dropout, nn.AlphaDropout) else nn.FeatureAlphaDropout
            )
            if type(module) is not kind:
                found[node.path] = kind(module.p, module.inplace)
        elif activation_at(node) is None or not graph.followed(node.index, weighted) or _gates(name_of(node)):
            continue
        elif module is None:
            raise UserError(
                f"SELU replaces activations, but {node.name} at {node.path or 'the root'} is called as a function: "
                "make it a module of its own (nn.ReLU() and the like)"
            )
        elif type(module) is not nn.SELU:
            found[node.path] = nn.SELU(getattr(module, "inplace", False))
    return found


def _gates(name: str) -> bool:
    return "sigmoid" in name or "softmax" in name or name == "glu"


def _kind(module: nn.Module) -> str:
    return type(module.activation if isinstance(module, TailoredActivation) else module).__name__
