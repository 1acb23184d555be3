"""Fixup initialization of residual networks without normalization."""

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
from nfnets.structure.residual import Residual


def fixup_(
    model: nn.Module,
    *inputs: Any,
    num_blocks: int | None = None,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Initialize a residual network without norm layers so that one step changes its function alike at any depth.

    With L residual branches, and m weight layers on a branch, weights are normal with standard deviation

        branch layers but the last    √(2/fan_out) · L^(−1/(2m−2))      (L^−½ for m = 2, L^−¼ for m = 3)
        each branch's last layer      0
        the classifier                0
        stem, shortcuts, the rest     √(2/fan_out)

    and every bias 0; one-element parameters that are added (`ScalarBias`) are 0, those that multiply
    (`ScalarMultiplier`) 1. Branches are read off the traced graph. One inside another counts for itself: L is the
    number of all branches, and a layer belongs to the innermost branch that it lies on, where it counts for m. Where
    an activation without slope at 0 (ReLU) follows a branch's last layer, a layer of zeros would never learn: there
    the multiplier behind it is 0 and the last layer is drawn as the others of the branch. Layers of a squeeze-excite
    gate, and layers whose weight does not require gradients, are left as they are.

    Give the scalars a tenth of the learning rate (`nfnets.param_groups` does), and expect to need mixup or a similar
    regularizer where BatchNorm regularized.

    Args:
        model: the residual network, changed in place. It should have the scalars of rule 3: a bias before each
            convolution and activation, a multiplier at each branch end.
        *inputs: example inputs, as `model(*inputs)` takes them; only shapes matter.
        num_blocks: L; the number of branches found by default.
        generator: source of randomness; torch's global one by default.
        layers: paths of the layers to set; None for all. The others, and branches with none of them, are left.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per weight layer.

    Raises:
        UserError: batch norm layers, no residual branches, one that ends in an activation without slope at 0 and has
            no multiplier behind it, standardized or parametrized weights, or inputs the model rejects; nothing is
            changed.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18(norm_layer=lambda channels: nn.Identity(), num_classes=10)
        >>> report = fixup_(model, torch.randn(2, 3, 32, 32))
        >>> print(report["layer1.0.conv1"].reason)
        branch: √(2/576) · 8^(−1/2)
        >>> model(torch.randn(2, 3, 32, 32)).abs().max().item()
        0.0

    Paper: arXiv 1901.09321. Checked against the authors' repository, whose summary on Papers with Code drops the
    minus sign of the exponent, and which leaves the stem at torch's default where the rule says He.
    """
    if num_blocks is not None and (not isinstance(num_blocks, int) or num_blocks < 1):
        raise UserError(
            f"num_blocks={num_blocks}: expected an integer above 0, or None to count the branches"
        )
    net = read_residual(model, inputs, kwargs, "Fixup", layers)
    clipped = [branch for branch in net.branches if branch.clipped]
    if stuck := [branch.path or "the root" for branch in clipped if not branch.multipliers]:
        raise UserError(
            f"the branch of {stuck[0]} ends in an activation without slope at 0: behind it a layer of zeros never "
            "learns; put an nfnets.init.ScalarMultiplier after the activation"
        )
    zero = [name for branch in clipped for name in branch.multipliers]
    with transaction() as write:
        rows = fixup_layers(model, net, num_blocks or len(net.branches), generator, write)
        everywhere = layers is None  # else one-element parameters may belong to layers that are left
        for names, value in (
            (net.scalar_biases if everywhere else (), 0.0),
            (net.scalar_multipliers if everywhere else (), 1.0),
            (zero, 0.0),
        ):
            for name in names:
                parameter = model.get_parameter(name)
                if parameter.requires_grad:
                    write(parameter, torch.full_like(parameter, value))
    return Report(f"Fixup, L = {num_blocks or len(net.branches)}", rows)


def fixup_layers(
    model: nn.Module, net: Residual, num_blocks: int, generator: torch.Generator | None, write: Write
) -> list[Row]:
    """Set the weight layers; a row for each, in execution order."""
    factors: dict[str, tuple[float, str]] = {}
    for path in net.others:
        factors[path] = (1.0, "")
    for branch in net.branches:
        power = 0.0 if branch.depth < 2 else -1 / (2 * branch.depth - 2)
        shown = f" · {num_blocks}^(−1/{2 * branch.depth - 2})" if power else ""
        factors.update((path, (num_blocks**power, shown)) for path in branch.inner)
        last = (num_blocks**power, shown) if branch.clipped else (0.0, "branch end")
        factors.update((path, last) for path in branch.last)
    factors.update((path, (0.0, "classifier")) for path in net.head)
    gates = {path for branch in net.branches for path in branch.gates}
    order = dict.fromkeys(node.path for node in net.graph.nodes if node.path in factors or node.path in gates)
    knobs = plain_knobs(model, [path for path in order if path in factors], "Fixup")
    rows = []
    for path in order:
        if path in gates:
            rows.append(Row(path, "skipped", "a gate beside the branch"))
            continue
        factor, reason = factors[path]
        layer = knobs[path]
        if not layer.parameter.requires_grad:
            rows.append(Row(path, "frozen", "requires_grad is False"))
            continue
        outgoing = fan_out(layer)
        if factor == 0:
            write(layer.parameter, torch.zeros_like(layer.parameter))
            reason = f"zero: {reason}"
        else:
            write(layer.parameter, normal_like(layer.parameter, factor * math.sqrt(2 / outgoing), generator))
            reason = f"{'branch' if reason else 'He'}: √(2/{outgoing}){reason}"
        if layer.bias is not None and layer.bias.requires_grad:
            write(layer.bias, torch.zeros_like(layer.bias))
        rows.append(Row(path, "set", reason))
    return rows


def fan_out(layer: Knob) -> int:
    """Outputs that one input feeds: out/groups · kernel. (In a grouped convolution an input feeds its group only.)"""
    return layer.direction.numel() // layer.inputs


def plain_knobs(model: nn.Module, paths: list[str], what: str) -> dict[str, Knob]:
    """The layers' knobs; UserError if one's output does not scale with its own weight."""
    found = knobs_of(model, paths, what)
    for path, layer in found.items():
        if layer.parameter is not layer.direction:
            raise UserError(
                f"{path} ({type(model.get_submodule(path)).__name__}) has a norm of its own beside its weight: {what} "
                "sets plain convolutions and linears; for others use the method nf, or LSUV (the method lsuv, "
                "nfnets.init.lsuv_)"
            )
    return found
