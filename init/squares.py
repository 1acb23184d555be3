"""What a network's nodes put out once DKS or TAT have set it: mean squares, and the cosine of two inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nfnets.errors import UserError
from nfnets.graph import Graph, Node
from nfnets.kernel_flow import Flow, flow, is_weighted_call
from nfnets.local_maps import c_map, is_leaky, leaky_relu_map
from nfnets.scale.knob import Knob
from nfnets.structure.residual import has_branches, residual_of
from nfnets.tailored import TailoredActivation

PASSES = 50
"""Passes over the graph until mean squares agree; two are enough but where modules are shared."""


@dataclass
class Squares:
    """The mean square of what every node puts out, once weights and activations are set."""

    model: nn.Module
    graph: Graph
    knobs: Mapping[str, Knob]
    activations: Mapping[str, nn.Module]
    what: str
    """Who asks."""
    shortcut_weight: float | None = None
    shortcuts: dict[str, int] = field(default_factory=dict)
    """The other operand of the sum, for layers that end a branch."""
    share: float = 1.0
    """Mean square of a branch, of that of its shortcut."""
    kept: dict[str, float] = field(default_factory=dict)
    """What an activation for which Q(q) = q multiplies the mean square by, so that a stream comes back to 1."""
    before: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not has_branches(self.graph):
            return
        branches = residual_of(self.model, self.graph, self.what).branches
        weight = self.shortcut_weight
        self.share = 1 / len(branches) if weight is None else (1 - weight**2) / weight**2
        for branch in branches:
            self.shortcuts.update(dict.fromkeys(branch.last, branch.join.shortcut))

    @property
    def homogeneous(self) -> bool:
        """Whether the activations keep what is not 1: TAT's LeakyReLUs."""
        return self.what == "TAT" and all(is_leaky(a) for a in self.activations.values())

    def settled(self, start: float) -> Flow:
        for _ in range(PASSES):
            kept, before = dict(self.kept), self.before
            found = flow(self.graph, self._square, start)
            self.before = found.square
            if kept == self.kept and before == self.before:
                return found
        raise UserError(
            f"mean squares do not settle where {self.what} shares activations between several places: give each "
            "call an activation of its own"
        )

    def _square(self, node: Node, given: float, squares: Mapping[int, float]) -> float | None:
        if is_weighted_call(node):
            if node.path not in self.knobs:
                return given * _energy(node.module)
            shortcut = self.shortcuts.get(node.path)
            if shortcut is None:
                return 1.0
            return self.share * squares.get(shortcut, self.before.get(shortcut, 1.0))
        if node.path not in self.activations or node.kind != "module":
            return None
        if not self.homogeneous:
            return 1.0
        if node.path not in self.kept and abs(given - 1) > 1e-9:
            self.kept[node.path] = 1 / given
        return given * self.kept.get(node.path, 1.0)

    def input_scales(self, found: Flow) -> dict[str, float]:
        """What every activation divides its input by."""
        scales: dict[str, float] = {}
        for path in self.activations:
            given = [found.square[node.inputs[0]] for node in self.graph.calls(path)]
            if self.homogeneous:
                scales[path] = math.sqrt(self.kept.get(path, 1.0))
            elif max(given) - min(given) > 1e-6 * max(given):
                shown = ", ".join(f"{q:.3g}" for q in sorted(set(given)))
                raise UserError(
                    f"{path} is called where the mean square is {shown}: {self.what} needs a module of its own for "
                    "each call"
                )
            else:
                scales[path] = 1 / math.sqrt(given[0])
        return scales


def _energy(layer: Any) -> float:
    """What a layer that is left multiplies the mean square by."""
    weight = layer.weight.detach().double()
    units = layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.out_features
    return float(weight.square().sum()) / units


def promised(
    graph: Graph, found: Flow, modules: Mapping[str, TailoredActivation], cosine: float
) -> dict[int, dict[str, float]]:
    maps: dict[tuple[Any, ...], Callable[[float], float]] = {}

    def local(index: int, c: float) -> float:
        module = modules.get(graph.nodes[index].path)
        if module is None:
            return c
        inner = module.activation
        if isinstance(inner, nn.LeakyReLU) and module.input_shift == module.output_shift == 0:
            return float(leaky_relu_map(c, inner.negative_slope))
        at_one = math.sqrt(found.square[graph.nodes[index].inputs[0]])
        key = (id(inner), module.input_scale * at_one)
        if key not in maps:
            unit = TailoredActivation(
                inner,
                module.input_scale * at_one,
                module.input_shift,
                module.output_shift,
                module.output_scale,
            )
            maps[key] = lambda c: float(c_map(unit, c))
        return maps[key](c)

    cosines = found.values(cosine, local) if math.isfinite(cosine) else {}
    return {
        index: {"promised": math.sqrt(square), "promised_cosine": cosines.get(index, math.nan)}
        for index, square in found.square.items()
    }


def unmixed(graph: Graph, found: Flow) -> list[str]:
    """Activations that read what another put out, with no weighted layer between: post-activation streams."""
    bent: dict[int, bool] = {}
    paths: dict[str, None] = {}
    for index, op in found.ops.items():
        node = graph.nodes[index]
        bent[index] = any(bent[i] for i in op.inputs) and not is_weighted_call(node)
        if op.kind == "activate":
            if bent[index]:
                paths[node.path] = None
            bent[index] = True
    return list(paths)
