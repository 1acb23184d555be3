"""α: how large a branch is beside the stream that it is added to, or put beside. The one place for that rule."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from nfnets.errors import UserError
from nfnets.graph import Graph, Join
from nfnets.structure.ends import through
from nfnets.structure.sites import ends_since, is_weighted, main_ends
from nfnets.trace import is_batch_norm_like

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
        (', α=0.5', '', ', starts its stream at 1.62')
    """
    if factor == 1:
        return ""
    return f", α={factor:.3g}" if factor < 1 else f", starts its stream at {factor:.3g}"


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
    lengths = _stream_lengths(graph)
    factors: dict[int, float] = {}
    for join in graph.joins:
        factor = alpha or rule(lengths.get(join.node, 1))
        own = alpha is None and _layer_scale(model, graph, join) <= factor
        factors[join.node] = 1.0 if own else factor
    scales, lifts = _lifts(graph, {} if alpha else {n: f for n, f in factors.items() if n in lengths})
    for join in graph.joins:
        for index, share in main_ends(graph, join).items():
            scales[index] = scales.get(index, 1.0) * factors[join.node] * lifts.get(join.node, 1.0) * share
    return scales | _dense_scales(graph, scales, alpha)


def _dense_scales(graph: Graph, scales: Mapping[int, float], alpha: float | None) -> dict[int, float]:
    """The factors of what ends the layers of a DenseNet: L is how many of them the largest concatenation holds."""
    found: dict[int, float] = {}
    splits, lengths = _dense_branches(graph)
    for index, split in splits.items():
        for end, share in ends_since(graph, index, split, {}).items():
            found[end] = found.get(end, scales.get(end, 1.0)) * (alpha or rule(lengths[index])) * share
    return found


def _dense_branches(graph: Graph) -> tuple[dict[int, int], dict[int, int]]:
    """What concatenations alone read, beside something that it was computed from: the nearest such, and how many of
    its kind the largest of them holds, by node.

    Only where these are two or more. A single one is the decoder of a U-Net, which goes on from what it has computed,
    and has the skip beside it.
    """
    splits: dict[int, int] = {}
    lengths: dict[int, int] = {}
    for node in graph.nodes:
        if node.name != "cat":
            continue
        branches = {}
        for index in dict.fromkeys(node.inputs):
            before = [i for i in node.inputs if i != index and graph.depends(index, i)]
            if before and all(graph.nodes[reader].name == "cat" for reader in graph.consumers(index)):
                branches[index] = max(before)
        if len(branches) > 1:
            splits |= branches
            lengths |= {index: max(len(branches), lengths.get(index, 0)) for index in branches}
    return splits, lengths


def _lifts(graph: Graph, factors: dict[int, float]) -> tuple[dict[int, float], dict[int, float]]:
    """How much higher streams start: by the norm layer that starts one, and by the joins on it."""
    joins = {join.node: join for join in graph.joins}
    streams: dict[int, list[int]] = {}
    for node, factor in factors.items():
        start = _start(graph, joins, node)
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


def _start(graph: Graph, joins: dict[int, Join], index: int) -> int | None:
    """The norm layer that starts the stream of a join; None if there is none."""
    while graph.nodes[index].inputs:
        module = graph.nodes[index].module
        if module is not None and is_batch_norm_like(module):
            return index
        if is_weighted(module):
            return None
        index = joins[index].shortcut if index in joins else through(graph, graph.nodes[index])[0]
    return None


def _layer_scale(model: nn.Module, graph: Graph, join: Join) -> float:
    """The largest entry of a parameter that multiplies what a branch ends in; infinite without one."""
    index = join.branch_end
    while index > join.split and len(sources := graph.nodes[index].inputs) == 1:
        node = graph.nodes[index]
        if node.kind == "function" and node.name == "mul" and len(node.params) == 1:
            values = model.get_parameter(node.params[0]).detach()
            return math.inf if values.is_meta else float(values.abs().max())
        if node.params:
            break
        index = sources[0]
    return math.inf


def _stream_lengths(graph: Graph) -> dict[int, float]:
    """For each join L: the most branches in a row on its stream, those with norm layers or with ours.

    A gate on the stream itself halves what came before, as a sigmoid does at first, and so it halves their number.
    """
    counted = [join for join in graph.joins if any(_scaled_here(graph, i) for i in join.branch_nodes)]
    streams: dict[int | None, list[Join]] = {}
    for join in counted:
        around = [other for other in counted if _inside(graph, join, other)]
        parent = max(around, key=lambda other: other.split).node if around else None
        streams.setdefault(parent, []).append(join)
    lengths: dict[int, float] = {}
    for joins in streams.values():
        row: dict[int, float] = {}
        for join in joins:
            row[join.node] = 1 + _before(graph, join, row)
        lengths |= dict.fromkeys(row, max(row.values()))
    return lengths


def _before(graph: Graph, join: Join, row: Mapping[int, float]) -> float:
    """Branches in a row up to the last join on this one's shortcut, less what gates leave of them."""
    index, kept = join.shortcut, 1.0
    while index not in row:
        node = graph.nodes[index]
        if not node.inputs:
            return max((n for other, n in row.items() if graph.depends(join.node, other)), default=0)
        carried = through(graph, node)
        if node.name == "mul" and len(carried) < len(set(node.inputs)):
            kept /= 2
        index = carried[0]
    return row[index] * kept


def _inside(graph: Graph, join: Join, other: Join) -> bool:
    """Whether `join` happens on the branch of `other`."""
    return other.split < join.node < other.node and graph.depends(other.branch, join.node)


def _scaled_here(graph: Graph, index: int) -> bool:
    module = graph.nodes[index].module
    return module is not None and (is_batch_norm_like(module) or "calibrated" in vars(module))
