"""What Fixup and SkipInit need of a residual network's graph: branches, their layers in order, the classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nfnets.errors import UserError
from nfnets.init.knob import is_weight_layer
from nfnets.init.one_pass import check
from nfnets.trace import Graph, Join, Node, is_batch_norm_like, trace

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch. Gates (squeeze-excite) multiply it from the side and are not on it."""

    path: str
    """Of the module that adds it to the shortcut, e.g. `layer1.0`."""
    inner: tuple[str, ...]
    """Weight layers that others on the branch follow."""
    last: tuple[str, ...]
    """Weight layers that none follows: one, or the last of each parallel path."""
    depth: int
    """m: weight layers on the longest path through the branch."""
    gates: tuple[str, ...]
    multipliers: tuple[str, ...]
    """One-element parameters that multiply the branch after its last weight layer."""
    ends_in_last: bool
    """Whether nothing but constants, dropout and stochastic depth follows the last weight layer."""
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


def read_residual(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> Residual:
    """Trace the model and find its residual branches.

    Args:
        model: a residual network without norm layers.
        inputs, kwargs: what its forward takes.
        what: who asks, for the error messages.

    Returns:
        Branches in execution order, and the layers outside them.

    Raises:
        UserError: norm layers, no residual branch, branches inside branches, or a layer with two roles.
    """
    check(model, inputs, kwargs)
    graph = trace(model, *inputs, **kwargs)
    _refuse_norms(graph, what)
    return residual_of(model, graph, what)


def residual_of(model: nn.Module, graph: Graph, what: str) -> Residual:
    """The residual branches of a traced model, with norm layers or without.

    Args:
        model: the model that was traced.
        graph: its graph.
        what: who asks, for the error messages.

    Returns:
        Branches in execution order, and the layers outside them.

    Raises:
        UserError: no residual branch, branches inside branches, or a layer with two roles.
    """
    joins = [join for join in graph.joins if any(_weight(graph.nodes[i]) for i in join.branch_nodes)]
    if not joins:
        raise UserError(
            f"{type(model).__name__} has no residual branch: {what} scales branches that are added to a shortcut; "
            "use lsuv_ for a network without them"
        )
    _refuse_other_norms(graph, what, joins)
    branches = []
    for join in joins:
        on_path = _on_path(graph, join)
        for other in joins:
            if other is not join and other.node in on_path:
                inside, outside = (graph.nodes[j.node].path or "the root" for j in (other, join))
                raise UserError(
                    f"residual branches inside a residual branch ({inside} in {outside}): {what} is defined for one "
                    "level of branches; use lsuv_ or another conversion method"
                )
        branches.append(_branch(graph, join, on_path))
    head = _head(graph, {join.node for join in joins})
    on_branch = {path for b in branches for path in (*b.inner, *b.last, *b.gates)}
    head = tuple(path for path in head if path not in on_branch)
    layers = dict.fromkeys(node.path for node in graph.nodes if _weight(node))
    others = tuple(path for path in layers if path not in on_branch and path not in head)
    roles = {path for b in branches for path in b.inner} & {path for b in branches for path in b.last}
    if roles:
        raise UserError(
            f"{', '.join(sorted(roles))} is both inside a branch and at the end of one: {what} cannot set it"
        )
    return Residual(
        graph, tuple(branches), head, others, _scalars(graph, model, "add"), _scalars(graph, model, "mul")
    )


def _weight(node: Node) -> bool:
    return node.kind == "module" and node.module is not None and is_weight_layer(node.module)


def _refuse_norms(graph: Graph, what: str) -> None:
    norms = [node.path for node in graph.nodes if node.module is not None and is_batch_norm_like(node.module)]
    if norms:
        raise UserError(
            f"the model normalizes at {_shown(norms)}: {what} is for networks without norm layers; "
            f"convert it first, nfnets.convert(model, images, method={what.lower()!r})"
        )


def _refuse_other_norms(graph: Graph, what: str, joins: list[Join]) -> None:
    """Layer and group norms undo what the initializer sets, but for one in the head."""
    last = max(join.node for join in joins)
    others = [node for node in graph.nodes if isinstance(node.module, _NORMS)]
    norms = [n.path for n in others if not is_batch_norm_like(n.module) and graph.depends(last, n.index)]  # type: ignore[arg-type]
    if norms:
        raise UserError(
            f"the model normalizes at {_shown(norms)}: {what} is for residual branches without norm layers; "
            "use another conversion method"
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
        waiting += _through(graph, graph.nodes[index])
    return seen


def _through(graph: Graph, node: Node) -> list[int]:
    """The inputs that carry the signal: of a product only the largest, the rest are gates."""
    sources = list(dict.fromkeys(node.inputs))
    if node.kind == "function" and node.name == "mul" and len(sources) > 1:
        sizes = {i: _numel(graph.nodes[i]) for i in sources}
        largest = [i for i in sources if sizes[i] == max(sizes.values())]
        return (
            largest if len(largest) == 1 else [i for i in largest if not _squashes(graph.nodes[i])] or largest
        )
    return sources


def _numel(node: Node) -> int:
    size = 1
    for extent in node.shape:
        size *= extent
    return size


def _squashes(node: Node) -> bool:
    name = type(node.module).__name__.lower() if node.module is not None else node.name
    return "sigmoid" in name or "softmax" in name or name in ("tanh",)


def _branch(graph: Graph, join: Join, on_path: set[int]) -> Branch:
    order = sorted(on_path)
    followed: set[int] = set()  # nodes with a weight layer after them on the branch
    for index in reversed(order):
        if index in followed or _weight(graph.nodes[index]):
            followed.update(i for i in _through(graph, graph.nodes[index]) if i in on_path)
    depth: dict[int, int] = {}
    for index in order:
        before = max((depth.get(i, 0) for i in _through(graph, graph.nodes[index])), default=0)
        depth[index] = before + _weight(graph.nodes[index])
    weights = [index for index in order if _weight(graph.nodes[index])]
    gates = [i for i in join.branch_nodes if _weight(graph.nodes[i]) and i not in on_path]
    tail = [graph.nodes[i] for i in order if i not in followed and not _weight(graph.nodes[i])]
    return Branch(
        path=graph.nodes[join.node].path,
        inner=_paths(graph, [i for i in weights if i in followed]),
        last=_paths(graph, [i for i in weights if i not in followed]),
        depth=depth[join.branch],
        gates=_paths(graph, gates),
        multipliers=tuple(
            name for node in tail if node.name == "mul" and node.rescales for name in node.params
        ),
        ends_in_last=_weight(graph.nodes[join.branch_end]),
        join=join,
    )


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
    return _paths(graph, sorted(found))


def _scalars(graph: Graph, model: nn.Module, operation: str) -> tuple[str, ...]:
    names = [
        n for node in graph.nodes if node.kind == "function" and node.name == operation for n in node.params
    ]
    return tuple(n for n in dict.fromkeys(names) if model.get_parameter(n).numel() == 1)
