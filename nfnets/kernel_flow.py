"""C maps along a graph: what becomes of the cosine between two inputs, node by node.

A weighted layer keeps it, an activation applies its local map, a sum is a weighted average by mean squares (which makes
it a normalized sum), and so is a concatenation. Papers: arXiv 2110.01765 (DKS), 2203.08120 (TAT, appendix B).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from nfnets.errors import UserError
from nfnets.graph import REARRANGING, Graph, Node
from nfnets.predict import pools

Local = Callable[[int, float], float]
"""Of an activation's node and the value that it reads, the value that it puts out."""

_SHAPES = REARRANGING | {"interpolate", "pad"}
_PASSING = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
_PASSING += (
    nn.ChannelShuffle,
    nn.Upsample,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
)
_PASSING += (nn.modules.padding._ReplicationPadNd,)


@dataclass(frozen=True, slots=True)
class Op:
    """One node: where it reads, and what it does with the cosine."""

    kind: str
    """`"start"`, `"keep"`, `"activate"` or `"mix"`."""
    inputs: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    """Of a mix: shares that sum to 1."""


@dataclass(frozen=True)
class Flow:
    """A graph as C maps see it.

    Args:
        ops: by node, in execution order; constants (a bias that is reshaped) are none.
        square: the mean square of each node's output.
        unmixed: operations without a map that a weighted layer follows, as text.
    """

    ops: dict[int, Op]
    square: dict[int, float]
    unmixed: tuple[str, ...] = ()
    _readers: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, op in self.ops.items():
            for source in dict.fromkeys(op.inputs):
                self._readers.setdefault(source, []).append(index)

    def values(self, start: float, local: Local) -> dict[int, float]:
        """The value at every node when every input has this one.

        Args:
            start: at the inputs.
            local: the map of every activation.
        """
        found: dict[int, float] = {}
        for index, op in self.ops.items():
            found[index] = start if op.kind == "start" else self._apply(index, found, local)
        return found

    def largest(self, start: float, local: Local) -> float:
        """The largest value at the end of any subnetwork: M(x) of the TAT paper's appendix B.

        Subnetworks are the whole net and what lies between a fork and a sum on one of its ways, as the paper's own
        code counts them: one that enters a branch from before its fork is none. The local map may not decrease a value,
        so those that begin or end further inside are smaller.
        """
        found = self.values(start, local)
        largest = max(value for index, value in found.items() if index not in self._readers)
        for readers in self._readers.values():
            for entry in readers if len(readers) > 1 else ():
                if self.ops[entry].kind != "mix":
                    largest = max(largest, self._from(entry, start, local))
        return largest

    def _from(self, entry: int, start: float, local: Local) -> float:
        """The largest value at the end of one way of a fork, where something else comes in."""
        op = self.ops[entry]
        found = {entry: local(entry, start) if op.kind == "activate" else start}
        waiting = list(self._readers.get(entry, ()))
        heapq.heapify(waiting)
        while waiting:
            index = heapq.heappop(waiting)
            op = self.ops[index]
            if index not in found and all(i in found for i in op.inputs):
                found[index] = self._apply(index, found, local)
                for reader in self._readers.get(index, ()):
                    heapq.heappush(waiting, reader)
        ends = [i for i in found if any(reader not in found for reader in self._readers.get(i, (-1,)))]
        return max(found[i] for i in ends)

    def _apply(self, index: int, found: Mapping[int, float], local: Local) -> float:
        op = self.ops[index]
        if op.kind == "activate":
            return local(index, found[op.inputs[0]])
        if op.kind == "mix":
            return sum(w * found[i] for i, w in zip(op.inputs, op.weights, strict=True))
        return found[op.inputs[0]]


Square = Callable[[Node, float, Mapping[int, float]], float | None]
"""Of a node, the mean square of its input and those of all nodes so far, that of its output; None if it is neither an
activation nor a weighted layer that sets it."""


def flow(graph: Graph, square: Square, start: float = 1.0) -> Flow:
    """What C maps see of a graph, and the mean square of every node's output.

    Args:
        graph: of a model.
        square: asked at weighted layers and activations.
        start: mean square of the inputs.

    Returns:
        A `Flow`. Operations that it has no map for are taken to keep what they read; where a weighted layer follows,
        they are listed.
    """
    ops: dict[int, Op] = {}
    squares: dict[int, float] = {}
    unknown: list[str] = []
    weighted = [node.index for node in graph.nodes if is_weighted_call(node)]
    for node in graph.nodes:
        sources = tuple(i for i in node.inputs if i in ops)
        if not sources:
            if node.kind == "input":
                ops[node.index], squares[node.index] = Op("start"), start
            continue
        own = [squares[i] for i in sources]
        answer = square(node, own[0], squares)
        if is_weighted_call(node):
            ops[node.index] = Op("keep", sources[:1])
            squares[node.index] = own[0] if answer is None else answer
        elif answer is not None:
            ops[node.index] = Op("activate", sources[:1])
            squares[node.index] = answer
        elif node.name in ("add", "sub") or (node.name in ("cat", "stack") and len(sources) > 1):
            parts = own if node.name in ("add", "sub") else _by_size(graph, sources, own)
            total = sum(parts)
            shares = tuple(p / total for p in parts) if total > 0 else (1 / len(parts),) * len(parts)
            ops[node.index] = Op("mix", sources, shares)
            squares[node.index] = total
            if node.name in ("add", "sub") and len(sources) == 1 and any(node.constants):
                _note(graph, node, weighted, unknown)
        else:
            ops[node.index] = Op("keep", sources[:1])
            squares[node.index] = own[0] * _factor(node) ** 2
            if not _passes(node, len(sources)):
                _note(graph, node, weighted, unknown)
    return Flow(ops, squares, tuple(dict.fromkeys(unknown)))


def is_weighted_call(node: Node) -> bool:
    """Whether a node is a call of a convolution or linear layer."""
    return isinstance(node.module, nn.modules.conv._ConvNd | nn.Linear)


def _note(graph: Graph, node: Node, weighted: list[int], unknown: list[str]) -> None:
    if graph.followed(node.index, weighted):
        kind = type(node.module).__name__ if node.module is not None else node.name
        unknown.append(f"{kind} at {node.path or 'the root'}")


def _by_size(graph: Graph, sources: tuple[int, ...], own: list[float]) -> list[float]:
    sizes = [math.prod(graph.nodes[i].shape) for i in sources]
    return [q * size / sum(sizes) for q, size in zip(own, sizes, strict=True)]


def _factor(node: Node) -> float:
    if node.name == "mul":
        return math.prod(node.constants)
    return 1 / math.prod(node.constants) if node.name == "div" and all(node.constants) else 1.0


def _passes(node: Node, inputs: int) -> bool:
    if node.module is not None:
        return isinstance(node.module, _PASSING) or pools(node)
    scaled = node.name in ("mul", "div") and inputs == 1
    return (
        scaled
        or pools(node)
        or node.name in _SHAPES
        or node.name == "raised"
        or node.name in ("cat", "stack")
    )


def refuse_unknown(found: Flow, what: str) -> None:
    """UserError that names the operations in front of a weighted layer that have no C map."""
    if found.unmixed:
        more = f" and {len(found.unmixed) - 3} more" if len(found.unmixed) > 3 else ""
        raise UserError(
            f"{what} has no C map for {', '.join(found.unmixed[:3])}{more}: it composes layers, activations, sums, "
            "concatenations and pools; use LSUV or AutoInit for this net"
        )
