"""Where a residual branch ends: modules that can take a scalar for the whole branch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from nfnets.graph import Graph, Join, Node

_KILLING = {"relu", "relu6", "threshold", "hardshrink", "softshrink"}
"""Activations whose slope at 0 is 0: behind them a layer of zeros, or a scalar 0, never learns."""
_SMOOTH = {"gelu", "silu", "swish", "hardswish", "mish", "elu", "celu", "selu", "tanh", "leakyrelu", "prelu"}
"""Activations that are 0 at 0 and have a slope there."""
_MOVING = ("pool", "pad", "flatten", "upsample", "shuffle", "fold", "identity", "dropout", "droppath")
_SUMS = {"add", "sub", "cat", "stack"}
_PRODUCTS = {"matmul", "bmm", "einsum", "scaled_dot_product_attention"}


def through(graph: Graph, node: Node) -> list[int]:
    """The inputs that carry the signal: of a product only the largest, the rest are gates."""
    sources = list(dict.fromkeys(node.inputs))
    if node.kind == "function" and node.name == "mul" and len(sources) > 1:
        sizes = {i: math.prod(graph.nodes[i].shape) for i in sources}
        largest = [i for i in sources if sizes[i] == max(sizes.values())]
        return (
            largest if len(largest) == 1 else [i for i in largest if not _squashes(graph.nodes[i])] or largest
        )
    return sources


def _squashes(node: Node) -> bool:
    name = _name(node)
    return "sigmoid" in name or "softmax" in name or name == "tanh"


def _name(node: Node) -> str:
    return (type(node.module).__name__ if node.module is not None else node.name).lower()


def kills(node: Node) -> bool:
    """Whether the node is an activation without slope at 0, or a module that ends in one."""
    return _name(node) in _KILLING or flat_at_zero(getattr(node.module, "act", None))


def flat_at_zero(activation: nn.Module | None) -> bool:
    """Whether a module is an activation without slope at 0.

    Example:
        >>> flat_at_zero(nn.ReLU()), flat_at_zero(nn.SiLU()), flat_at_zero(None)
        (True, False, False)
    """
    return type(activation).__name__.lower() in _KILLING


def scalar_places(graph: Graph, joins: Sequence[Join]) -> dict[int, tuple[tuple[str, ...], str]]:
    """For every residual join the modules that end its branch, or why there are none.

    They are found backwards from the join: through sums, reshapes, gates, pooling and activations with a slope at 0,
    up to the first layer, norm or other activation on each path. At a join inside the branch only its shortcut is
    followed: the branch there has a scalar of its own.

    Args:
        graph: of the model, with norm layers or without.
        joins: the residual joins, those inside branches too.

    Returns:
        By the joins' nodes: paths of modules, and an obstacle, empty if there is none.
    """
    inner = {join.node: join for join in joins}
    found = {join.node: _ends(graph, join, inner) for join in joins}
    taken = {index for nodes, _ in found.values() for index in nodes}
    places = {}
    for node, (ends, obstacle) in found.items():
        paths = tuple(dict.fromkeys(graph.nodes[i].path for i in ends))
        again = [path for path in paths if any(call.index not in taken for call in graph.calls(path))]
        if again and not obstacle:
            obstacle = f"the module that ends the branch runs elsewhere too ({again[0]})"
        if not paths and not obstacle:
            obstacle = "no module ends the branch"
        places[node] = ((), obstacle) if obstacle else (paths, "")
    return places


def _ends(graph: Graph, join: Join, inner: dict[int, Join]) -> tuple[list[int], str]:
    found: list[int] = []
    seen: set[int] = set()
    beside: set[int] = set()  # shortcuts of branches inside
    waiting = [join.branch]
    while waiting:
        index = waiting.pop()
        node = graph.nodes[index]
        if index == join.split and index not in beside:
            return [], "what is added contains the shortcut itself"
        if index in seen or index <= join.split or not graph.depends(index, join.split):
            continue
        seen.add(index)
        if index in inner:
            waiting.append(inner[index].shortcut)
            beside.add(inner[index].shortcut)
        elif node.kind == "module" and not _walks(node):
            found.append(index)
        elif kills(node):
            return [], f"the branch ends in a functional {node.name}"
        else:
            waiting += _before(graph, node)
    return sorted(found), ""


def _walks(node: Node) -> bool:
    name = _name(node)
    return name in _SMOOTH or isinstance(node.module, nn.Identity) or any(part in name for part in _MOVING)


def _before(graph: Graph, node: Node) -> list[int]:
    if node.name in _PRODUCTS:
        return list(node.inputs[-1:])
    sources = through(graph, node)
    return sources if node.name in _SUMS or node.name == "mul" else sources[:1]
