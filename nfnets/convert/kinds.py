"""Which kinds of norm layers a conversion looks at, and what stands against one that is no BatchNorm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from nfnets.convert.methods.base import Method, list_methods
from nfnets.convert.plan import Change
from nfnets.errors import UserError
from nfnets.graph import Graph, Node
from nfnets.scale.knob import channel_dim
from nfnets.structure.laws import KINDS, NormKind
from nfnets.structure.norms import kinds_of, norm_kind, norm_layers, unknown_norms
from nfnets.structure.readers import is_view
from nfnets.structure.sites import Site
from nfnets.structure.walk import is_norm, is_weighted, walk

_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum"}


def asked(method: Method, norms: Any) -> tuple[NormKind, ...]:
    """The kinds that `norms=` names, each of which the method carries, unless it says "all".

    Raises:
        UserError: no such kind, or one that the method does not carry.
    """
    kinds = kinds_of(norms)
    foreign: list[NormKind] = [kind for kind in kinds if kind not in method.carries]
    if foreign and norms != "all":
        raise UserError(f"method {method.name!r} with norms={norms!r}: {_not_carried(method, foreign[0])}")
    return kinds


def _not_carried(method: Method, kind: NormKind) -> str:
    return (
        f"it replaces {_listed(method.carries)} norm layers, and no {kind} norm; pass a method that does "
        f"({', '.join(_carriers([kind]))})"
    )


def _carriers(kinds: Iterable[NormKind]) -> list[str]:
    return sorted(name for name, method in list_methods().items() if {*kinds} <= {*method.carries})


def _listed(kinds: Iterable[str]) -> str:
    return " and ".join(kinds)


def nothing_found(model: nn.Module, kinds: Collection[NormKind]) -> UserError:
    """The error for a model without a norm layer of these kinds: which it has instead, and what converts those."""
    name = type(model).__name__
    looked = "BatchNorm layer" if set(kinds) == {"batch"} else f"{' or '.join(kinds)} norm layer"
    others = norm_layers(model, [kind for kind in KINDS if kind not in kinds])
    if not others:
        return UserError(f"{name} has no {looked}: expected a model with at least one; nothing to convert")
    counts: Counter[NormKind] = Counter()
    counts.update(kind for module in others.values() if (kind := norm_kind(module)) is not None)
    has = _listed(f"{count} {kind} norm{'s' * (count > 1)}" for kind, count in counts.items())
    return UserError(
        f"{name} has no {looked}, but {has}: pass norms='all' with a method that replaces them "
        f"({', '.join(_carriers(counts))})"
    )


def reason_of_kind(method: Method, graph: Graph, site: Site) -> str:
    """Why a method cannot replace a norm layer that is none of the batch; empty if it can."""
    if site.kind not in method.carries:
        return _not_carried(method, site.kind)
    if site.law is None:
        return ""
    unbatched = isinstance(site.norm, nn.modules.instancenorm._InstanceNorm) and any(
        len(graph.nodes[call].shape) <= site.norm._get_no_batch_dim() for call in site.calls
    )
    if unbatched:
        return "what it reads has no dimension of samples: pass a batch"
    return _other_axes(graph, site) if method.channels_only else ""


def _other_axes(graph: Graph, site: Site) -> str:
    """What a layer normalizes over besides the channels, or instead of them."""
    law = site.law
    assert law is not None
    pointwise = "only dyt and derf replace that"
    if len(law.shape) > 1:
        return f"it normalizes over {len(law.shape)} dimensions, {law.shape}, not the channels alone; {pointwise}"
    for call in site.calls:
        node = _layer_before(graph, graph.nodes[call])
        if node is not None and (len(node.shape) + channel_dim(node.module)) != law.dim % len(node.shape):
            return f"it normalizes over dimension {law.dim}, where {node.path} has no channels; {pointwise}"
    return ""


def _layer_before(graph: Graph, node: Node) -> Node | None:
    """The layer that puts out what a node reads, dimension by dimension; None if that cannot be told."""
    while len(node.inputs) == 1:
        node = graph.nodes[node.inputs[0]]
        if is_weighted(node.module):
            return node
        if is_view(node) or is_norm(node):
            return None
    return None


def attention_reads(graph: Graph, site: Site) -> bool:
    """Whether what a norm layer puts out goes into products of two tensors with no layer in between: the queries and
    keys of attention, whose logits it bounds."""

    def onward(node: Node) -> Iterable[int]:
        ends = is_weighted(node.module) or is_norm(node) or bool(node.params) or _is_product(node)
        return () if ends else graph.consumers(node.index)

    readers = [reader for call in site.calls for reader in graph.consumers(call)]
    return any(_is_product(node) for node in walk(graph, readers, onward).values())


def _is_product(node: Node) -> bool:
    two = len(set(node.inputs)) > 1 and not node.params
    return node.kind == "function" and node.name in _PRODUCTS and two


def unknown_rows(model: nn.Module, graph: Graph) -> Iterator[Change]:
    """A row for every layer that is called a norm and is none that is known: it stays."""
    for path, module in unknown_norms(model).items():
        why = f"it computes none of {', '.join(KINDS)} normalization, or more than that"
        yield Change(path, action="leave", why=why, role="trunk", norm=type(module).__name__)
