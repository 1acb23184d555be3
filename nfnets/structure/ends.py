"""Where a residual branch ends.

Two answers to two questions. `ends_since`: the last norm or weighted layers, whose output is the branch's but for a
gate or an activation: what is measured and scaled there is the branch's scale. `scalar_places`: the modules, of
whatever kind, behind which one scalar multiplies the whole branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from nfnets.graph import Graph, Join, Node
from nfnets.structure.walk import is_norm, is_weighted, kills, name_of, through, walk

_SMOOTH = {"gelu", "silu", "swish", "hardswish", "mish", "elu", "celu", "selu", "tanh", "leakyrelu", "prelu"}
"""Activations that are 0 at 0 and have a slope there."""
_MOVING = ("pool", "pad", "flatten", "upsample", "shuffle", "fold", "identity", "dropout", "droppath")
_SUMS = {"add", "sub", "cat", "stack"}
_PRODUCTS = {"matmul", "bmm", "einsum", "scaled_dot_product_attention"}


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
    """The modules that end a branch, or an obstacle: what was met first on the way back."""
    beside: set[int] = set()  # shortcuts of branches inside
    obstacles: list[str] = []
    ends: list[int] = []

    def onward(node: Node) -> list[int] | None:
        if node.index == join.split and node.index not in beside:
            obstacles.append("what is added contains the shortcut itself")
        if node.index <= join.split or not graph.depends(node.index, join.split):
            return None
        if node.index in inner:
            beside.add(inner[node.index].shortcut)
            return [inner[node.index].shortcut]
        if node.kind == "module" and not _walks(node):
            ends.append(node.index)
            return []
        if kills(node):
            obstacles.append(f"the branch ends in a functional {node.name}")
            return []
        return _before(graph, node)

    walk(graph, [join.branch], onward)
    return ([], obstacles[0]) if obstacles else (sorted(ends), "")


def _walks(node: Node) -> bool:
    name = name_of(node)
    return name in _SMOOTH or isinstance(node.module, nn.Identity) or any(part in name for part in _MOVING)


def _before(graph: Graph, node: Node) -> list[int]:
    if node.name in _PRODUCTS:
        return list(node.inputs[-1:])
    sources = through(graph, node)
    return sources if node.name in _SUMS or node.name == "mul" else sources[:1]


def main_ends(graph: Graph, join: Join) -> dict[int, float]:
    """The last norm or weighted layers of a branch, and each one's share of the branch's scale: see `ends_since`."""
    inner = {other.node: other for other in graph.joins if join.split < other.node < join.node}
    return ends_since(graph, join.branch_end, join.split, inner) or {join.branch_end: 1.0}


def ends_since(graph: Graph, end: int, split: int, inner: Mapping[int, Join]) -> dict[int, float]:
    """The last norm or weighted layers before a node and after another, and each one's share of the first's scale.

    They are found through gates and activations: a squeeze-excite product is followed along the operand of its own
    shape, not along the gate. Of a sum of k parallel paths (RepVGG) each has 1/√k; of a concatenation, and of the
    stream and the branch at a residual join in between (`inner`, by node), all are ends.
    """
    ends: dict[int, float] = {}
    waiting = [(end, 1.0)]
    while waiting:
        index, share = waiting.pop()
        node = graph.nodes[index]
        if index <= split or not graph.depends(index, split):
            continue
        if is_norm(node) or is_weighted(node.module):
            ends[index] = share
            continue
        same = [i for i in node.inputs if graph.nodes[i].shape == node.shape]
        if index in inner:
            follow = [inner[index].shortcut, inner[index].branch]
        elif node.name == "add":
            follow = list(dict.fromkeys(same))
            share /= math.sqrt(max(1, len(follow)))
        else:
            follow = list(node.inputs) if node.name == "cat" else list((same or node.inputs)[:1])
        waiting += [(i, share) for i in follow]
    return ends
