"""How large a stream must start where the branches that are added to it start at zero and never refill it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from nfnets.convert.reference import Reference, is_norm
from nfnets.convert.sites import is_weighted
from nfnets.errors import UserError
from nfnets.graph import Graph, Join, Node
from nfnets.init.ends import is_smooth, kills, through

MARGIN = 3.0
"""How far the stream may be from the BatchNorm model's at a join."""


def stream_targets(
    graph: Graph, joins: Iterable[Join], layers: Collection[str], reference: Reference, what: str
) -> dict[str, float]:
    """Standard deviations, by path, of the layers that a stream starts with.

    BatchNorm's stream grows with every branch, to √(1 + L); one whose branches start at zero stays as it starts but for
    the first ReLU, which takes half of its mean square, for other activations (SiLU, …), each of which takes about what
    it takes of BatchNorm's stream, and for gates, each of which takes a share for good. A stream starts at 1, unless
    that is further than `MARGIN` below or above what BatchNorm's is at one of its joins; where BatchNorm's grows too
    much for any start, half way between its ends.

    Args:
        graph: of the model with its norm layers.
        joins: the joins of branches that start at zero.
        layers: paths of the layers that streams start with.
        reference: what was measured on the model.
        what: the method, for the error message.

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
        if is_weighted(node.module):
            level = _Level(node.path if node.path in layers else "")
        elif node.name in ("mul", "div") and sources:
            share = _share(reference.at(node.index), reference.at(sources[0]))
            level = replace(level, kept=level.kept * share, gated=level.gated * share)
        elif kills(node) and not level.rectified:
            level = replace(level, kept=level.kept * math.sqrt(0.5), rectified=True)
        elif is_smooth(node) and sources:
            before = _before_fused(node) if is_norm(node) else reference.at(sources[0])
            level = replace(level, kept=level.kept * _share(reference.at(node.index), before))
        levels.append(level)
        wanted, path = reference.at(node.index) / level.kept, level.origin
        if node.index in shortcuts and path and wanted > 0:
            least[path] = max(least.get(path, 0.0), wanted / MARGIN)
            most[path] = min(most.get(path, math.inf), wanted * MARGIN)
            shares.setdefault(path, []).append(level.gated)
    starts = {}
    for path, low in least.items():
        high = most[path]
        if low > high and (lost := max(shares[path]) / min(shares[path])) > MARGIN:
            raise UserError(
                f"the stream does not keep its size by itself: gates on it shrink what {path} starts, by a "
                f"factor {lost:.0f}, and {what}'s branches start at zero; use nf or lsuv"
            )
        starts[path] = min(max(1.0, low), high) if low <= high else math.sqrt(low * high)
    return starts


@dataclass(frozen=True)
class _Level:
    """A stream of branches that are zero, relative to its start."""

    origin: str
    """Path of the layer that starts it; empty if that is none of those to set."""
    kept: float = 1.0
    gated: float = 1.0
    """What gates have left of it."""
    rectified: bool = False


def _before_fused(node: Node) -> float:
    """What an activation that is fused into a norm layer reads: root mean square γ² + β²."""
    pair = (getattr(node.module, "weight", None), getattr(node.module, "bias", None))
    square = sum(float(t.detach().float().square().mean()) for t in pair if isinstance(t, Tensor))
    return math.sqrt(square) or 1.0


def _share(after: float, before: float) -> float:
    return after / before if before > 0 and after > 0 else 1.0
