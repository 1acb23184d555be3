"""What Fixup and SkipInit need of a residual network's graph: branches, their layers in order, the classifier."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nfnets.errors import UserError
from nfnets.init.skip_layers import SCALAR
from nfnets.scale.knob import is_weight_layer
from nfnets.scale.one_pass import check
from nfnets.structure.ends import kills, scalar_places, through
from nfnets.trace import Graph, Join, Node, is_batch_norm_like, tensors_in, trace


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


def read_residual(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    what: str,
    layers: Collection[str] | None = None,
) -> Residual:
    """Trace the model and find its residual branches.

    Args:
        model: a residual network without batch norm layers.
        inputs, kwargs: what its forward takes.
        what: who asks, for the error messages.
        layers: as for `residual_of`; with them norm layers may stay elsewhere.

    Returns:
        Branches in execution order, and the layers outside them.

    Raises:
        UserError: norm layers, no residual branch, or a layer with two roles.
    """
    check(model, inputs, kwargs)
    graph = _graph(model, inputs, kwargs)
    if layers is None:
        _refuse_norms(graph, what)
    return residual_of(model, graph, what, layers)


def _graph(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """The model's graph on two samples of the batch, if it takes them: only shapes matter."""
    if len({t.shape[:1] for t in tensors_in(inputs, kwargs)}) == 1:
        few, named = tree_map_only(Tensor, lambda t: t[:2] if t.ndim else t, (inputs, kwargs))
        try:
            return trace(model, *few, **named)
        except UserError:  # what was cut is no batch
            pass
    return trace(model, *inputs, **kwargs)


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
    wanted = dict.fromkeys(node.path for node in graph.nodes if _weight(node))
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


def _own_nodes(graph: Graph) -> list[tuple[Join, set[int]]]:
    """Residual joins with weight layers of their own, and each branch's nodes less those of branches inside it."""
    found: list[tuple[Join, set[int]]] = []
    for join in graph.joins:
        on_path = _on_path(graph, join)
        nested = [own for other, own in found if other.node in on_path]
        if nested and any(_weight(graph.nodes[i]) for i in join.shortcut_nodes):
            continue
        own = on_path.difference(*nested)
        if any(_weight(graph.nodes[i]) for i in own):
            found.append((join, own))
    return found


def _weight(node: Node) -> bool:
    return node.kind == "module" and node.module is not None and is_weight_layer(node.module)


def _refuse_norms(graph: Graph, what: str) -> None:
    norms = [node.path for node in graph.nodes if node.module is not None and is_batch_norm_like(node.module)]
    if norms:
        raise UserError(
            f"the model normalizes at {_shown(norms)}: {what} is for networks without norm layers; "
            f"convert it first, nfnets.convert(model, images, method={what.lower()!r})"
        )


def _shown(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f", … ({len(paths)} in all)" if len(paths) > 3 else "")


def _on_path(graph: Graph, join: Join) -> set[int]:
    """Nodes between the split and the join's branch operand, less what only gates the branch."""
    seen: set[int] = set()
    waiting = [join.branch]
    while waiting:
        index = waiting.pop()
        if index in seen or index == join.split or not graph.depends(index, join.split):
            continue
        seen.add(index)
        waiting += through(graph, graph.nodes[index])
    return seen


def _branch(graph: Graph, join: Join, own: set[int], ends: tuple[str, ...], obstacle: str) -> Branch:
    order = sorted(_on_path(graph, join))
    weights = [index for index in order if index in own and _weight(graph.nodes[index])]
    followed: set[int] = set()  # nodes with a weight layer of the branch after them
    for index in reversed(order):
        if index in followed or index in weights:
            followed.update(i for i in through(graph, graph.nodes[index]))
    depth: dict[int, int] = {}
    for index in order:
        before = max((depth.get(i, 0) for i in through(graph, graph.nodes[index])), default=0)
        depth[index] = before + (index in weights)
    beside = {i for i in join.branch_nodes if _weight(graph.nodes[i])} - set(order)
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
    """The last weight layers before the outputs; none where a join comes first (a model without classifier)."""
    seen: set[int] = set()
    found: list[int] = []
    waiting = list(graph.outputs)
    while waiting:
        index = waiting.pop()
        if index in seen or index in joins:
            continue
        seen.add(index)
        if _weight(graph.nodes[index]):
            found.append(index)
        else:
            waiting += graph.nodes[index].inputs
    weights = [node.index for node in graph.nodes if _weight(node)]
    last = [i for i in found if not graph.followed(i, weights)]
    return _paths(graph, sorted(last))


def _scalars(graph: Graph, model: nn.Module, operation: str) -> tuple[str, ...]:
    names = [
        n for node in graph.nodes if node.kind == "function" and node.name == operation for n in node.params
    ]
    return tuple(n for n in dict.fromkeys(names) if model.get_parameter(n).numel() == 1)
