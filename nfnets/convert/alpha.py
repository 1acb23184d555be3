"""α: how large a residual branch is beside the stream that it is added to. The one place for that rule."""

from __future__ import annotations

import math

from torch import nn

from nfnets.convert.sites import main_ends
from nfnets.errors import UserError
from nfnets.graph import Graph, Join
from nfnets.trace import is_batch_norm_like

LEAST = 0.3
"""α for any number of branches: BatchNorm's own stream grows to √(1 + L), which √(2/L) alone falls far behind of."""


def check_alpha(alpha: float | None) -> None:
    """UserError unless α is None or in (0, 1]."""
    if alpha is not None and not 0 < alpha <= 1:
        raise UserError(f"alpha={alpha}: expected a number above 0 and at most 1; pass alpha=0.2")


def branch_scales(model: nn.Module, graph: Graph, alpha: float | None) -> dict[int, float]:
    """The factor that the last norm or weighted layers of every residual branch get.

    α, or √(2/L), at most 1, for L branches that are added to the same stream one after the other: all of them
    together then add twice the variance that it starts with (docs/experiments.md, "α"). From L = 23 on it is 0.3, so
    that the stream stays within a factor 3.4 of BatchNorm's, √((1 + L)/(1 + 0.09 L)), at any depth. Branches inside a
    branch are added to a stream of their own. A branch that a parameter no larger than α scales already (layer scale)
    keeps that scale, unless `alpha` is given. An end of several branches gets the product.

    Args:
        model: the model with its norm layers.
        graph: its graph.
        alpha: None for √(2/L), at least 0.3.

    Returns:
        Factors by node; nodes without one are 1.
    """
    scales: dict[int, float] = {}
    lengths = _stream_lengths(graph)
    for join in graph.joins:
        factor = alpha or min(1.0, max(LEAST, math.sqrt(2 / max(1, lengths.get(join.node, 1)))))
        if alpha is None and _layer_scale(model, graph, join) <= factor:
            factor = 1.0
        for index, share in main_ends(graph, join).items():
            scales[index] = scales.get(index, 1.0) * factor * share
    return scales


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


def _stream_lengths(graph: Graph) -> dict[int, int]:
    """For each join L: the most branches in a row on its stream, those with norm layers or with ours."""
    counted = [join for join in graph.joins if any(_scaled_here(graph, i) for i in join.branch_nodes)]
    streams: dict[int | None, list[Join]] = {}
    for join in counted:
        around = [other for other in counted if _inside(graph, join, other)]
        parent = max(around, key=lambda other: other.split).node if around else None
        streams.setdefault(parent, []).append(join)
    lengths: dict[int, int] = {}
    for joins in streams.values():
        row: dict[int, int] = {}
        for join in joins:
            row[join.node] = 1 + max(
                (n for node, n in row.items() if graph.depends(join.node, node)), default=0
            )
        lengths |= dict.fromkeys(row, max(row.values()))
    return lengths


def _inside(graph: Graph, join: Join, other: Join) -> bool:
    """Whether `join` happens on the branch of `other`."""
    return other.split < join.node < other.node and graph.depends(other.branch, join.node)


def _scaled_here(graph: Graph, index: int) -> bool:
    module = graph.nodes[index].module
    return module is not None and (is_batch_norm_like(module) or "calibrated" in vars(module))
