"""SkipInit: residual branches that start at zero, by one scalar each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nfnets.errors import UserError
from nfnets.init.branches import Branch, Residual, read_residual
from nfnets.init.knob import Knob, knob
from nfnets.init.report import Report, Row
from nfnets.init.skip_layers import TWINS, _Skip


def skipinit_(
    model: nn.Module,
    *inputs: Any,
    value: float = 0.0,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Report:
    """Start every residual branch at zero by its SkipInit scalar, and every layer at He's scale.

    x + α·F(x) with α = `value`; weights are normal with standard deviation √(2/fan_in) (√(1/fan_in) for the
    classifier) and biases 0. Gains of standardized layers become 1, their weights stay: a branch that starts at zero
    twice, α = 0 and a last layer of zeros, would never learn. At first only α, the shortcuts and the classifier learn.

    A branch whose α is in the model (`nfnets.layers.SkipInit`, or any one-element parameter that multiplies the
    branch after its last layer) keeps it there. Where there is none, the last layer becomes a subclass of itself that
    ends in a scalar, `skip_gain`: the path and the parameters stay, so make the optimizer afterwards.

    Args:
        model: a residual network without norm layers, changed in place.
        *inputs: example inputs, as `model(*inputs)` takes them; only shapes matter.
        value: α. 0, or at most 1/√blocks.
        generator: source of randomness; torch's global one by default.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per scalar, then per weight layer.

    Raises:
        UserError: norm layers, no residual branches, nested ones, a branch that has no scalar and does not end in a
            plain layer, parametrized weights, or inputs the model rejects; nothing is changed.

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
    net = read_residual(model, inputs, kwargs, "SkipInit")
    layers = _layers(model, net)
    scalars = {branch: _scalars(model, branch) for branch in net.branches}
    missing = [branch for branch in net.branches if not scalars[branch]]
    twins = {branch.last[0]: _twin(model, net, branch, value) for branch in missing}
    rows = []
    for names in scalars.values():
        for name in names:
            scalar = model.get_parameter(name)
            if not scalar.requires_grad:
                rows.append(Row(name, "frozen", "requires_grad is False"))
                continue
            with torch.no_grad():
                scalar.fill_(value)
            rows.append(Row(name, "set", f"α = {value:g}"))
    rows += [Row(f"{path}.skip_gain", "set", f"α = {value:g}, added") for path in twins]
    for path, twin in twins.items():
        old = model.get_submodule(path)
        for parent in model.modules():
            for name, child in parent.named_children():
                if child is old:
                    setattr(parent, name, twin)
    rows += [_set(path, layer, path in net.head, generator) for path, layer in layers.items()]
    return Report(f"SkipInit, {len(net.branches)} branches", rows)


def _layers(model: nn.Module, net: Residual) -> dict[str, Knob]:
    on_branch = [path for branch in net.branches for path in (*branch.inner, *branch.last)]
    found: dict[str, Knob] = {}
    for path in dict.fromkeys((*net.others, *on_branch, *net.head)):
        layer = knob(model.get_submodule(path))
        if isinstance(layer, str):
            raise UserError(f"{path}: {layer}; SkipInit sets plain weights, remove the parametrization first")
        found[path] = layer
    return found


def _scalars(model: nn.Module, branch: Branch) -> tuple[str, ...]:
    inside = [path for path in branch.last if isinstance(model.get_submodule(path), _Skip)]
    return branch.multipliers + tuple(f"{path}.skip_gain" for path in inside)


def _twin(model: nn.Module, net: Residual, branch: Branch, value: float) -> _Skip:
    """The branch's last layer, ending in a scalar."""
    layer = model.get_submodule(branch.last[0]) if len(branch.last) == 1 else None
    plain = TWINS.get(type(layer)) if layer is not None else None
    if layer is None or plain is None or not branch.ends_in_last or len(net.graph.calls(branch.last[0])) > 1:
        ends = ", ".join(branch.last)
        raise UserError(
            f"the branch of {branch.path or 'the root'} has no SkipInit scalar and does not end in one plain layer "
            f"(last: {ends}): multiply it by an nfnets.layers.SkipInit() before the add"
        )
    return plain.from_plain(layer, value)


def _set(path: str, layer: Knob, head: bool, generator: torch.Generator | None) -> Row:
    if not layer.parameter.requires_grad:
        return Row(path, "frozen", "requires_grad is False")
    fan_in = layer.direction.numel() // layer.units
    with torch.no_grad():
        if layer.parameter is not layer.direction:
            layer.parameter.fill_(1.0)
            reason = "gain = 1"
        else:
            layer.parameter.normal_(0, math.sqrt((1 if head else 2) / fan_in), generator=generator)
            reason = f"classifier: √(1/{fan_in})" if head else f"He: √(2/{fan_in})"
        if layer.bias is not None and layer.bias.requires_grad:
            layer.bias.zero_()
    return Row(path, "set", reason)
