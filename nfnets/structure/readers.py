"""Which layers norm layers read, what reads a tensor besides, and what nothing but the output reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from nfnets.graph import Graph, Node
from nfnets.scale.knob import knob
from nfnets.structure.own_forward import follows_weight
from nfnets.structure.sites import Site
from nfnets.structure.walk import applies_weights, is_norm, is_weighted, kills, multiplies, name_of, walk

_VIEWS = {
    "view",
    "reshape",
    "getitem",
    "chunk",
    "split",
    "unbind",
    "transpose",
    "permute",
    "flatten",
    "unflatten",
}
_VIEWS |= {
    "squeeze",
    "unsqueeze",
    "narrow",
    "select",
    "expand",
    "movedim",
    "view_as",
    "reshape_as",
    "tensor_split",
}


def fed_through_sums(graph: Graph, sites: list[Site]) -> Iterator[Node]:
    """Layers that feed no site alone, but that one reads through sums, concats, pools and activations; each once, and
    not those whose weight something else reads."""
    taken = {site.feeder.path for site in sites if site.feeder is not None}
    norms = {call for site in sites for call in site.calls}
    for node in graph.nodes:
        wanted = is_weighted(node.module) and node.path not in taken and not graph.other_readers(node)
        if wanted and _reaches(graph, node, norms):
            taken.add(node.path)
            yield node


def summed_layers(graph: Graph, sites: list[Site]) -> list[Node]:
    """The layers that norm layers read through sums of two, and nothing alone: what makes the stream of a
    pre-activation net. No norm layer sets their scale; it is their own."""
    sums = {node.index for node in graph.nodes if node.name == "add" and len(node.inputs) == 2}
    return [node for node in fed_through_sums(graph, sites) if _reaches(graph, node, sums)]


def _reaches(graph: Graph, node: Node, targets: set[int]) -> bool:
    """Whether what a layer puts out is read by one of these nodes with no layer, norm layer or gate in between."""

    def onward(reader: Node) -> Iterable[int]:
        stops = reader.index in targets or is_weighted(reader.module) or is_norm(reader) or multiplies(reader)
        return () if stops else graph.consumers(reader.index)

    return not targets.isdisjoint(walk(graph, graph.consumers(node.index), onward))


def read_by_norms(graph: Graph, sites: list[Site]) -> list[str]:
    """Paths of the layers that norm layers read, alone or through sums, concats, pools and activations, and whose
    weights can be scaled."""
    alone = [site.feeder for site in sites if site.feeder is not None]
    return [node.path for node in (*alone, *fed_through_sums(graph, sites)) if _adjustable(graph, node)]


def scalable(graph: Graph, site: Site) -> bool:
    """Whether the weight of some layer sets the size of what a norm layer reads, alone or through sums and the like."""

    def onward(node: Node) -> Iterable[int] | None:
        if is_norm(node):
            return None
        return () if is_weighted(node.module) or multiplies(node) else node.inputs

    before = walk(graph, [i for call in site.calls for i in graph.nodes[call].inputs], onward)
    return not site.calls or any(_adjustable(graph, node) for node in before.values())


def reads_functions(graph: Graph, site: Site) -> bool:
    """Whether the weights that a norm layer reads, alone or through sums and the like, are all applied by functions:
    in layers of somebody else's class (a graph net's own linear), which no standardized layer can stand for."""
    constant: set[int] = set()  # computed from parameters alone, such as a transposed weight
    for node in graph.nodes:
        if node.kind == "function" and constant.issuperset(node.inputs):
            constant.add(node.index)

    def applies(node: Node) -> bool:
        return applies_weights(node) and (bool(node.params) or not constant.isdisjoint(node.inputs))

    def onward(node: Node) -> Iterable[int]:
        ends = is_norm(node) or is_weighted(node.module) or applies(node)
        return () if ends else [index for index in node.inputs if index not in constant]

    before = walk(graph, [i for call in site.calls for i in graph.nodes[call].inputs], onward).values()
    others = any(is_norm(node) or is_weighted(node.module) for node in before)
    return not others and any(map(applies, before))


def _adjustable(graph: Graph, node: Node) -> bool:
    """Whether a node is a layer whose output can be scaled by its weight, which learns and nothing else reads."""
    if node.module is None or not is_weighted(node.module):
        return False
    found = knob(node.module)
    if isinstance(found, str) or not found.parameter.requires_grad or graph.other_readers(node):
        return False
    return follows_weight(graph, node)


def overwritten(graph: Graph, index: int) -> bool:
    """Whether an operation in place writes over a node's output, itself or a view of it."""

    def onward(node: Node) -> Iterable[int]:
        return graph.consumers(node.index) if is_view(node) and not node.inplace else ()

    return any(node.inplace for node in walk(graph, graph.consumers(index), onward).values())


def behind_dropout(graph: Graph) -> frozenset[int]:
    """Nodes whose inputs dropout has masked, near or far.

    Example:
        >>> from nfnets.trace import trace
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2), nn.ReLU())
        >>> graph = trace(model, torch.ones(1, 2))
        >>> [node.name for node in graph.nodes if node.index in behind_dropout(graph)]
        ['2', '3']
    """
    masked = [i for node in graph.nodes if _drops(node) for i in graph.consumers(node.index)]
    return frozenset(walk(graph, masked, lambda node: graph.consumers(node.index)))


def _drops(node: Node) -> bool:
    return "dropout" in name_of(node) and getattr(node.module, "p", 1) != 0


def is_view(node: Node) -> bool:
    """Whether a node only shows what it read in another shape, or a part of it."""
    return node.name in _VIEWS or isinstance(node.module, nn.Identity | nn.Flatten | nn.Unflatten)


def hidden(graph: Graph) -> list[str]:
    """Layers whose output nothing but a ReLU reads: the first layer of a squeeze-excite gate."""
    found = []
    for node in graph.nodes:
        readers = [graph.nodes[i] for i in graph.consumers(node.index)]
        alone = len(readers) == 1 and len(graph.calls(node.path)) == 1
        if is_weighted(node.module) and alone and kills(readers[0]) and not is_norm(readers[0]):
            found.append(node.path)
    return found


def heads(graph: Graph, is_layer: Callable[[Node], bool], stops: Callable[[Node], bool]) -> list[Node]:
    """The layers that make the outputs: classifiers, box regressors. No layer follows one, and nothing at which the
    search stops lies between it and an output.

    Args:
        graph: of a model.
        is_layer: which nodes are layers.
        stops: behind which nodes there is no head.
    """
    layers = [node.index for node in graph.nodes if is_layer(node)]

    def onward(node: Node) -> Iterable[int] | None:
        if stops(node):
            return None
        return () if is_layer(node) else node.inputs

    found = walk(graph, graph.outputs, onward)
    last = (found[i] for i in sorted(found) if is_layer(found[i]))
    return [node for node in last if not graph.followed(node.index, layers)]
