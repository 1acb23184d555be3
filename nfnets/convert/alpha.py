"""α: how large a branch is beside the stream that it is added to, or put beside. The one place for that rule."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from nfnets.errors import UserError
from nfnets.graph import Graph
from nfnets.structure.ends import ends_since, main_ends
from nfnets.structure.streams import dense_branches, layer_scale, start_of, stream_lengths

FURTHEST = 3.0
"""How far a stream may fall behind BatchNorm's, √(1 + k) after k branches, before it starts higher."""


def check_alpha(alpha: float | None) -> None:
    """UserError unless α is None or in (0, 1]."""
    if alpha is not None and not 0 < alpha <= 1:
        raise UserError(f"alpha={alpha}: expected a number above 0 and at most 1; pass alpha=0.2")


def rule(branches: float) -> float:
    """α for so many branches in a row.

    Clipping bounds what a step changes in a branch by a share of it, whatever the depth, and the changes of all
    branches point the same way: they add up to L · α, which must not grow with L. In short nets the branches'
    variance, L · α², is what decides.

    Example:
        >>> [round(rule(branches), 3) for branches in (1, 8, 18, 54, 500)]
        [1.0, 0.5, 0.333, 0.111, 0.012]
    """
    return min(1.0, math.sqrt(2 / branches), 6 / branches)


def note(factor: float) -> str:
    """What a plan says of a factor from `branch_scales`.

    Example:
        >>> note(0.5), note(1.0), note(1.62)
        (', α=0.5', '', ', starts the trunk at 1.62')
    """
    if factor == 1:
        return ""
    return f", α={factor:.3g}" if factor < 1 else f", starts the trunk at {factor:.3g}"


def branch_scales(model: nn.Module, graph: Graph, alpha: float | None) -> dict[int, float]:
    """The factor that the last norm or weighted layers of every branch get.

    α, or min(√(2/L), 6/L), at most 1, for L branches that are added one after the other (docs/experiments.md, "α"):
    up to 18 of them together add twice the variance that the stream starts with; of more, what a step changes in each
    adds up to no more. Branches inside a branch are added to a stream of their own. A branch that a parameter
    no larger than α scales already (layer scale) keeps that scale, unless `alpha` is given. An end of several branches
    gets the product.

    What a DenseNet's layers put beside their input are branches, too, those of a block in a row
    (docs/experiments.md, "Concatenations").

    BatchNorm's stream grows to √(1 + k) over the k branches between two norm layers on it. A long one of ours
    starts higher, and its branches with it, so that it stays within a factor 3 and their ratio as it is.

    Args:
        model: the model with its norm layers.
        graph: its graph.
        alpha: None for min(√(2/L), 6/L), at most 1.

    Returns:
        Factors by node; nodes without one are 1.
    """
    lengths = stream_lengths(graph)
    factors: dict[int, float] = {}
    for join in graph.joins:
        factor = alpha or rule(lengths.get(join.node, 1))
        own = alpha is None and layer_scale(model, graph, join) <= factor
        factors[join.node] = 1.0 if own else factor
    scales, lifts = _lifts(graph, {} if alpha else {n: f for n, f in factors.items() if n in lengths})
    for join in graph.joins:
        for index, share in main_ends(graph, join).items():
            scales[index] = scales.get(index, 1.0) * factors[join.node] * lifts.get(join.node, 1.0) * share
    return scales | _dense_scales(graph, scales, alpha)


def _dense_scales(graph: Graph, scales: Mapping[int, float], alpha: float | None) -> dict[int, float]:
    """The factors of what ends the layers of a DenseNet: L is how many of them the largest concatenation holds."""
    found: dict[int, float] = {}
    splits, lengths = dense_branches(graph)
    for index, split in splits.items():
        for end, share in ends_since(graph, index, split, {}).items():
            found[end] = found.get(end, scales.get(end, 1.0)) * (alpha or rule(lengths[index])) * share
    return found


def _lifts(graph: Graph, factors: dict[int, float]) -> tuple[dict[int, float], dict[int, float]]:
    """How much higher streams start: by the norm layer that starts one, and by the joins on it."""
    joins = {join.node: join for join in graph.joins}
    streams: dict[int, list[int]] = {}
    for node, factor in factors.items():
        start = start_of(graph, joins, node)
        if start is not None and factor < 1:
            streams.setdefault(start, []).append(node)
    starts: dict[int, float] = {}
    branches: dict[int, float] = {}
    for start, nodes in streams.items():
        ours = 1 + sum(factors[node] ** 2 for node in nodes)
        lift = max(1.0, math.sqrt((1 + len(nodes)) / ours) / FURTHEST)
        if lift > 1:
            starts[start] = lift
            branches |= dict.fromkeys(nodes, lift)
    return starts, branches
