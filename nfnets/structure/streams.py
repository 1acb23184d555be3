"""The stream, what residual branches are added to, and the branches in a row on it; concatenation branches."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from nfnets.graph import Graph, Join
from nfnets.marked import measured_constant
from nfnets.structure.walk import is_norm, is_weighted, through


def start_of(graph: Graph, joins: dict[int, Join], index: int) -> int | None:
    """The norm layer that starts the stream of a join; None if there is none."""
    while graph.nodes[index].inputs:
        node = graph.nodes[index]
        if is_norm(node):
            return index
        if is_weighted(node.module):
            return None
        index = joins[index].shortcut if index in joins else through(graph, node)[0]
    return None


def layer_scale(model: nn.Module, graph: Graph, join: Join) -> float:
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


def stream_lengths(graph: Graph) -> dict[int, float]:
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
    node = graph.nodes[index]
    return is_norm(node) or (node.module is not None and measured_constant(node.module) is not None)


def dense_branches(graph: Graph) -> tuple[dict[int, int], dict[int, int]]:
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
