"""SkipInit: residual branches that start at zero, by one scalar each."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from nfnets.errors import UserError
from nfnets.init.reading import read_residual
from nfnets.scale.knob import Knob, knobs_of
from nfnets.scale.one_pass import Write, normal_like, transaction
from nfnets.scale.report import Report, Row
from nfnets.skip_layers import SCALAR, with_scalar
from nfnets.structure.residual import Residual


def skipinit_(
    model: nn.Module,
    *inputs: Any,
    value: float = 0.0,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Start every residual branch at zero by its SkipInit scalar, and every layer at He's scale.

    x + α·F(x) with α = `value`; weights are normal with standard deviation √(2/fan_in) (√(1/fan_in) for the
    classifier) and biases 0. Gains of standardized layers become 1, their weights stay: a branch that starts at zero
    twice, α = 0 and a last layer of zeros, would never learn. At first only α, the shortcuts and the classifier learn.

    A branch whose α is in the model (`nfnets.layers.SkipInit`, or any one-element parameter that multiplies the
    branch after its last layer) keeps it there. Where there is none, the module that ends the branch gets a scalar of
    its own, `skip_gain`: the path and the parameters stay, so make the optimizer afterwards. That is the last layer
    (a convolution or linear becomes a subclass of itself), or an activation behind it that has no slope at 0, or the
    last layer of each of several parallel paths. Branches inside a branch have scalars of their own.

    Args:
        model: a residual network without norm layers, changed in place.
        *inputs: example inputs, as `model(*inputs)` takes them; only shapes matter.
        value: α. 0, or at most 1/√blocks.
        generator: source of randomness; torch's global one by default.
        layers: paths of the layers to set; None for all. The others, and branches with none of them, are left.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per scalar, then per weight layer.

    Raises:
        UserError: batch norm layers, no residual branches, a branch that has no scalar and does not end in a module,
            parametrized weights, or inputs the model rejects; nothing is changed.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18(norm_layer=lambda channels: nn.Identity())
        >>> report = skipinit_(model, torch.randn(1, 3, 32, 32))
        >>> x = torch.rand(1, 64, 8, 8)
        >>> torch.equal(model.layer1[0](x), x)
        True

    Paper: arXiv 2002.10444. DeepMind's NF-ResNets start the scalar at 0 too; timm's zero the last gain instead.
    """
    if not math.isfinite(value):
        raise UserError(f"value={value}: expected a finite number; pass value=0.0")
    net = read_residual(model, inputs, kwargs, "SkipInit", layers)
    on_branch = [path for branch in net.branches for path in (*branch.inner, *branch.last)]
    knobs = knobs_of(model, (*net.others, *on_branch, *net.head), "SkipInit")
    scalars = [name for branch in net.branches for name in branch.multipliers]
    twins = {path: with_scalar(model.get_submodule(path), value) for path in _missing(net)}
    rows = []
    with transaction() as write:
        for name in dict.fromkeys(scalars):
            scalar = model.get_parameter(name)
            if not scalar.requires_grad:
                rows.append(Row(name, "frozen", "requires_grad is False"))
                continue
            write(scalar, torch.full_like(scalar, value))
            rows.append(Row(name, "set", f"α = {value:g}"))
        rows += [Row(f"{path}.{SCALAR}", "set", f"α = {value:g}, added") for path in twins]
        rows += [_set(path, layer, path in net.head, generator, write) for path, layer in knobs.items()]
    for path, twin in twins.items():
        old = model.get_submodule(path)
        for parent in model.modules():
            for name, child in parent.named_children():
                if child is old:
                    setattr(parent, name, twin)
    return Report(f"SkipInit, {len(net.branches)} branches", rows)


def _missing(net: Residual) -> list[str]:
    """Modules that end a branch without a scalar."""
    found: dict[str, None] = {}
    for branch in net.branches:
        if not branch.multipliers and branch.obstacle:
            raise UserError(
                f"the branch of {branch.path or 'the root'} has no SkipInit scalar and no place for one: "
                f"{branch.obstacle}; multiply it by an nfnets.layers.SkipInit() before the add"
            )
        if not branch.multipliers:
            found |= dict.fromkeys(branch.ends)
    return list(found)


def _set(path: str, layer: Knob, head: bool, generator: torch.Generator | None, write: Write) -> Row:
    if not layer.parameter.requires_grad:
        return Row(path, "frozen", "requires_grad is False")
    fan_in = layer.direction.numel() // layer.units
    if layer.parameter is not layer.direction:
        write(layer.parameter, torch.ones_like(layer.parameter))
        reason = "gain = 1"
    else:
        write(
            layer.parameter, normal_like(layer.parameter, math.sqrt((1 if head else 2) / fan_in), generator)
        )
        reason = f"classifier: √(1/{fan_in})" if head else f"He: √(2/{fan_in})"
    if layer.bias is not None and layer.bias.requires_grad:
        write(layer.bias, torch.zeros_like(layer.bias))
    return Row(path, "set", reason)
