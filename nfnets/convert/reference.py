"""What the layers of the BatchNorm model put out before anything changes: its scale is the one to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nfnets.structure.readers import heads
from nfnets.structure.walk import is_norm, is_weighted
from nfnets.trace import Graph, Node

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


def head_sizes(graph: Graph, reference: Reference) -> dict[str, float]:
    """Root mean squares of the layers that make the outputs, by path."""

    def stops(node: Node) -> bool:
        return is_norm(node) or (node.name == "add" and len(node.inputs) > 1)

    found = heads(graph, lambda node: is_weighted(node.module), stops)
    sizes = {node.path: reference.rms(node.path) for node in found}
    return {path: rms for path, rms in sizes.items() if math.isfinite(rms)}
