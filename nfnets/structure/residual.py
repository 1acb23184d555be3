"""What Fixup and SkipInit need of a residual network's graph: branches, their layers in order, the classifier."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from nfnets.errors import UserError
from nfnets.scale.knob import is_weight_layer
from nfnets.skip_layers import SCALAR
from nfnets.structure.ends import scalar_places
from nfnets.structure.readers import heads
from nfnets.structure.walk import kills, through, walk
from nfnets.trace import Graph, Join, Node


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch. Gates (squeeze-excite) multiply it from the side and are not on it.

    Branches inside it are branches of their own: a layer belongs to the innermost branch that it lies on.
    """

    path: str
    """Of the module that adds it to the shortcut, e.g. `layer1.0`."""
    inner: tuple[str, ...]
    """Weight layers that others of the branch follow."""
    last: tuple[str, ...]
    """Weight layers that none follows: one, or the last of each parallel path."""
    depth: int
    """m: weight layers on the longest path through the branch."""
    gates: tuple[str, ...]
    multipliers: tuple[str, ...]
    """One-element parameters that multiply the branch in or after its last weight layers."""
    ends: tuple[str, ...]
    """Modules whose outputs, times a scalar each, are the branch times that scalar."""
    obstacle: str
    """Why there are no such modules; empty if there are."""
    clipped: bool
    """Whether an activation without slope at 0 follows the last weight layer, so that a layer of zeros never learns."""
    nodes: frozenset[int]
    join: Join


@dataclass(frozen=True, slots=True)
class Residual:
    """A residual network as the initializers see it."""

    graph: Graph
    branches: tuple[Branch, ...]
    head: tuple[str, ...]
    """Weight layers that nothing but the output follows, outside every branch."""
    others: tuple[str, ...]
    """Every other weight layer in execution order: stem, shortcuts, hidden layers of the head."""
    scalar_biases: tuple[str, ...]
    """One-element parameters that are added to a tensor, anywhere."""
    scalar_multipliers: tuple[str, ...]


def residual_of(model: nn.Module, graph: Graph, what: str, layers: Collection[str] | None = None) -> Residual:
    """The residual branches of a traced model, with norm layers or without.

    A sum of two streams is no residual branch: where branches lie on one side of it and weight layers on the other
    (feature pyramids, the exchange between resolutions of HRNet).

    Args:
        model: the model that was traced.
        graph: its graph.
        what: who asks, for the error messages.
        layers: paths of the weight layers to look at; None for all. A branch with none of them is left out.

    Returns:
        Branches in execution order, and the layers outside them.

    Raises:
        UserError: no residual branch, or a layer with two roles.
    """
    found = _own_nodes(graph)
    if not found:
        raise UserError(
            f"{type(model).__name__} has no residual branch: {what} scales branches that are added to a shortcut; "
            "use LSUV for a network without them (the method lsuv, or nfnets.init.lsuv_)"
        )
    placed = scalar_places(graph, [join for join, _ in found])
    branches = tuple(_branch(graph, join, own, *placed[join.node]) for join, own in found)
    head = _head(graph, {join.node for join, _ in found})
    on_branch = {path for b in branches for path in (*b.inner, *b.last, *b.gates)}
    wanted = dict.fromkeys(node.path for node in graph.nodes if is_weight_node(node))
    if layers is not None:
        branches = tuple(b for b in branches if any(path in layers for path in (*b.inner, *b.last)))
        wanted = {path: None for path in wanted if path in layers}
    head = tuple(path for path in head if path not in on_branch and path in wanted)
    others = tuple(path for path in wanted if path not in on_branch and path not in head)
    roles = {path for b in branches for path in b.inner} & {path for b in branches for path in b.last}
    if roles:
        raise UserError(
            f"{', '.join(sorted(roles))} is both inside a branch and at the end of one: {what} cannot set it"
        )
    return Residual(
        graph, branches, head, others, _scalars(graph, model, "add"), _scalars(graph, model, "mul")
    )


def has_branches(graph: Graph) -> bool:
    """Whether a graph has a residual branch with weight layers of its own."""
    return bool(_own_nodes(graph))


def _own_nodes(graph: Graph) -> list[tuple[Join, set[int]]]:
    """Residual joins with weight layers of their own, and each branch's nodes less those of branches inside it."""
    found: list[tuple[Join, set[int]]] = []
    for join in graph.joins:
        on_path = _on_path(graph, join)
        nested = [own for other, own in found if other.node in on_path]
        if nested and any(is_weight_node(graph.nodes[i]) for i in join.shortcut_nodes):
            continue
        own = on_path.difference(*nested)
        if any(is_weight_node(graph.nodes[i]) for i in own):
            found.append((join, own))
    return found


def is_weight_node(node: Node) -> bool:
    return node.kind == "module" and node.module is not None and is_weight_layer(node.module)


def _on_path(graph: Graph, join: Join) -> set[int]:
    """Nodes between the split and the join's branch operand, less what only gates the branch."""

    def onward(node: Node) -> list[int] | None:
        between = node.index != join.split and graph.depends(node.index, join.split)
        return through(graph, node) if between else None

    return set(walk(graph, [join.branch], onward))


def _branch(graph: Graph, join: Join, own: set[int], ends: tuple[str, ...], obstacle: str) -> Branch:
    order = sorted(_on_path(graph, join))
    weights = [index for index in order if index in own and is_weight_node(graph.nodes[index])]
    followed: set[int] = set()  # nodes with a weight layer of the branch after them
    for index in reversed(order):
        if index in followed or index in weights:
            followed.update(i for i in through(graph, graph.nodes[index]))
    depth: dict[int, int] = {}
    for index in order:
        before = max((depth.get(i, 0) for i in through(graph, graph.nodes[index])), default=0)
        depth[index] = before + (index in weights)
    beside = {i for i in join.branch_nodes if is_weight_node(graph.nodes[i])} - set(order)
    inside = {i for other in graph.joins if other.node in own and other != join for i in other.branch_nodes}
    after = [graph.nodes[i] for i in order if i in own and i not in followed]
    return Branch(
        path=graph.nodes[join.node].path,
        inner=_paths(graph, [i for i in weights if i in followed]),
        last=_paths(graph, [i for i in weights if i not in followed]),
        depth=depth[join.branch],
        gates=_paths(graph, sorted(beside - inside)),
        multipliers=tuple(dict.fromkeys(name for node in after for name in _multipliers(node))),
        ends=ends,
        obstacle=obstacle,
        clipped=any(kills(node) for node in after),
        nodes=frozenset(own),
        join=join,
    )


def _multipliers(node: Node) -> list[str]:
    if node.kind == "function":
        return list(node.params) if node.name == "mul" and node.rescales else []
    return [name for name in node.params if name.rpartition(".")[2] == SCALAR]


def _paths(graph: Graph, indices: list[int]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(graph.nodes[i].path for i in indices))


def _head(graph: Graph, joins: set[int]) -> tuple[str, ...]:
    """The layers that make the outputs; none where a join comes first (a model without classifier)."""
    return _paths(
        graph, [node.index for node in heads(graph, is_weight_node, lambda node: node.index in joins)]
    )


def _scalars(graph: Graph, model: nn.Module, operation: str) -> tuple[str, ...]:
    names = [
        n for node in graph.nodes if node.kind == "function" and node.name == operation for n in node.params
    ]
    return tuple(n for n in dict.fromkeys(names) if model.get_parameter(n).numel() == 1)
