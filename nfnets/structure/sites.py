"""Norm layers in their surroundings: what feeds each one and what role it plays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nfnets.scale.knob import channel_dim, is_complex
from nfnets.trace import Graph, Join, Node, is_batch_norm_like


@dataclass(frozen=True, slots=True)
class Site:
    """One norm layer: where it is, what it normalizes and what role it plays."""

    path: str
    norm: nn.Module
    role: str
    """stem, branch, branch end, shortcut, pre-activation, after concat, head or trunk."""
    calls: tuple[int, ...]
    """Its nodes in the graph; several if the module is shared, none if the forward never runs it."""
    feeder: Node | None
    """The convolution or linear whose output it alone reads, at every call, and whose weight nothing else reads."""
    join: Join | None
    """The residual join whose branch it ends."""
    reads: str
    """Name of what it reads: a module path or a function, for the table."""
    survives: float = 1.0
    """√(1 − p) of the dropout between its feeder and itself: with that standard deviation the feeder gives it 1."""


def source(graph: Graph, index: int) -> Node:
    """The node that really produces this one's output: identities and dropout are walked through."""
    node = graph.nodes[index]
    while _passes(node) and node.inputs:
        node = graph.nodes[node.inputs[0]]
    return node


def _passes(node: Node) -> bool:
    plain = isinstance(node.module, nn.Identity | nn.modules.dropout._DropoutNd)
    return plain and not is_hooked(node.module)


def is_hooked(module: nn.Module | None) -> bool:
    """Whether a module has forward hooks that may read or change what goes in and out."""
    return module is not None and not all(map(computes_weight, hooks_of(module)))


def hooks_of(module: nn.Module) -> list[object]:
    """A module's forward hooks, those before it too."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def computes_weight(hook: object) -> bool:
    """Whether a hook only computes a weight: pruning, the old weight norm and spectral norm."""
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


def is_weighted(module: nn.Module | None) -> bool:
    """Whether a module is a convolution or a linear layer, of real numbers."""
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and not is_complex(module)


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Batch-norm-like modules by path; one inside another (split batch norm) goes with it."""
    norms: dict[str, nn.Module] = {}
    last = None
    for path, module in model.named_modules():  # what is inside a module follows it at once
        inside = last is not None and path.startswith(f"{last}.")
        if is_batch_norm_like(module) and not inside:
            norms[path], last = module, path
    return norms


def find_sites(model: nn.Module, graph: Graph) -> list[Site]:
    """Every batch-norm-like module of the model, in execution order; those that never ran come last."""
    norms = norm_layers(model)
    ends = {end: join for join in reversed(graph.joins) for end in main_ends(graph, join)}
    sites = [_site(graph, path, norm, ends, model.training) for path, norm in norms.items()]
    return sorted(sites, key=lambda site: site.calls[0] if site.calls else len(graph))


def _site(graph: Graph, path: str, norm: nn.Module, ends: dict[int, Join], training: bool) -> Site:
    calls = graph.calls(path)
    if not calls:
        return Site(path, norm, "trunk", (), None, None, "nothing: the forward pass never runs it")
    reads = source(graph, calls[0].inputs[0]) if calls[0].inputs else calls[0]
    # Every call must read the same layer: one that reads something else keeps what it reads unfolded.
    found = [_feeder(graph, call) for call in calls]
    feeders = {node.path: node for node in found if node is not None}
    feeder = next(iter(feeders.values())) if len(feeders) == 1 and None not in found else None
    if feeder is not None and len(graph.calls(feeder.path)) != len(calls):
        feeder = None
    indices = tuple(call.index for call in calls)
    join = next((ends[index] for index in indices if index in ends), None)
    survives = (
        1.0 if feeder is None else math.prod(_survivals(graph, calls[0].inputs[0], feeder.index, training))
    )
    role = "branch end" if join else _role(graph, calls[0], reads)
    name = reads.name if calls[0].inputs else "something that no input reaches"
    return Site(path, norm, role, indices, feeder, join, name, survives)


def _survivals(graph: Graph, index: int, feeder: int, training: bool) -> Iterator[float]:
    """√(1 − p) of each dropout up to the layer that feeds it; dropout for SELU keeps the variance as it is."""
    while index > feeder:
        module: Any = graph.nodes[index].module
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and (module.training or not training)
        if drops and module.p < 1 and not isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout):
            yield math.sqrt(1 - module.p)
        index = graph.nodes[index].inputs[0]


def _feeder(graph: Graph, call: Node) -> Node | None:
    """The weighted layer whose channels `call` normalizes, if nothing else sees its output or its weight."""
    index = next(iter(call.inputs), None)
    while index is not None and len(graph.consumers(index)) == 1 and index not in graph.outputs:
        node = graph.nodes[index]
        if is_weighted(node.module):
            fits = len(node.shape) + channel_dim(node.module) == 1
            return node if fits and not graph.other_readers(node) else None
        index = node.inputs[0] if _passes(node) and node.inputs else None
    return None


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
        if node.module is not None and (is_batch_norm_like(node.module) or is_weighted(node.module)):
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


def _role(graph: Graph, call: Node, reads: Node) -> str:
    joins = graph.joins
    for join in joins:
        if call.index in join.shortcut_nodes and not any(_on_branch(other, call) for other in joins):
            return "shortcut"
    if reads.name == "cat":
        return "after concat"
    inner = max((join for join in joins if _on_branch(join, call)), key=lambda join: join.split, default=None)
    if inner is not None:
        return "branch" if reads.index > inner.split and is_weighted(reads.module) else "pre-activation"
    if not joins or call.index < joins[0].node:
        return "stem" if joins else "trunk"
    if call.index > joins[-1].node:
        return "head"
    return "trunk"


def _on_branch(join: Join, call: Node) -> bool:
    return call.index in join.branch_nodes
