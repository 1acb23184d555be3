"""ZerO: a start of zeros and ones alone, without a random number."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.init.reading import few_samples
from nfnets.init.weights import full, settable, zero_bias
from nfnets.scale.knob import Knob
from nfnets.scale.one_pass import check, transaction
from nfnets.scale.report import Report, Row
from nfnets.structure.residual import has_branches, residual_of
from nfnets.trace import tensors_in


def zero_(
    model: nn.Module,
    *inputs: Any,
    strict: bool = True,
    layers: Collection[str] | None = None,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Report:
    """Start every weight as an identity, or as one through a Hadamard matrix where the width grows.

        out = in    W = I                                  out < in    W = I*, the first rows
        out > in    W = 2^(−(m−1)/2) · I* H_m I*,  m = ⌈log₂ out⌉

    at the kernel's center, 0 elsewhere. H_m is the Hadamard matrix of 2^m rows: without it all units beyond the input's
    width would stay 0, and the gradients of a wider layer have the rank of its input. Of residual nets the last layer
    of every branch and the classifier are 0. Biases are 0. Nothing is random: two models start alike, and units break
    their symmetry by their places alone.

    Args:
        model: changed in place.
        *inputs: example inputs, as `model(*inputs)` takes them; only shapes matter. They are needed to find residual
            branches.
        strict: refuse a model with standardized or parametrized weights; otherwise leave those as `refused`.
        layers: paths of the layers to set; None for all.
        generator: taken, so that every initializer can be called alike; not used.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per layer.

    Raises:
        UserError: no layers, computed weights, inputs the model rejects; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> print(zero_(model, torch.randn(1, 2)))
        ZerO
        layer  action  reason
        0      set     Hadamard, 2 → 4
        1      set     identity
        2      set     identity, the first 2 of 4
        >>> model[0].weight.tolist()[1]
        [0.7071067690849304, -0.7071067690849304]

    Paper: arXiv 2110.12661 (algorithms 1 and 2). Checked against SciPy's Hadamard matrices.
    """
    check(model, inputs, kwargs)
    knobs, left = settable(model, "ZerO", layers, strict)
    zero = _zeros(model, inputs, kwargs) if tensors_in(inputs, kwargs) else {}
    rows = []
    with transaction() as write:
        for path, layer in knobs.items():
            value, reason = _start(layer)
            if path in zero:
                value, reason = torch.zeros_like(value), f"zero: {zero[path]}"
            write(layer.direction, value.to(layer.direction.dtype))
            zero_bias(layer, write)
            rows.append(Row(path, "set", reason))
    return Report("ZerO", [*rows, *left])


def _zeros(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Layers that start at zero, and why: the last of every branch (not behind a ReLU), and the classifier."""
    graph = few_samples(model, inputs, kwargs)
    if not has_branches(graph):
        return {}
    net = residual_of(model, graph, "ZerO")
    ends = {path: "branch end" for b in net.branches if not (b.clipped or b.multipliers) for path in b.last}
    return ends | dict.fromkeys(net.head, "classifier")


def _start(layer: Knob) -> tuple[Tensor, str]:
    plain = layer.rows(full(layer.direction).zero_())
    shape = layer.direction.shape
    kernel = tuple(shape[2:])
    plain = (
        plain.unflatten(1, (-1, *kernel)).clone() if kernel else plain.clone()
    )  # (out, in/groups, *kernel)
    outputs, inputs = plain.shape[0] // layer.groups, plain.shape[1]
    center = tuple(size // 2 for size in kernel)
    for block in plain.split(outputs):
        block[(slice(None), slice(None), *center)] = partial_identity(outputs, inputs).to(block)
    if outputs == inputs:
        reason = "identity"
    elif outputs < inputs:
        reason = f"identity, the first {outputs} of {inputs}"
    else:
        reason = f"Hadamard, {inputs} → {outputs}"
    return layer.from_rows(plain.flatten(1)), reason + (", in each group" if layer.groups > 1 else "")


def partial_identity(outputs: int, inputs: int) -> Tensor:
    """The matrix of the paper's algorithm 1, of shape (outputs, inputs).

    Example:
        >>> partial_identity(2, 3).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if outputs <= inputs:
        return torch.eye(outputs, inputs, dtype=torch.float64)
    steps = math.ceil(math.log2(outputs))
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(steps):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[:outputs, :inputs] * 2 ** (-(steps - 1) / 2)
