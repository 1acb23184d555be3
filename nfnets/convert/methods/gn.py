"""`gn`, `ln` and `ws_gn`: group norm in every norm layer's place, of one group, or with standardized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from nfnets.convert.fused import after, like
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import carry_affine, channels_of, standardizable, standardized
from nfnets.convert.methods.rows import groups_or_reason, layer_row, site_row, twin_name
from nfnets.convert.net import Net
from nfnets.convert.own_norm import eps_of
from nfnets.convert.plan import Change, Edit
from nfnets.errors import UserError
from nfnets.given import counted
from nfnets.structure.own_forward import units
from nfnets.structure.readers import fed_through_sums
from nfnets.structure.sites import Site
from nfnets.trace import Graph


@register
@dataclass
class GN(Method):
    """Group norm in every norm layer's place: independent of the batch, though not norm-free.

    y = (x − mean_g) / √(var_g + ε) · γ + β over each sample's groups of channels; γ, β and ε are the norm layer's.

    Args:
        num_groups: groups in every layer. None for the most that divide the channels, up to 32, with 2 channels or
            more in each; where the example inputs leave no space (features), 16 values or more, for two values
            would be normalized to ±1 whatever they were.

    Example:
        >>> import torch
        >>> from nfnets.convert import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24))
        >>> convert(model, torch.randn(2, 3, 8, 8), method="gn")[1].num_groups
        12

    Paper: arXiv 1803.08494. Checked against `torch.nn.functional.group_norm` and timm's `resnet50_gn`.
    """

    name = "gn"
    num_groups: int | None = None

    def __post_init__(self) -> None:
        if self.num_groups is not None and self.num_groups < 1:
            raise UserError(f"num_groups={self.num_groups}: expected 1 or more; pass num_groups=32")

    def decide(self, net: Net) -> Iterator[Change]:
        for site in net.sites:
            yield self._change(net.graph, site)

    def _change(self, graph: Graph, site: Site, edits: tuple[Edit, ...] = (), note: str = "") -> Change:
        groups = groups_or_reason(graph, site, self.num_groups)
        if isinstance(groups, str):
            return site_row(site, "refuse", "", groups)
        reason = f"{counted(groups, 'group')} of {channels_of(site.norm) // groups}{note}"
        return site_row(
            site, "replace", "GroupNorm", reason, *edits, Edit(site.path, partial(_grouped, groups))
        )


@register
@dataclass
class LN(GN):
    """Layer normalization in every norm layer's place: group norm of one group.

    y = (x − mean) / √(var + ε) · γ + β over all of a sample's channels and positions; γ, β and ε are the norm layer's.

    Example:
        >>> import torch
        >>> from nfnets.convert import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24))
        >>> convert(model, torch.randn(2, 3, 8, 8), method="ln")[1].num_groups
        1

    Paper: arXiv 1607.06450. Checked against `torch.nn.functional.layer_norm`.
    """

    name = "ln"
    num_groups: int | None = field(default=1, init=False)


@register
@dataclass
class WSGN(GN):
    """Group norm, and scaled weight standardization of the layers that it reads.

    Ŵ_i = gain_i · (W_i − μ_i) / √(N · σ_i²), then `gn`. Standardized are layers that a norm layer reads, alone or
    through sums and concats; through those at the scale that the weight had. Depthwise ones stay plain: a filter that
    sums to zero cannot pass a constant.

    Paper: arXiv 1903.10520. Checked against timm's `ScaledStdConv2d`; the original's unscaled weights differ by
    √fan-in, which the group norm takes back.
    """

    name = "ws_gn"

    def decide(self, net: Net) -> Iterator[Change]:
        yield from beside_standardized(net, lambda site, *more: self._change(net.graph, site, *more))


def beside_standardized(
    net: Net, change: Callable[[Site, tuple[Edit, ...], str], Change]
) -> Iterator[Change]:
    """The rows of norm layers whose feeders are standardized with them, and of layers that they read through sums.

    Args:
        net: the net.
        change: from a site, the edits of its feeder and a note on them to its row.
    """
    replaced = []
    for site in net.sites:
        feeder, edits, note = site.feeder, (), ""
        if feeder is not None and standardizable(feeder.module):
            edits = (Edit(feeder.path, standardized),)
            note = f", {feeder.path} → {twin_name(feeder)}"
        row = change(site, edits, note)
        replaced += [site] if row.action == "replace" else []
        yield row
    for node in fed_through_sums(net.graph, replaced):
        if standardizable(node.module):
            edit = Edit(node.path, _as_large)
            yield layer_row(node, "", twin_name(node), "a norm layer reads its sum", edit)


def _as_large(layer: nn.Module) -> nn.Module:
    """The standardized twin, its constant the norm of the layer's rows: no group norm takes that back from a sum."""
    twin: Any = standardized(layer)
    rows = layer.weight.detach()  # type: ignore[operator]
    if not rows.is_meta and bool(rows.any()):
        twin.scale.fill_(float(rows.square().sum() / units(layer)) ** 0.5)
    return twin


def _grouped(groups: int, norm: nn.Module) -> nn.Module:
    new = nn.GroupNorm(groups, channels_of(norm), eps=eps_of(norm), affine=False, **like(norm))
    carry_affine(norm, new)
    new.affine = new.weight is not None
    return after(norm, new)
