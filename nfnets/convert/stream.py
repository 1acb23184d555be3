"""How large a stream must start where the branches that are added to it start at zero and never refill it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from nfnets.convert.reference import Reference
from nfnets.convert.sites import is_weighted
from nfnets.errors import UserError
from nfnets.graph import Graph, Join
from nfnets.init.ends import through

MARGIN = 3.0
"""How far the stream may be from the BatchNorm model's at a join."""


def stream_targets(
    graph: Graph, joins: Iterable[Join], layers: Collection[str], reference: Reference, what: str
) -> dict[str, float]:
    """Standard deviations, by path, of the layers that a stream starts with.

    BatchNorm's stream grows with every branch, to √(1 + L); one whose branches start at zero stays as it starts, and
    every gate on it takes a share for good. A stream starts at 1, unless that is further than `MARGIN` below or above
    what BatchNorm's is at one of its joins.

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
    level: list[float] = []
    origin: list[str] = []
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    for node in graph.nodes:
        sources = [shortcuts[node.index]] if node.index in shortcuts else through(graph, node)
        kept, start = (level[sources[0]], origin[sources[0]]) if sources else (1.0, "")
        if is_weighted(node.module):
            kept, start = 1.0, node.path if node.path in layers else ""
        elif node.name in ("mul", "div") and sources:
            kept *= _share(reference.at(node.index), reference.at(sources[0]))
        level.append(kept)
        origin.append(start)
        wanted = reference.at(node.index)
        if node.index in shortcuts and start and wanted > 0 and kept > 0:
            least[start] = max(least.get(start, 0.0), wanted / kept / MARGIN)
            most[start] = min(most.get(start, math.inf), wanted / kept * MARGIN)
    for path, low in least.items():
        if low > most[path]:
            raise UserError(
                f"the stream does not keep its size by itself: gates on it shrink what {path} starts, by more than a "
                f"factor {low * MARGIN / most[path]:.0f} beside BatchNorm's, and {what}'s branches start at zero; "
                "use nf or lsuv"
            )
    return {path: min(max(1.0, low), most[path]) for path, low in least.items()}


def _share(after: float, before: float) -> float:
    return after / before if before > 0 and after > 0 else 1.0
