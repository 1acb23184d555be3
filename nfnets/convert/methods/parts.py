"""What methods share: replacements for a norm layer, and changes to the layers that feed it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nfnets.computed import has_own_weight
from nfnets.convert.fused import after, held_at, like
from nfnets.convert.plan import Action, Change, Edit
from nfnets.copying import twin_of
from nfnets.functional import EPS
from nfnets.layers import Scale, fan_in, scaled_std_class
from nfnets.scale.knob import knob
from nfnets.scale.target import Target
from nfnets.structure.own_forward import affine_in_parameters, units, with_parameters
from nfnets.structure.readers import fed_through_sums, overwritten, scalable
from nfnets.structure.sites import Site
from nfnets.trace import Graph, Node


def site_row(
    site: Site,
    action: Action,
    replaced: str,
    reason: str,
    *edits: Edit,
    targets: Mapping[str, Target] | None = None,
) -> Change:
    """A plan's row for a site."""
    return Change(site, replaced, *edits, why=reason, action=action, targets=targets)


def layer_row(
    node: Node, role: str, replaced: str, reason: str, *edits: Edit, target: Target | None = None
) -> Change:
    """A plan's row for a convolution or linear that changes although no norm layer reads it alone."""
    return Change(node, replaced, *edits, why=reason, role=role, target=target)


def vacated(graph: Graph, site: Site) -> tuple[str, Edit]:
    """What stands in place of a norm layer that goes: an identity, or a copy where something else reads the same
    tensor and the next layer would write over it. The norm layer had put out a new one.
    """
    alone = site.feeder is not None
    if alone or not any(overwritten(graph, call) for call in site.calls):
        return "Identity", Edit(site.path, after if alone else _with_own_activation)
    return "Scale", Edit(site.path, _copying)


def _with_own_activation(norm: nn.Module) -> nn.Module:
    new = after(norm)
    for name, child in new.named_children():
        if getattr(child, "inplace", False):
            apart = twin_of(child)
            apart.inplace = False  # type: ignore[assignment]
            setattr(new, name, apart)
    return new


def _copying(norm: nn.Module) -> nn.Module:
    return after(norm, Scale(1.0, **like(norm)))


def biased(layer: nn.Module, shift: Tensor | None = None) -> nn.Module:
    """The layer with a bias, 0 at first: the norm layer's shift is what it would lose with the norm layer. It learns
    where the shift did, or anything of the layer's does."""
    if layer.bias is not None:
        return layer
    own = next(layer.parameters())  # reading a computed weight would run what computes it
    twin = with_parameters(layer, bias=own.new_zeros(units(layer)).detach())
    if shift is not None and shift.requires_grad:
        twin.bias.requires_grad_()  # type: ignore[operator]
    return twin


def bias_edits(graph: Graph, node: Node | None, norm: nn.Module | None = None) -> tuple[Edit, ...]:
    """What gives a layer the bias that a norm layer was: nothing if it has one, or if its forward would not add it."""
    lacks = node is not None and node.module is not None and node.module.bias is None
    computed = lacks and node.module._parameters.get("weight") is None  # type: ignore[union-attr]
    takes = lacks and (computed or affine_in_parameters(graph, node))
    shift = None if norm is None else norm._parameters.get("bias")
    return (Edit(node.path, partial(biased, shift=shift)),) if takes and node is not None else ()


def channels_of(norm: nn.Module) -> int:
    """The number of channels a norm layer is made for."""
    known = getattr(norm, "num_features", None)
    return int(known) if known is not None else len(norm.running_mean)  # type: ignore[arg-type]


def learns(norm: nn.Module, name: str) -> bool:
    """Whether what stands for a norm layer's γ (`"weight"`) or β (`"bias"`) is to learn: not where that is a parameter
    without gradients. Where there is none, or a frozen buffer, it is."""
    own = norm._parameters.get(name)
    return own is None or own.requires_grad


def carry_affine(norm: nn.Module, to: nn.Module) -> None:
    """Give the norm layer's γ and β to its replacement: the parameters themselves, or copies of frozen buffers, which
    learn."""
    for name in ("weight", "bias"):
        value = getattr(norm, name, None)
        if isinstance(value, Tensor):
            setattr(to, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value.clone()))


def positions(graph: Graph, site: Site) -> int:
    """Values that a norm layer sees in one channel of one sample, at least; 1 if the forward pass never runs it."""
    return min((math.prod(graph.nodes[call].shape[2:]) for call in site.calls), default=1)


def group_count(channels: int, positions: int, most: int = 32, least: int = 16) -> int:
    """The largest number of groups with 2 channels or more and, over space, 16 values or more in each; else 1.

    A group of two values is normalized to ±1 whatever they were, so features without space get fewer groups.

    Example:
        >>> group_count(64, 49), group_count(24, 49), group_count(64, 1), group_count(7, 49)
        (32, 12, 4, 1)
    """
    fitting = (
        groups
        for groups in range(min(most, channels // 2), 0, -1)
        if channels % groups == 0 and channels // groups * positions >= least
    )
    return next(fitting, 1)


def groups_or_reason(graph: Graph, site: Site, wanted: int | None) -> int | str:
    """How many groups a group-wise replacement gets here, or why there can be none."""
    channels, space = channels_of(site.norm), positions(graph, site)
    groups = group_count(channels, space) if wanted is None else wanted
    if channels % groups:
        return f"num_groups={groups} does not divide its {channels} channels"
    values = channels // groups * space
    if values < 3:
        return f"a group would hold {values} value{'s' * (values != 1)} a sample, too few to normalize"
    return groups


def standardizable(module: nn.Module | None) -> bool:
    """Whether scaled weight standardization makes sense of a layer."""
    return not plain_because(module)


def plain_because(module: nn.Module | None) -> str:
    """Why a layer stays plain where others are standardized; empty if it does not.

    Without its mean a filter of equal weights (a box, a mean over channels) is nothing, and one that is not to change
    is another.

    Example:
        >>> box = nn.Conv2d(1, 1, 3, bias=False)
        >>> plain_because(box), plain_because(box.requires_grad_(False))
        ('', 'frozen')
        >>> _ = nn.init.constant_(box.requires_grad_().weight, 1 / 9)
        >>> plain_because(box)
        'a filter of equal weights'
    """
    if module is None or not has_own_weight(module):
        return "its weight or forward is its own"
    groups = getattr(module, "groups", 1)
    if (groups > 1 and groups == getattr(module, "in_channels", 0)) or fan_in(module) < 2:
        return "depthwise or fan-in 1"
    if not module.weight.requires_grad:
        return "frozen"
    return "a filter of equal weights" if _loses_a_filter(module) else ""


def _loses_a_filter(layer: nn.Module) -> bool:
    """Whether standardization leaves next to nothing of a filter: what it divides by has a floor, and the filter's
    weights differ by less than a hundredth of their mean. Zeros have nothing to lose."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    found = knob(layer)
    if weight.is_meta or isinstance(found, str):
        return False
    variance, mean = torch.var_mean(found.rows(weight).float(), 1, correction=0)
    return bool(((fan_in(layer) * variance < 0.01 * EPS) & (variance < 1e-4 * mean.square())).any())


def standardized(layer: nn.Module, alpha: float = 1.0) -> nn.Module:
    """The layer's scaled-standardized twin."""
    twin = scaled_std_class(layer)
    assert twin is not None
    return twin.from_plain(layer, alpha=alpha)


def twin_name(node: Node) -> str:
    """Class name of a layer's scaled-standardized twin."""
    twin = scaled_std_class(node.module) if node.module is not None else None
    return twin.__name__ if twin else ""


def on_meta(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether there are no values to measure or to set: they come with the `state_dict` that is loaded."""
    tensors = [*model.parameters(), *tree_leaves(inputs)]
    return any(t.is_meta for t in tensors if isinstance(t, Tensor))


def biased_through_sums(graph: Graph, sites: list[Site]) -> list[Change]:
    """Rows for layers without bias that a norm layer reads through sums."""
    return [
        layer_row(node, "", type(node.module).__name__, "gains the norm layer's bias", *edits)
        for node in fed_through_sums(graph, sites)
        if (edits := bias_edits(graph, node))
    ]


def scaled(alpha: float, norm: nn.Module) -> nn.Module:
    """A constant in a norm layer's place."""
    return after(norm, Scale(alpha, **like(norm)))


def constant_at(site: Site, alpha: float, limits: Mapping[str, float]) -> dict[str, Target]:
    """The target of the constant that stands in a norm layer's place: α, but at most what its limit is."""
    path = held_at(site.path, site.norm)
    return {path: Target(alpha, at_most=limits.get(path, math.inf), by="constant")}


def removed(graph: Graph, site: Site, limits: Mapping[str, float], alpha: float = 1.0) -> Change:
    """A row for a norm layer that goes; the layer that feeds it gains a bias. Where there is none whose weight could be
    scaled, a constant stands, α of the variance 1."""
    if not scalable(graph, site):
        reason = f"a constant: no weight sets the size of what it reads ({site.reads})"
        edits = (*bias_edits(graph, site.feeder, site.norm), Edit(site.path, partial(scaled, alpha)))
        targets = constant_at(site, alpha, limits)
        return site_row(site, "replace", "Scale", reason, *edits, targets=targets)
    name, edit = vacated(graph, site)
    edits = (*bias_edits(graph, site.feeder, site.norm), edit)
    has = site.feeder is not None and (
        len(edits) > 1 or getattr(site.feeder.module, "bias", None) is not None
    )
    reason = f"removed; {site.feeder.path} keeps a bias" if has and site.feeder is not None else "removed"
    reason = reason if name == "Identity" else "a copy: the next layer writes over what others read too"
    return site_row(site, "replace", name, reason, *edits)
