"""Layer-sequential unit-variance initialization in one forward pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from nfnets.errors import UserError
from nfnets.init.orthogonal import orthonormal_rows
from nfnets.scale.engine import set_scales
from nfnets.scale.knob import Knob, is_weight_layer, knob
from nfnets.scale.one_pass import Write, check, transaction
from nfnets.scale.report import Report, Row
from nfnets.scale.target import Target
from nfnets.trace import Graph

_FROZEN = "requires_grad is False"
_log = logging.getLogger("nfnets")

_FUNCTIONAL = {"conv1d", "conv2d", "conv3d", "linear", "bilinear"}
_FUNCTIONAL |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_WITH_PARAMETER = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}


def lsuv_(
    model: nn.Module,
    *inputs: Any,
    target_std: float = 1.0,
    orthonormal: bool = True,
    per_channel: bool = False,
    strict: bool = True,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Scale every convolution and linear, in ONE forward pass, so that its output has unit variance.

    W ← c·W in execution order, with c > 0 the root of Var(c·z + b) = target_std², z the output less the bias b:

        c = (−Cov(z, b) + √(Cov(z, b)² − Var z · (Var b − target_std²))) / Var z,

    which is target_std / std(out) for a layer without bias. Variances are over the whole output tensor (batch,
    channels and space), as `torch.var` takes them. The hook returns the rescaled output, so that one pass gives what
    LSUV's loop of forward passes gives on a fixed batch.

    What is scaled is the weight, the `gain` of a standardized layer, the g of weight norm, the output projection of
    attention. Left alone and listed: layers whose parameter does not require gradients (`frozen`), dead and
    non-finite outputs and biases too large for any root (`skipped`), second calls and tied weights (`shared`),
    layers no call reached (`unreached`), functional convolutions and scripted modules (`invisible`). Biases,
    activations, norm layers, modes, buffers and devices are not touched. Under distributed training, call it on one
    rank and broadcast the parameters.

    Unit variance is not yet a healthy signal: the whole tensor's variance can be all mean shift between channels.
    The report shows the variance within channels and the squared channel mean apart; `per_channel=True` sets both.

    Args:
        model: the model, changed in place, where it is. The pass runs in the mode that the model is in: in training
            norm layers normalize by the batch and dropout drops (by masks from a key), as when training starts.
        *inputs: one training batch, as `model(*inputs)` takes it. A large one estimates the variances well.
        target_std: standard deviation of every layer's output.
        orthonormal: first replace every weight by a random orthonormal matrix (units × the rest), as the paper does.
            All-zero weights are left zero: Fixup and zero-initialized branches stay what they are.
        per_channel: scale and shift every output channel to mean 0 and standard deviation `target_std` of its own
            (weight norm's data-dependent initialization). A layer without bias keeps its means.
        strict: refuse a model with layers that cannot be scaled; otherwise leave those and list them as `refused`.
        generator: source of randomness of the orthonormal matrices; torch's global one by default.
        layers: paths of the layers to set; None for all. The others are left, and not in the report.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per layer in execution order; `print` it for a table.

    Raises:
        UserError: no such layer, one under a parametrization other than weight norm, lazy or meta parameters, a
            forward that fails; the model is as before.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
        >>> x = torch.randn(16, 3, 8, 8)
        >>> report = lsuv_(model, x)
        >>> [f"{row.path} {row.action} {row.std:.3f}" for row in report]
        ['0 set 1.000', '2 set 1.000']
        >>> f"{model(x).std():.4f}"
        '1.0000'

    Paper: arXiv 1511.06422; per channel: arXiv 1602.07868 §3. Checked against PyPI `lsuv` 0.3.0 where that is right.
    """
    if not (isinstance(target_std, int | float) and 0 < target_std < math.inf):
        raise UserError(f"target_std={target_std}: expected a finite number above 0; pass target_std=1.0")
    check(model, inputs, kwargs)
    knobs, others = find_knobs(model, per_channel, layers)
    if not knobs and not others:
        raise UserError(f"{type(model).__name__} has no convolution or linear layer: nothing to initialize")
    if strict and any(row.action == "refused" for row in others):
        listed = "; ".join(f"{row.path}: {row.reason}" for row in others if row.action == "refused")
        raise UserError(
            f"layers that cannot be scaled: {listed}. Remove the parametrization, "
            "or pass strict=False to leave them as they are"
        )
    channels = math.inf if per_channel else None
    target = Target(float(target_std), "variance", channels=channels)
    with transaction() as write:
        if orthonormal:
            orthonormalize(knobs, write, generator)
        graph, trials = set_scales(model, *inputs, targets=dict.fromkeys(knobs, target), **kwargs)
        unruly = next((trial.path for trial in trials if trial.action == "refused"), None)
        if strict and unruly is not None:
            raise UserError(
                f"{unruly} ({type(model.get_submodule(unruly)).__name__}) does not follow its weight: its output is "
                "not c times as large for a c times larger weight; nothing was changed, freeze it "
                "(requires_grad_(False)) or pass strict=False to leave it out"
            )
        if not trials and not others and not _invisible(model, graph):
            raise UserError(
                f"{type(model).__name__}'s forward calls none of its {len(knobs)} layers: nothing to initialize"
            )
    reached = {trial.path for trial in trials}
    unreached = [
        Row(path, "unreached", "not called, or with an empty output") for path in knobs if path not in reached
    ]
    rows = [*(trial.row() for trial in trials), *others, *unreached, *_invisible(model, graph)]
    report = Report(f"LSUV, target std {target_std:g}", rows)
    for row in report:
        if row.action == "skipped" or (row.action == "invisible" and layers is None):
            _log.warning("lsuv_: %s %s: %s", row.path, row.action, row.reason)
    return report


def find_knobs(
    model: nn.Module, per_channel: bool = False, layers: Collection[str] | None = None
) -> tuple[dict[str, Knob], list[Row]]:
    """The layers that can be scaled, and a row for each that cannot."""
    knobs: dict[str, Knob] = {}
    others: list[Row] = []
    for path, module in model.named_modules():
        if not is_weight_layer(module) or (layers is not None and path not in layers):
            continue
        found = knob(module)
        if isinstance(found, Knob) and per_channel and found.unit_shape is None:
            found = "its weight norm has no g per output channel; use per_channel=False"
        if isinstance(found, Knob):
            knobs[path] = found
        elif any(parameter.requires_grad for parameter in module.parameters()):
            others.append(Row(path, "refused", found))
        else:
            others.append(Row(path, "frozen", _FROZEN))
    return knobs, others


def orthonormalize(knobs: dict[str, Knob], write: Write, generator: torch.Generator | None = None) -> None:
    """Draw a random orthonormal matrix for every weight that learns and is not all zeros."""
    done: set[int] = set()
    for layer in knobs.values():
        weight = layer.direction
        trainable = weight.requires_grad and layer.parameter.requires_grad
        if id(weight) in done or not trainable or not weight.detach().any():
            continue
        done.add(id(weight))
        rows = orthonormal_rows(layer.units, weight.numel() // layer.units, weight, generator)
        write(weight, layer.from_rows(rows).to(weight.dtype))


def _invisible(model: nn.Module, graph: Graph) -> list[Row]:
    """Weights that no hook sees: read by functions, or inside scripted modules."""
    rows = []
    for node in graph.nodes:
        product = node.name in _FUNCTIONAL or (node.name in _WITH_PARAMETER and node.params)
        if node.kind == "function" and product:
            of = ", ".join(node.params) or "a computed weight"
            rows.append(Row(node.path, "invisible", f"functional {node.name} of {of}: no module to scale"))
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    for path in scripted:
        within = any(path.startswith(f"{outer}.") for outer in scripted)
        if not within and any(True for _ in model.get_submodule(path).parameters()):
            rows.append(Row(path, "invisible", "scripted: its layers cannot be seen"))
    return rows
