"""The largest weights of attention and its logits: of a softmax that runs, and of the one inside a fused kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfnets.signal.points import kind
from nfnets.trace import Graph, Node

# Positions that attention must choose from for its largest weight to tell, and rows that are looked at.
_KEYS = 8
_SAMPLES = 4
# Times 1/√d that a fused kernel's scale may be.
_SCALED = 1.5


class Look(NamedTuple):
    """What one attention shows, on its device."""

    peak: Tensor | None = None
    """Mean over rows of the largest weight; not under a mask, where rows have one or two positions to choose from."""
    logits: Tensor | None = None
    """Where nothing scales the logits, the mean over rows of their variance."""


def look_at_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Look | None:
    """What goes into fused attention, which returns no weights, shows of them."""
    if key.shape[-2] < _KEYS or query.shape[-3] != key.shape[-3]:
        return None
    usual = 1 / math.sqrt(query.shape[-1])
    q, k = query[:_SAMPLES].detach().float(), key[:_SAMPLES].detach().float()
    weights = (q @ k.transpose(-2, -1) * (usual if scale is None else scale)).softmax(-1)
    masked = is_causal or attn_mask is not None
    scaled = scale is None or scale <= _SCALED * usual
    return Look(None if masked else weights.amax(-1).mean(), None if scaled else _variance(weights))


def look(nodes: Sequence[Node], output: Tensor, fused: Look | None) -> Look | None:
    """The largest weights, and the logits where nothing scales them, where a node is attention.

    Args:
        nodes: the calls so far; the last one is looked at.
        output: what it returned.
        fused: what the last fused call showed.

    Returns:
        What was seen, or `None`.
    """
    node = nodes[-1]
    if node.name == "scaled_dot_product_attention":
        free = fused is not None and fused.logits is not None and _free(nodes, node.inputs[:2])
        return fused if fused is None or free else fused._replace(logits=None)
    module = node.module
    soft = node.name == "softmax" or isinstance(module, torch.nn.Softmax)
    if not soft or output.dim() < 3:
        return None
    dim = getattr(module, "dim", None)
    if dim is None:
        dim = next((int(c) for c in node.constants if c == int(c)), -1)
    if dim % output.dim() != output.dim() - 1 or output.shape[-1] < _KEYS:
        return None
    weights = output.detach()[:_SAMPLES].float()
    free = bool(node.inputs) and unscaled(nodes, node.inputs[0])
    return Look(weights.amax(-1).mean(), _variance(weights) if free else None)


def _variance(weights: Tensor) -> Tensor:
    """Of the logits along a row: that of the weights' logarithms, which differ from them by a number a row."""
    seen = weights > 0
    logs = torch.where(seen, weights, 1.0).log()
    count = seen.sum(-1).clamp(min=1)
    return (logs.square().sum(-1) / count - (logs.sum(-1) / count).square()).mean()


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
_LAYERS = _PRODUCTS | {"linear", "addmm", "conv1d", "conv2d", "conv3d"}
_SCALES = {"mul", "div", "softmax", "rsqrt", "normalize", "linalg_norm"}


def unscaled(nodes: Sequence[Node], index: int) -> bool:
    """Whether a node is a product of two activations, on whose way from the last layers nothing rescales.

    Args:
        nodes: of the graph.
        index: what a softmax reads.

    Returns:
        False for what is no such product.
    """
    while nodes[index].name not in _PRODUCTS:
        node = nodes[index]
        if node.kind != "function" or node.name in _SCALES or not node.inputs:
            return False
        index = node.inputs[0]  # a mask or a bias that was added
    product = nodes[index]
    return _free(nodes, product.inputs) and not any(
        c not in (0, 1) for c in product.constants
    )  # baddbmm's alpha


def _free(nodes: Sequence[Node], operands: Sequence[int]) -> bool:
    return len(operands) == 2 and not any(_scaled(nodes, i) for i in operands)


def _scaled(nodes: Sequence[Node], index: int) -> bool:
    """Back to the layer that an operand comes from; an input of the model counts as scaled, whoever made it."""
    while (node := nodes[index]).kind == "function":
        if node.name in _SCALES or not node.inputs:
            return True
        if node.params and node.name in _LAYERS:
            return False
        index = node.inputs[0]
    return node.kind == "input" or "Norm" in type(node.module).__name__
