"""`skipinit`: norm layers removed, and one scalar, 0 at first, at the end of every residual branch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import (
    after,
    bias_edits,
    biased_through_sums,
    layer_row,
    like,
    on_meta,
    read_by_norms,
    removed,
    site_row,
)
from nfnets.convert.plan import Edit, Row
from nfnets.convert.sites import Site
from nfnets.errors import UserError
from nfnets.init import lsuv_, skipinit_
from nfnets.init.branches import Branch, Residual, residual_of
from nfnets.init.skip_layers import TWINS
from nfnets.layers import SkipInit
from nfnets.trace import Graph


@register
@dataclass
class SkipInitMethod(Method):
    """Residual branches that start at zero by one scalar each, and no norm layer.

    h ← h + α · f(h), α learnable. α stands in place of the norm layer that ends a branch; where none does (nets of
    pre-activation order), in a subclass of the branch's last layer. Every layer that a norm layer read, alone or
    through sums, has a bias. Weights are drawn anew, He normal, from torch's global generator; then those that a norm
    layer read outside the branches (stem, shortcuts, blocks without one) are scaled to outputs of unit variance in
    one pass over the example inputs, for gates, strides and other activations than ReLU take from He's. On `meta`
    weights come with the `state_dict` that is loaded. A model without residual branches, or with branches inside
    branches, is refused.

    Args:
        value: α at first, 0 or at most 1/√blocks.

    Paper: arXiv 2002.10444. Checked against DeepMind's `skip_gain`, see `nfnets.init.skipinit_`.
    """

    name = "skipinit"
    value: float = 0.0

    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        net = residual_or_refusals(model, graph, sites, "SkipInit")
        if not isinstance(net, Residual):
            return net, []
        self._stream = read_outside_branches(graph, sites, net)
        joins = [branch.join for branch in net.branches]
        rows = [self._row(graph, site) if site.join in joins else removed(graph, site) for site in sites]
        return rows, biased_through_sums(graph, sites) + scalars_in_layers(graph, sites, net, self.value)

    def _row(self, graph: Graph, site: Site) -> Row:
        edits = (*bias_edits(graph, site.feeder), Edit(site.path, partial(_skip, self.value)))
        return site_row(site, "replace", "SkipInit", f"ends a branch: α = {self.value:g}", *edits)

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not on_meta(model, inputs):
            skipinit_(model, *inputs, value=self.value)
            unit_stream_(model, inputs, self._stream)


def residual_or_refusals(
    model: nn.Module, graph: Graph, sites: list[Site], what: str
) -> Residual | list[Row]:
    """The model's residual branches, or a refusal with its reason for every site."""
    try:
        return residual_of(model, graph, what)
    except UserError as error:
        return [site_row(site, "refuse", "", str(error)) for site in sites]


def read_outside_branches(graph: Graph, sites: list[Site], net: Residual) -> list[str]:
    """Paths of the layers that a norm layer read and that lie on no branch: what makes the stream."""
    inside = {path for branch in net.branches for path in (*branch.inner, *branch.last, *branch.gates)}
    return [path for path in read_by_norms(graph, sites) if path not in inside]


def unit_stream_(model: nn.Module, inputs: tuple[Any, ...], layers: list[str]) -> None:
    """Scale these layers, in one forward pass, so that their outputs have unit variance; the branches stay."""
    if layers:
        lsuv_(model, *inputs, orthonormal=False, strict=False, layers=layers)


def scalars_in_layers(
    graph: Graph, sites: list[Site], net: Residual, value: float, rate: float | None = None
) -> list[Row]:
    """Rows for branches that no norm layer ends: their last layer becomes one that ends in a scalar.

    Args:
        graph: of the model with its norm layers.
        sites: the norm layers.
        net: the model's branches.
        value: the scalar at first.
        rate: the scalar's learning rate, relative to the others'.

    Returns:
        A row for each such layer. A branch that already has a scalar, or does not end in one plain layer, has none:
        the initializer knows what to do, or refuses.
    """
    ended = {site.join for site in sites}
    rows = []
    for branch in net.branches:
        if branch.join in ended or branch.multipliers or not _ends_in_plain_layer(graph, branch):
            continue
        node = graph.calls(branch.last[0])[0]
        edit = Edit(node.path, partial(_with_scalar, value, rate))
        name = next(twin.__name__ for plain, twin in TWINS.items() if type(node.module) is plain)
        rows.append(layer_row(node, "branch end", name, f"times a scalar, {value:g} at first", edit))
    return rows


def _ends_in_plain_layer(graph: Graph, branch: Branch) -> bool:
    calls = [call for path in branch.last for call in graph.calls(path)]
    return branch.ends_in_last and len(calls) == 1 and type(calls[0].module) in TWINS


def _with_scalar(value: float, rate: float | None, layer: nn.Module) -> nn.Module:
    new = TWINS[type(layer)].from_plain(layer, value)
    if rate is not None:
        new.__dict__["lr_scale"] = rate  # `nfnets.param_groups` reads it
    return new


def _skip(value: float, norm: nn.Module) -> nn.Module:
    return after(norm, SkipInit(value).to(**like(norm)))
