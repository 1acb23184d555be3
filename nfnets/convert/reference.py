"""What the layers of the BatchNorm model put out before anything changes: its scale is the one to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nfnets.structure.ends import kills
from nfnets.structure.sites import is_weighted
from nfnets.trace import Graph, Node, is_batch_norm_like

FACTOR = 2.0
"""How far a scale may move from the BatchNorm model's before it is set to it."""


class Reference:
    """Root mean squares of what the model's layers put out; empty where nothing could be measured.

    Args:
        everything: of every node of the graph; otherwise of convolutions and linears only.
    """

    def __init__(self, everything: bool = False):
        self.everything = everything
        self._squares: dict[int, Tensor] = {}
        self._first: dict[str, int] = {}

    def visit(self, node: Node, output: Tensor) -> None:
        """Measure one output, as the tracer meets it; nothing waits for the device."""
        if node.index == 0:  # another pass
            self._squares.clear()
            self._first.clear()
        weighted = is_weighted(node.module)
        wanted = weighted or (self.everything and output.is_floating_point())
        if wanted and not output.is_meta and output.numel():
            wide = torch.promote_types(output.dtype, torch.float32)
            norm = torch.linalg.vector_norm(output.detach(), dtype=wide)
            self._squares[node.index] = norm.square() / output.numel()
            if weighted:
                self._first.setdefault(node.path, node.index)

    def at(self, index: int) -> float:
        """Of a node's output; 0 if it was not measured."""
        square = self._squares.get(index)
        return 0.0 if square is None else math.sqrt(float(square))

    def rms(self, path: str) -> float:
        """Of a layer's output at its first call; infinite if it was not measured, or is 0 and tells nothing."""
        return self.at(self._first.get(path, -1)) or math.inf


def heads(graph: Graph, reference: Reference) -> dict[str, float]:
    """Root mean squares of the layers that nothing but the outputs follows: classifiers, box regressors, …"""
    found: dict[str, float] = {}
    layers = [node.index for node in graph.nodes if is_weighted(node.module)]
    seen: set[int] = set()
    waiting = list(graph.outputs)
    while waiting:
        index = waiting.pop()
        node = graph.nodes[index]
        if index in seen or is_norm(node):
            continue
        seen.add(index)
        if not is_weighted(node.module):
            waiting += node.inputs if len(node.inputs) < 2 or node.name != "add" else ()
        elif math.isfinite(rms := reference.rms(node.path)) and not graph.followed(index, layers):
            found[node.path] = rms
    return found


def hidden(graph: Graph) -> list[str]:
    """Layers whose output nothing but a ReLU reads: the first layer of a squeeze-excite gate."""
    found = []
    for node in graph.nodes:
        readers = [graph.nodes[i] for i in graph.consumers(node.index)]
        alone = len(readers) == 1 and len(graph.calls(node.path)) == 1
        if is_weighted(node.module) and alone and kills(readers[0]) and not is_norm(readers[0]):
            found.append(node.path)
    return found


def is_norm(node: Node) -> bool:
    """Whether a node is a call of a batch norm layer."""
    return node.module is not None and is_batch_norm_like(node.module)
