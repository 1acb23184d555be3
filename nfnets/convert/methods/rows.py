"""What methods decide alike for a place in the graph: a plan's rows, and what of `parts.py` stands there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from torch import nn

from nfnets.convert.fused import after, held_at
from nfnets.convert.methods.parts import (
    biased,
    channels_of,
    copying,
    group_count,
    scaled,
    with_own_activation,
)
from nfnets.convert.plan import Action, Change, Edit
from nfnets.layers import scaled_std_class
from nfnets.scale.target import Statistic, Target
from nfnets.structure.laws import Law
from nfnets.structure.own_forward import affine_in_parameters
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
        return "Identity", Edit(site.path, after if alone else with_own_activation)
    return "Scale", Edit(site.path, copying)


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


def law_at(site: Site) -> Law:
    """What the norm layer at a site computes: of BatchNorm, where its γ and β are."""
    if site.law is not None:
        return site.law
    own = ["" if getattr(site.norm, name, None) is None else name for name in ("weight", "bias")]
    return Law("batch", (channels_of(site.norm),), 1, *own)


def statistic_of(site: Site) -> Statistic:
    """What a norm layer makes 1: of a layer or RMS norm the mean square over the channels, no channel's variance."""
    return "mean square" if site.kind in ("layer", "rms") else "channel variance"


def constant_at(site: Site, alpha: float, limits: Mapping[str, float]) -> dict[str, Target]:
    """The target of the constant that stands in a norm layer's place: α, but at most what its limit is."""
    path = held_at(site.path, site.norm)
    return {path: Target(alpha, statistic_of(site), at_most=limits.get(path, math.inf), by="constant")}


def bias_edits(graph: Graph, node: Node | None, norm: nn.Module | None = None) -> tuple[Edit, ...]:
    """What gives a layer the bias that a norm layer was: nothing if it has one, or if its forward would not add it."""
    lacks = node is not None and node.module is not None and node.module.bias is None
    computed = lacks and node.module._parameters.get("weight") is None  # type: ignore[union-attr]
    takes = lacks and (computed or affine_in_parameters(graph, node))
    shift = None if norm is None else norm._parameters.get("bias")
    return (Edit(node.path, partial(biased, shift=shift)),) if takes and node is not None else ()


def biased_through_sums(graph: Graph, sites: list[Site]) -> list[Change]:
    """Rows for layers without bias that a norm layer reads through sums."""
    return [
        layer_row(node, "", type(node.module).__name__, "gains the norm layer's bias", *edits)
        for node in fed_through_sums(graph, sites)
        if (edits := bias_edits(graph, node))
    ]


def positions(graph: Graph, site: Site) -> int:
    """Values that a norm layer sees in one channel of one sample, at least; 1 if the forward pass never runs it."""
    return min((math.prod(graph.nodes[call].shape[2:]) for call in site.calls), default=1)


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


def twin_name(node: Node) -> str:
    """Class name of a layer's scaled-standardized twin."""
    twin = scaled_std_class(node.module) if node.module is not None else None
    return twin.__name__ if twin else ""
