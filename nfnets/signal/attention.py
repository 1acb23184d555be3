"""The largest weights of attention: of a softmax that runs, and of the one inside a fused kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nfnets.signal.points import kind
from nfnets.trace import Graph, Node

# Positions that attention must choose from for its largest weight to tell, and rows that are looked at.
_KEYS = 8
_SAMPLES = 4


def peak_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor | None:
    """The mean over rows of the largest weight of fused attention, which returns none, from what goes into it."""
    if is_causal or attn_mask is not None or key.shape[-2] < _KEYS or query.shape[-3] != key.shape[-3]:
        return None  # rows of a mask have one or two keys to choose from
    q, k = query[:_SAMPLES].detach().float(), key[:_SAMPLES].detach().float()
    logits = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    return logits.softmax(-1).amax(-1).mean()


def peak(node: Node, output: Tensor) -> Tensor | None:
    """The mean over rows of the largest weight, where a node is the softmax of attention.

    Args:
        node: the call.
        output: what it returned.

    Returns:
        A 0-dim tensor on the device, or `None`.
    """
    module = node.module
    soft = node.name == "softmax" or isinstance(module, torch.nn.Softmax)
    if not soft or output.dim() < 3:
        return None
    dim = getattr(module, "dim", None)
    if dim is None:
        dim = next((int(c) for c in node.constants if c == int(c)), -1)
    if dim % output.dim() != output.dim() - 1 or output.shape[-1] < _KEYS:
        return None
    return output.detach()[:_SAMPLES].amax(-1).float().mean()


def values_of(graph: Graph, node: Node) -> int | None:
    """What attention averages over positions, by weights of which theory knows nothing.

    Args:
        graph: of the pass.
        node: any of its calls.

    Returns:
        The node of the values, where this call is their product with a softmax, a fused kernel or
        `nn.MultiheadAttention`; else `None`.
    """
    if isinstance(node.module, torch.nn.MultiheadAttention):
        return node.inputs[-1] if node.inputs else None
    if node.name == "scaled_dot_product_attention":
        return node.inputs[2] if len(node.inputs) > 2 else None
    if node.name in _PRODUCTS and len(node.inputs) == 2:
        weights, values = node.inputs
        return values if _is_softmax(graph, weights) else None
    return None


def _is_softmax(graph: Graph, index: int) -> bool:
    """Whether a node holds attention's weights; views and dropout may lie between."""
    node = graph.nodes[index]
    if node.name == "softmax" or isinstance(node.module, torch.nn.Softmax):
        return True
    return kind(node) == "" and bool(node.inputs) and _is_softmax(graph, node.inputs[0])


_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "rmatmul"}
_SCALES = {"mul", "div", "softmax", "rsqrt", "normalize", "linalg_norm"}


def unscaled(graph: Graph, index: int) -> bool:
    """Whether a node is a product of two activations, on whose way from the last layers nothing rescales.

    Args:
        graph: of the pass.
        index: what a softmax reads.

    Returns:
        False for what is no such product.
    """
    node = graph.nodes[index]
    if node.name not in _PRODUCTS:
        passes = node.kind == "function" and node.name not in _SCALES and node.inputs
        return bool(passes) and unscaled(graph, node.inputs[0])  # a mask or a bias that was added
    return len(node.inputs) == 2 and not any(_scaled(graph, i) for i in node.inputs)


def _scaled(graph: Graph, index: int) -> bool:
    """Back to the layer that an operand comes from; an input of the model counts as scaled, whoever made it."""
    node = graph.nodes[index]
    if node.kind != "function":
        return node.kind == "input" or "Norm" in type(node.module).__name__
    return node.name in _SCALES or not node.inputs or _scaled(graph, node.inputs[0])
