"""Which nodes of a graph are measured points, what they are called, and which dimension holds their channels."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from nfnets.tailored import TailoredActivation
from nfnets.trace import Graph, Join, Node, is_batch_norm_like

_ACTIVATIONS = {
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "rrelu",
    "elu",
    "celu",
    "selu",
    "gelu",
    "silu",
    "swish",
    "mish",
    "hardswish",
    "hardtanh",
    "hardsigmoid",
    "sigmoid",
    "logsigmoid",
    "tanh",
    "softplus",
    "softsign",
    "softmax",
    "log_softmax",
    "glu",
    "clamp",
    "clamp_min",
    "threshold",
    "erf",
    "sin",
}
_POOLS = ("avg_pool", "max_pool", "boolean_dispatch", "adaptive_")
_CONVS = ("conv1d", "conv2d", "conv3d", "conv_transpose")
_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
# They move or select values, compute nothing: never measured, and never what an output is said to feed.
_MOVES = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "T",
    "mT",
    "swapaxes",
    "movedim",
    "squeeze",
    "unsqueeze",
    "expand",
    "expand_as",
    "contiguous",
    "to",
    "float",
    "half",
    "bfloat16",
    "type",
    "type_as",
    "cpu",
    "cuda",
    "getitem",
    "setitem",
    "chunk",
    "split",
    "unbind",
    "clone",
    "detach",
    "split_with_sizes",
    "tensor_split",
    "narrow",
    "select",
    "requires_grad",
    "size",
    "repeat",
    "roll",
    "pad",
    "numel",
    "dim",
    "view_as",
    "reshape_as",
}
_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def kind(node: Node) -> str:
    """conv, linear, norm, activation, pool, module, function, input, or "" for what computes nothing."""
    if node.kind == "input":
        return "input"
    m = node.module
    if m is None:
        return _function_kind(node.name)
    if isinstance(m, nn.Identity | nn.Flatten | nn.Unflatten | nn.modules.dropout._DropoutNd):
        return ""
    if isinstance(m, nn.modules.conv._ConvNd):
        return "conv"
    if is_batch_norm_like(m) or "Norm" in type(m).__name__:
        return "norm"
    if isinstance(m, nn.Linear | nn.Bilinear | nn.Embedding):
        return "linear"
    if isinstance(m, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase):
        return "module"
    where = type(m).__module__
    if where == "torch.nn.modules.activation" or isinstance(m, TailoredActivation):
        return "activation"
    return "pool" if where == "torch.nn.modules.pooling" else "module"


def _function_kind(name: str) -> str:
    if name in _MOVES or "dropout" in name:
        return ""
    if name in _ACTIVATIONS:
        return "activation"
    for prefixes, found in ((_POOLS, "pool"), (_CONVS, "conv"), (_NORMS, "norm")):
        if name.startswith(prefixes):
            return found
    return "linear" if name == "linear" else "function"


_RESHAPES = {"view", "reshape", "flatten", "unflatten"}


def channel_dim(node: Node, shape: tuple[int, ...], known: Mapping[int, tuple[int, int, int]]) -> int:
    """The dimension that holds the channels of a node's output.

    Images keep them in dimension 1, tokens in the last; what lies between inherits from its source, through
    permutations too (ConvNeXt and Swin change over inside a block).

    Args:
        node: the node.
        shape: of its output.
        known: `(dimension, channels, product of the dimensions before)` of the nodes before it.

    Returns:
        A non-negative dimension.
    """
    last = len(shape) - 1
    m = node.module
    if isinstance(m, nn.LayerNorm):
        fits = shape[last] == m.normalized_shape[-1] and "2d" not in type(m).__name__
        return last if fits else min(1, last)
    if isinstance(m, _LAST) or node.name == "linear":
        return last
    if m is not None and kind(node) in ("conv", "norm", "pool"):
        return min(1, last)
    sources = [known[i] for i in node.inputs if i in known]
    if not sources:
        return min(1, last)
    # Of several operands the one that the output looks like: a class token is put before the patches.
    fitting = [s for s in sources if s[0] <= last and shape[s[0]] == s[1]]
    dim, channels, before = (fitting or sources)[0]
    if node.name in _RESHAPES:
        return _beginning_at(before, shape, dim)
    numbers = [int(c) % len(shape) for c in node.constants if abs(c) <= len(shape)]
    if node.name == "permute" and sorted(numbers) == list(range(len(shape))):
        return numbers.index(dim) if dim in numbers else min(1, last)
    if node.name in ("transpose", "swapaxes") and len(numbers) == 2 and dim in numbers:
        return numbers[1 - numbers.index(dim)]
    if dim <= last and (shape[dim] == channels or node.name == "cat"):
        return dim
    if 0 < dim <= last and math.prod(shape[:dim]) == before:
        return dim  # some of the channels
    return last if shape[last] == channels else min(1, last)


def _beginning_at(before: int, shape: tuple[int, ...], dim: int) -> int:
    """Where a dimension is after a reshape, by the elements before it: split (groups of channels) or merged."""
    products = [math.prod(shape[:i]) for i in range(len(shape))]
    exact = [i for i, product in enumerate(products) if product == before]
    if exact:
        return min(exact, key=lambda i: abs(i - dim))
    return max((i for i, product in enumerate(products) if product <= before), default=0)


def measurable(node: Node, output: Tensor) -> bool:
    """Whether a node's output has statistics at all: floating-point, a batch, and made by computing."""
    if not output.is_floating_point() or output.dim() < 2 or output.numel() == 0:
        return False
    return bool(kind(node)) and not output.is_meta and output.layout is torch.strided


@dataclass(frozen=True)
class Place:
    """A node that becomes a row of the report."""

    node: int
    name: str
    kind: str
    role: str
    feeds: str
    depth: int
    block: int | None
    call: int
    batch_norm: bool = False


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside `torch.compile`'s and DDP's."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _clean(path: str) -> str:
    """Without what `torch.compile` and DDP put in front."""
    parts = [p for p in path.split(".") if p != "_orig_mod"]
    return ".".join(parts)


def _named(path: str, prefix: str) -> str:
    return f"{_clean(path)}.".removeprefix(prefix).rstrip(".")


def _inside(node: Node, path: str) -> bool:
    return bool(path) and (node.path == path or node.path.startswith(path + "."))


def _back(graph: Graph, index: int, measured: Collection[int]) -> int | None:
    """The nearest measured node at or before this one, along first inputs."""
    while index not in measured:
        if not graph.nodes[index].inputs:
            return None
        index = graph.nodes[index].inputs[0]
    return index


def stem_of(graph: Graph, join: Join, prefix: str = "") -> int:
    """What the first block reads: the split itself, or, when that lies inside the block (a pre-activation that
    branch and projection share), the last node before the block."""
    block, node = graph.nodes[join.node].path, graph.nodes[join.split]
    if not _named(block, prefix):
        return node.index  # the model itself adds, and everything lies inside it
    while _inside(node, block) and node.inputs:
        node = graph.nodes[node.inputs[0]]
    return node.index


def residual_end(graph: Graph, join: Join) -> int:
    """The node whose variance is the residual variance: before SkipInit and α, after a gain above one.

    DeepMind's code measures after the factor 2 that makes up for a squeeze-and-excitation gate of one half, so a
    rescaling above one belongs to the branch; α and SkipInit scalars are one or less.
    """
    index = join.branch
    while index != join.branch_end:
        node = graph.nodes[index]
        if node.rescales and node.name == "mul" and any(abs(c) > 1 for c in node.constants):
            return index
        index = node.inputs[0]
    return index


def depths(graph: Graph) -> list[int]:
    """Per node, the weight layers (convolutions and linears) on the longest path from an input through it."""
    out: list[int] = []
    for node in graph.nodes:
        before = max((out[i] for i in node.inputs), default=0)
        out.append(before + (kind(node) in ("conv", "linear")))
    return out


def _feeds(graph: Graph, index: int, joins: Collection[int]) -> str:
    for consumer in graph.consumers(index):
        if consumer in joins:
            return "join"
        node = graph.nodes[consumer]
        found = kind(node)
        if found == "" or node.rescales:
            found = _feeds(graph, consumer, joins)
        if found:
            return found
    return ""


def places(
    graph: Graph,
    measured: Collection[int],
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    prefix: str = "",
) -> list[Place]:
    """The points of a graph in execution order.

    Args:
        graph: the traced graph.
        measured: indices of the nodes that have statistics.
        include: glob patterns of names; functions that match become points too.
        exclude: glob patterns of names to leave out.
        prefix: of every path, removed (`module.` under DDP).

    Returns:
        One place per row.
    """
    joins = {j.node: n for n, j in enumerate(graph.joins, start=1) if j.node in measured}
    ends = {_back(graph, residual_end(graph, j), measured) for j in graph.joins}
    stem = _back(graph, stem_of(graph, graph.joins[0], prefix), measured) if graph.joins else None
    head = _back(graph, graph.outputs[0], measured) if graph.outputs else None
    depth = depths(graph)
    seen: dict[str, int] = {}
    out: list[Place] = []
    for index in sorted(measured):
        node = graph.nodes[index]
        what = kind(node)
        role = (
            "join"
            if index in joins
            else "head"
            if index == head
            else "branch_end"
            if index in ends
            else "stem"
            if index == stem
            else ""
        )
        path = _named(node.path, prefix)
        name = node.name if node.kind == "input" else path
        if node.kind == "function" and role != "join":
            alone = node.path and what == "activation" and _is_leaf(graph, node.path)
            name = path if alone else f"{path}.{node.name}".lstrip(".")
        elif role == "join":
            name = path or node.name
            what = "join"
        elif not name:
            name = type(node.module).__name__.lower()
        wanted = bool(role) or what != "function" or _shifts(graph, node, joins)
        wanted = wanted or any(fnmatch(name, g) for g in include)
        if not wanted or any(fnmatch(name, g) for g in exclude):
            continue
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            name = f"{name}#{seen[name]}"
        block = joins.get(index, 0 if index == stem else None)
        out.append(
            Place(
                index,
                name,
                what,
                role,
                _feeds(graph, index, joins),
                depth[index],
                block,
                node.call,
                node.module is not None and is_batch_norm_like(node.module),
            )
        )
    return out


def _shifts(graph: Graph, node: Node, joins: Collection[int]) -> bool:
    """Whether a function adds parameters right before an activation, where a norm layer may have stood."""
    if node.name != "add" or len(node.inputs) != 2:
        return False
    traced = [i for i in node.inputs if graph.nodes[i].inputs or graph.nodes[i].kind != "function"]
    return len(traced) == 1 and _feeds(graph, node.index, joins) == "activation"


def patterns(given: str | Collection[str]) -> tuple[str, ...]:
    """Glob patterns as they were given; one string is one pattern, not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def unmatched(
    graph: Graph,
    measured: Collection[int],
    include: Collection[str],
    exclude: Collection[str],
    prefix: str = "",
) -> list[str]:
    """The patterns that choose nothing: most likely misspelled.

    Args:
        graph, measured, include, exclude, prefix: as `places`.

    Returns:
        Those of both kinds that no point's name matches, in order.
    """
    if not include and not exclude:
        return []
    names = {p.name.partition("#")[0] for p in places(graph, measured, include, (), prefix)}
    return [g for g in (*include, *exclude) if not any(fnmatch(name, g) for name in names)]


def compared(found: Collection[Place], include: Collection[str] = ()) -> set[int]:
    """Nodes whose samples are worth comparing with each other: the trunk, branch ends, and what was asked for.

    The trunk as rules see it: joins, or what enters the activations (or else the weight layers) of a plain network.
    """
    chosen = {p.node for p in found if p.role or any(fnmatch(p.name, g) for g in include)}
    if sum(p.role == "join" for p in found) > 1:
        return chosen
    entering = {p.node for p in found if p.feeds == "activation" and p.kind != "activation"}
    plain = {p.node for p in found if p.kind in ("conv", "linear") and p.feeds != "norm"}
    return chosen | (entering or plain)


def _is_leaf(graph: Graph, path: str) -> bool:
    """Whether nothing but one function ran in the module at this path: a hand-written activation module."""
    return sum(1 for n in graph.nodes if _inside(n, path)) == 1
