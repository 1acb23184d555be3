"""What no method can convert: models, example inputs and norm layers, each with its reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nfnets.convert.own_norm import more_than_normalizes
from nfnets.convert.plan import Change
from nfnets.errors import UserError
from nfnets.graph import Graph
from nfnets.nested import no_sample, tensors_in
from nfnets.preserve import check_ordinary
from nfnets.structure.laws import NormKind
from nfnets.structure.norms import norm_layers
from nfnets.structure.sites import Site
from nfnets.trace import is_batch_norm_like

FUNCTIONS: dict[NormKind, set[str]] = {
    "batch": {"batch_norm", "native_batch_norm", "cudnn_batch_norm"},
    "group": {"group_norm", "native_group_norm"},
    "instance": {"instance_norm"},
    "layer": {"layer_norm", "native_layer_norm"},
    "rms": {"rms_norm"},
}
_LAYERS = {"batch": "BatchNorm", "group": "GroupNorm", "instance": "InstanceNorm"}
_LAYERS |= {"layer": "LayerNorm", "rms": "RMSNorm"}
_QUANTIZED = ("torch.ao.quantization.", "torch.ao.nn.", "torchao.")
_HARMLESS = {"QuantStub", "DeQuantStub", "QuantWrapper", "FloatFunctional"}
"""Of torch's quantization, what floating-point models hold as well."""


def check_model(model: nn.Module, inplace: bool = False) -> None:
    """Refuse a model that cannot be edited, or whose values are not numbers.

    Args:
        model: what was given for one.
        inplace: whether it is to be changed itself.

    Raises:
        UserError: names the module or the parameter.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if is_batch_norm_like(model):
        check_whole(model)
    for path, module in model.named_modules():
        where = f"{path or 'the model'} is a {type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{where}: scripted modules cannot be edited; convert the model before scripting it"
            )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UserError(f"{where}: expected the bare model; convert its .module, then wrap it again")
        if f"{type(module).__module__}.".startswith(_QUANTIZED) and type(module).__name__ not in _HARMLESS:
            raise UserError(
                f"{where} of a model that is quantized or prepared for it: expected the floating-point model; "
                "convert before quantizing"
            )
        held: tuple[Any, ...] = (*module._parameters.values(), *module._buffers.values())
        if any(map(nn.parameter.is_lazy, held)):
            raise UserError(f"{where} without shapes yet; run the model once before converting it")
    if inplace:
        check_ordinary(model)
    _check_values(model)


def check_whole(norm: nn.Module) -> NoReturn:
    """Refuse a model that is a norm layer itself."""
    raise UserError(f"the model itself is a {type(norm).__name__}: expected the model that it is a part of")


def _check_values(model: nn.Module) -> None:
    """Norm layers' own are for their rows: `strict=False` leaves such a layer."""
    norms = tuple(f"{path}." for path in norm_layers(model))
    named = {name: p for name, p in model.named_parameters() if not name.startswith(norms)}
    buffers = {name: b for name, b in model.named_buffers() if not name.startswith(norms)}
    name = _first_unsound(named)
    if name is not None:
        raise UserError(f"{name} holds NaN or infinity: expected finite weights; load or initialize it anew")
    name = _first_unsound(buffers, infinity=True)  # masks hold it
    if name is not None:
        raise UserError(f"{name} holds NaN: expected numbers in every buffer; load or initialize it anew")


def check_example(*values: Any) -> None:
    """Refuse example inputs that hold no sample, NaN or infinity: everything is measured on them."""
    if empty := no_sample(values):
        raise UserError(empty)
    tensors = tensors_in(values)
    position = _first_unsound({str(index): tensor for index, tensor in enumerate(tensors)})
    if position is not None:
        shape = tuple(tensors[int(position)].shape)
        raise UserError(
            f"tensor {position} of the example inputs, of shape {shape}, holds NaN or infinity: expected finite "
            "values; pass real images"
        )


def _first_unsound(tensors: Mapping[str, Tensor], infinity: bool = False) -> str | None:
    """The first tensor that holds NaN or, unless it is allowed, infinity. A sum says quickly that none does."""
    held = {
        name: t.detach()
        for name, t in tensors.items()
        if t.is_floating_point() and not t.is_meta and t.layout == torch.strided and t.element_size() > 1
    }
    for device in {t.device for t in held.values()}:
        here = {name: t for name, t in held.items() if t.device == device}
        sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).float() for t in here.values()]
        if bool(torch.stack(sums).isfinite().all()):
            continue
        for name, tensor in here.items():  # a sum may overflow
            if bool((tensor.isnan() if infinity else ~tensor.isfinite()).any()):
                return name
    return None


def reason_against(graph: Graph, site: Site) -> str:
    """Why a norm layer cannot be replaced; empty if it can be."""
    read = min((name for name in graph.read if name.startswith(f"{site.path}.")), default=None)
    if read is not None:
        return f"the forward reads {read} besides calling the layer"
    named = [*site.norm.named_parameters(), *site.norm.named_buffers()]
    unsound = _first_unsound(dict(named), infinity=True)
    if unsound is not None:
        return f"its {unsound} is not finite"
    return more_than_normalizes(graph, site)


def function_rows(
    model: nn.Module, graph: Graph, kinds: Collection[NormKind] = ("batch",)
) -> Iterable[Change]:
    """A row for every module whose forward calls normalization as a function, on something that is no weight."""
    wanted = {name: kind for kind in kinds for name in FUNCTIONS[kind]}
    inputs = [node.index for node in graph.nodes if node.kind == "input"]
    found: dict[str, Change] = {}
    for node in graph.nodes:
        signal = node.name in wanted and any(graph.depends(node.index, index) for index in inputs)
        if node.kind == "function" and signal and node.path not in found:
            kind = type(model.get_submodule(node.path)).__name__
            layer = f"nn.{_LAYERS[wanted[node.name]]}"
            why = f"{kind}.forward calls F.{node.name}, or a layer that is no submodule: register an {layer}"
            reads = graph.nodes[node.inputs[0]].name
            found[node.path] = Change(
                node.path, action="refuse", why=why, role="function", norm=f"F.{node.name}", reads=reads
            )
    return found.values()
