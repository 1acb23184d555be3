"""Affines in norm layers' places, folded into the layers that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nfnets.computed import has_own_weight
from nfnets.copying import twin_of
from nfnets.graph import Graph, Node
from nfnets.layers import ChannelAffine, DynamicErf, DynamicTanh, Scale
from nfnets.scale.knob import channel_dim
from nfnets.structure.own_forward import with_parameters
from nfnets.structure.walk import is_hooked, is_weighted

AFFINES = (DynamicTanh, DynamicErf, Scale, ChannelAffine)


def folded_onward(graph: Graph) -> dict[nn.Module, nn.Module]:
    """New modules by those that they replace, wherever an affine is read by layers alone and folds into them exactly.

    W ← W · diag(m), b ← b + W · s, for an affine m · x + s: γ and β of a `DynamicTanh` or `DynamicErf`, a `Scale`, a
    `FixedVariance`, a `ChannelAffine`. In fp64, kept in the layer's type. Not where a layer pads with zeros what is
    shifted, where hooks see the affine or the layer, or where either runs more than once.

    Args:
        graph: of a model whose standardized layers are baked, each of its affines one node.
    """
    became: dict[nn.Module, nn.Module] = {}
    for node in graph.nodes:
        if not isinstance(node.module, AFFINES) or not _alone(graph, node):
            continue
        scale, shift, rest = _parts(node.module)
        readers = [graph.nodes[index] for index in graph.consumers(node.index)]
        layers = [reader.module for reader in readers]
        takes = all(_takes(graph, node, reader, scale, shift) for reader in readers)
        if not layers or not takes or node.index in graph.outputs or any(layer in became for layer in layers):
            continue
        became |= {layer: _with_affine(layer, scale, shift) for layer in layers if layer is not None}
        became[node.module] = rest
    return became


def affines(model: nn.Module) -> frozenset[nn.Module]:
    """The modules that may fold: what a trace for `folded_onward` takes as one node each."""
    return frozenset(module for module in model.modules() if isinstance(module, AFFINES))


def _alone(graph: Graph, node: Node) -> bool:
    return len(graph.calls(node.path)) == 1 and not graph.other_readers(node) and not is_hooked(node.module)


def _parts(module: Any) -> tuple[Tensor, Tensor | None, nn.Module]:
    """Multiplier and shift in fp64, and what is left of the module."""
    if isinstance(module, DynamicTanh | DynamicErf):
        rest = twin_of(module)
        rest._parameters |= {"weight": None, "bias": None}
        weight = module.alpha.new_ones(()) if module.weight is None else module.weight
        return weight.detach().double(), _double(module.bias), rest
    weight = module.value if isinstance(module, Scale) else module.weight
    return weight.detach().double(), _double(getattr(module, "bias", None)), nn.Identity()


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double()


def _takes(graph: Graph, node: Node, reader: Node, scale: Tensor, shift: Tensor | None) -> bool:
    layer: Any = reader.module
    ours: Any = node.module
    if not is_weighted(layer) or not has_own_weight(layer) or not _alone(graph, reader):
        return False
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) or scale.ndim > 1 or len(reader.inputs) != 1:
        return False
    rank = len(node.shape)
    dim = getattr(ours, "channel_dim", 1) % rank
    per_channel = scale.ndim == 1 or shift is not None
    if per_channel and dim != rank + channel_dim(layer):
        return False
    constant = shift is None or not bool(shift.any())
    pads = not isinstance(layer, nn.Linear) and (isinstance(layer.padding, str) or any(layer.padding))
    return constant or not pads or layer.padding_mode != "zeros"


def _with_affine(layer: nn.Module, scale: Tensor, shift: Tensor | None) -> nn.Module:
    weight: Tensor = layer.weight.detach().double()  # type: ignore[operator]
    groups: int = getattr(layer, "groups", 1)
    rows = weight.unflatten(0, (groups, -1))  # groups, out/groups, in/groups, *kernel
    kernel = (1,) * (weight.ndim - 2)

    def inputs(value: Tensor) -> Tensor:
        return value if value.ndim == 0 else value.reshape(groups, 1, -1, *kernel)

    new = {"weight": (rows * inputs(scale)).flatten(0, 1).to(layer.weight.dtype)}  # type: ignore[arg-type]
    if shift is not None:
        added = (rows * inputs(shift)).flatten(2).sum(-1).flatten()
        bias = layer._parameters.get("bias")
        new["bias"] = (added if bias is None else added + bias.detach().double()).to(layer.weight.dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        return with_parameters(layer, **new)
