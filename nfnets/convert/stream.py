"""How large a stream must start where the branches that are added to it start at zero and never refill it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nfnets.activations import resolve
from nfnets.convert.fused import activation_of
from nfnets.convert.reference import Reference
from nfnets.errors import UserError
from nfnets.graph import Graph, Join, Node
from nfnets.predict import activation_at
from nfnets.structure.walk import is_norm, is_weighted, through

MARGIN = 3.0
"""How far the stream may be from the BatchNorm model's at a join."""


def stream_targets(
    graph: Graph,
    joins: Iterable[Join],
    layers: Collection[str],
    reference: Reference,
    what: str,
    constants: Collection[int] = (),
) -> dict[str, float]:
    """Standard deviations, by path, of the layers that a stream starts with.

    BatchNorm's stream grows with every branch, to √(1 + L); one whose branches start at zero is what the activations on
    it make of its start, a normal signal: they are applied to quantiles of it at every scale of a grid. Gates take a
    share for good, as they do of BatchNorm's. A stream starts at 1, unless that is further than `MARGIN` below or above
    what BatchNorm's is at one of its joins; where BatchNorm's grows too much for any start, half way between its ends.

    Args:
        graph: of the model with its norm layers.
        joins: the joins of branches that start at zero.
        layers: paths of the layers that streams start with.
        reference: what was measured on the model.
        what: the method, for the error message.
        constants: nodes of norm layers where constants will stand: streams start anew there, at 1.

    Raises:
        UserError: no start will do, since gates shrink the stream too much between its first and its last join.
    """
    shortcuts = {join.node: join.shortcut for join in joins}
    levels: list[_Level] = []
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    shares: dict[str, list[float]] = {}
    for node in graph.nodes:
        sources = [shortcuts[node.index]] if node.index in shortcuts else through(graph, node)
        level = levels[sources[0]] if sources else _Level("")
        if is_weighted(node.module) or node.index in constants:
            level = _Level(node.path if node.path in layers else "")
        elif node.name in ("mul", "div") and sources:
            share = _share(reference.at(node.index), reference.at(sources[0]))
            level = replace(level, values=level.values * share, gated=level.gated * share)
        elif level.origin:
            level = replace(level, values=_activated(node, level.values))
        levels.append(level)
        wanted, path = reference.at(node.index), level.origin
        if node.index in shortcuts and path and wanted > 0:
            least[path] = max(least.get(path, 0.0), level.start(wanted / MARGIN))
            most[path] = min(most.get(path, math.inf), level.start(wanted * MARGIN))
            shares.setdefault(path, []).append(level.gated)
    starts = {}
    for path, low in least.items():
        high = most[path]
        if low > high and (lost := max(shares[path]) / min(shares[path])) > MARGIN:
            raise UserError(
                f"the trunk does not keep its size by itself: gates on it shrink what {path} starts, by a "
                f"factor {lost:.0f}, and {what}'s branches start at zero; use nf or lsuv"
            )
        starts[path] = min(max(1.0, low), high) if low <= high else math.sqrt(low * high)
    return starts


_STARTS = 2.0 ** torch.arange(-20, 20.01, 0.5)
_NORMAL = torch.special.ndtri((torch.arange(256) + 0.5) / 256)


@dataclass(frozen=True)
class _Level:
    """A stream of branches that are zero."""

    origin: str
    """Path of the layer that starts it; empty if that is none of those to set."""
    values: Tensor = _STARTS[:, None] * (_NORMAL / _NORMAL.square().mean().sqrt())
    """Quantiles of it for every start, (starts, quantiles)."""
    gated: float = 1.0
    """What gates have left of it."""

    def start(self, wanted: float) -> float:
        """Standard deviation of the start from which it has this root mean square here."""
        found = self.values.square().mean(1).sqrt().clamp_min(1e-30).log().cummax(0).values
        reached = min(math.log(wanted), float(found[-1]) - 0.05)  # a stream may saturate (ReLU6)
        return float(np.exp(np.interp(reached, found.numpy(), _STARTS.log().numpy())))


def _activated(node: Node, values: Tensor) -> Tensor:
    activation = (
        activation_of(node.module) if node.module is not None and is_norm(node) else activation_at(node)
    )
    if activation is None:
        return values
    own = list(activation.parameters()) if isinstance(activation, nn.Module) else []
    if any(parameter.is_meta for parameter in own):
        return values
    function = resolve(activation).fn
    if not own:
        return function(values).to(values.dtype)
    # A slope per channel (PReLU): every channel sees the same quantiles, and their mean goes on.
    channels, *space = node.shape[1:] or (1,)
    with torch.no_grad():
        rows = [
            row.reshape(-1, 1, *(1 for _ in space)).expand(-1, channels, *(1 for _ in space))
            for row in values
        ]
        return torch.stack([function(row.double()).flatten(1).mean(1) for row in rows]).to(values.dtype)


def _share(after: float, before: float) -> float:
    return after / before if before > 0 and after > 0 else 1.0
