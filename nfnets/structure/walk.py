"""The one walk over a graph, and the kinds of nodes that walks stop at or go through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import nn

from nfnets.graph import Graph, Node
from nfnets.scale.knob import is_complex

Onward = Callable[[Node], Iterable[int] | None]
"""Where to go on from a node: nodes, none to stop behind it, or None to stop before it."""


def walk(graph: Graph, start: Iterable[int], onward: Onward) -> dict[int, Node]:
    """The nodes that are reached from some others, each once, in the order in which they are.

    Args:
        graph: of a model.
        start: the nodes to begin with, which are reached themselves.
        onward: of a node, where to go on; None if the node itself is not to be reached.

    Returns:
        The nodes by index.

    Example:
        >>> from nfnets.trace import trace
        >>> import torch
        >>> graph = trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(1, 2))
        >>> [node.name for node in walk(graph, graph.outputs, lambda node: node.inputs).values()]
        ['2', '1', '0', 'input']
    """
    found: dict[int, Node] = {}
    seen: set[int] = set()
    waiting = list(start)
    while waiting:
        index = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        further = onward(graph.nodes[index])
        if further is not None:
            found[index] = graph.nodes[index]
            waiting.extend(further)
    return found


def is_norm(node: Node) -> bool:
    """Whether a node is a call of a norm layer, of the kinds that are looked at."""
    return node.norm


def is_weighted(module: nn.Module | None) -> bool:
    """Whether a module is a convolution or a linear layer, of real numbers."""
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and not is_complex(module)


_KILLING = {"relu", "relu6", "threshold", "hardshrink", "softshrink"}
"""Activations whose slope at 0 is 0: behind them a layer of zeros, or a scalar 0, never learns."""
_WEIGHTS = {"matmul", "mm", "bmm", "addmm", "einsum", "linear", "conv1d", "conv2d", "conv3d"}


def through(graph: Graph, node: Node) -> list[int]:
    """The inputs that carry the signal: of a product only the largest, the rest are gates."""
    sources = list(dict.fromkeys(node.inputs))
    if node.kind == "function" and node.name == "mul" and len(sources) > 1:
        sizes = {i: math.prod(graph.nodes[i].shape) for i in sources}
        largest = [i for i in sources if sizes[i] == max(sizes.values())]
        return (
            largest if len(largest) == 1 else [i for i in largest if not _squashes(graph.nodes[i])] or largest
        )
    return sources


def _squashes(node: Node) -> bool:
    name = name_of(node)
    return "sigmoid" in name or "softmax" in name or name == "tanh"


def name_of(node: Node) -> str:
    """Of a module its class, of a function its name, in lower case."""
    return (type(node.module).__name__ if node.module is not None else node.name).lower()


def kills(node: Node) -> bool:
    """Whether the node is an activation without slope at 0, or a module that ends in one."""
    return name_of(node) in _KILLING or flat_at_zero(getattr(node.module, "act", None))


def flat_at_zero(activation: nn.Module | None) -> bool:
    """Whether a module is an activation without slope at 0.

    Example:
        >>> flat_at_zero(nn.ReLU()), flat_at_zero(nn.SiLU()), flat_at_zero(None)
        (True, False, False)
    """
    return type(activation).__name__.lower() in _KILLING


def multiplies(node: Node) -> bool:
    """A gate, or a layer that is called as a function with a weight of its own (CondConv): what goes in does not set
    the size of what comes out."""
    gate = node.name == "mul" and len(node.inputs) > 1 and node.inputs[0] != node.inputs[1]
    return gate or (applies_weights(node) and bool(node.params))


def applies_weights(node: Node) -> bool:
    """Whether a node is a convolution or matrix product that is called as a function."""
    return node.kind == "function" and node.name in _WEIGHTS


def source(graph: Graph, index: int) -> Node:
    """The node that really produces this one's output: identities and dropout are walked through."""
    node = graph.nodes[index]
    while passes(node) and node.inputs:
        node = graph.nodes[node.inputs[0]]
    return node


def passes(node: Node) -> bool:
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
