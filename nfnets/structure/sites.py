"""Norm layers in their surroundings: what feeds each one and what role it plays."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from nfnets.scale.knob import channel_dim
from nfnets.structure.ends import main_ends
from nfnets.structure.laws import Law, NormKind, law_of
from nfnets.structure.norms import norm_kind, norm_layers
from nfnets.structure.walk import is_weighted, passes, source
from nfnets.trace import Graph, Join, Node, is_batch_norm_like


@dataclass(frozen=True, slots=True)
class Site:
    """One norm layer: where it is, what it normalizes and what role it plays.

    Args:
        path: of the module.
        norm: the module itself.
        role: `"stem"`, `"branch"`, `"branch end"`, `"shortcut"`, `"pre-activation"`, `"after concat"`, `"head"` or
            `"trunk"`.
        calls: its nodes in the graph; several if the module is shared, none if the forward never runs it.
        feeder: the convolution or linear (a node: `feeder.path`, `feeder.module`) whose output it alone reads, at every
            call, and whose weight nothing else reads; None where there is none.
        join: the residual join whose branch it ends; None if it ends none.
        reads: name of what it reads, a module's path or a function, for the table; also where there is no feeder.
        survives: √(1 − p) of the dropout between its feeder and itself: with that standard deviation the feeder gives
            it 1.
        law: what it computes, of a norm layer of another kind than `"batch"`; None if it does more.
    """

    path: str
    norm: nn.Module
    role: str
    calls: tuple[int, ...]
    feeder: Node | None
    join: Join | None
    reads: str
    survives: float = 1.0
    law: Law | None = None

    @property
    def kind(self) -> NormKind:
        """What it normalizes over."""
        found = norm_kind(self.norm)
        assert found is not None
        return found


def find_sites(model: nn.Module, graph: Graph, kinds: Collection[NormKind] = ("batch",)) -> list[Site]:
    """Every norm layer of some kinds, in execution order; those that never ran come last."""
    norms = norm_layers(model, kinds)
    ends = {end: join for join in reversed(graph.joins) for end in main_ends(graph, join)}
    sites = [_site(graph, path, norm, ends, model.training) for path, norm in norms.items()]
    return sorted(sites, key=lambda site: site.calls[0] if site.calls else len(graph))


def _site(graph: Graph, path: str, norm: nn.Module, ends: dict[int, Join], training: bool) -> Site:
    calls = graph.calls(path)
    law = None if is_batch_norm_like(norm) else law_of(norm)
    if not calls:
        return Site(path, norm, "trunk", (), None, None, "nothing: the forward pass never runs it", law=law)
    reads = source(graph, calls[0].inputs[0]) if calls[0].inputs else calls[0]
    # Every call must read the same layer: one that reads something else keeps what it reads unfolded.
    dim = 1 if law is None else law.dim
    found = [_feeder(graph, call, dim) for call in calls]
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
    return Site(path, norm, role, indices, feeder, join, name, survives, law)


def _survivals(graph: Graph, index: int, feeder: int, training: bool) -> Iterator[float]:
    """√(1 − p) of each dropout up to the layer that feeds it; dropout for SELU keeps the variance as it is."""
    while index > feeder:
        module: Any = graph.nodes[index].module
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and (module.training or not training)
        if drops and module.p < 1 and not isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout):
            yield math.sqrt(1 - module.p)
        index = graph.nodes[index].inputs[0]


def _feeder(graph: Graph, call: Node, dim: int) -> Node | None:
    """The weighted layer whose channels `call` normalizes, in dimension `dim`, if nothing else sees its output or its
    weight."""
    index = next(iter(call.inputs), None)
    while index is not None and len(graph.consumers(index)) == 1 and index not in graph.outputs:
        node = graph.nodes[index]
        if is_weighted(node.module):
            rank = len(node.shape)
            fits = rank + channel_dim(node.module) == dim % rank
            return node if fits and not graph.other_readers(node) else None
        index = node.inputs[0] if passes(node) and node.inputs else None
    return None


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
