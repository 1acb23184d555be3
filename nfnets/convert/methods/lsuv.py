"""`lsuv`: norm layers removed, weights scaled in one pass so that every layer's output has unit variance."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nfnets.convert.alpha import check_alpha
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.rows import biased_through_sums, removed
from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Start
from nfnets.errors import UserError
from nfnets.init.lsuv import find_knobs, orthonormalize
from nfnets.scale.one_pass import transaction
from nfnets.scale.target import Target
from nfnets.structure.laws import KINDS
from nfnets.structure.readers import read_by_norms
from nfnets.structure.walk import is_weighted


@register
@dataclass
class LSUV(Method):
    """Norm layers removed, then layer-sequential unit-variance initialization on the example inputs.

    W ← orthonormal matrix / std(output), in layers that a norm layer read, alone or through sums and concats; they
    gain a bias for its shift, and γ and β are dropped, for their weights are drawn anew (from torch's global
    generator). The last layers of residual branches are set to α instead of 1. None comes to more than twice what γ and
    β made of it. One that a norm layer reads through sums only stays within a factor 2 of what it was, at branch ends
    from above alone: no norm layer set its scale. Where no layer's weight sets the size of what a norm layer read
    (CondConv, behind a gate, a layer that standardizes its own weight), a constant stands, set in the same pass. Other
    layers stay as they are, but a head whose output moved by more than a factor 2 from the BatchNorm model's: it is
    scaled back. On `meta` there is nothing to measure: weights then come with the `state_dict` that is loaded.

    Args:
        orthonormal: draw orthonormal weights; otherwise only scale those that are there.
        alpha: as for `nf`; 1 for the paper's unit variance everywhere.
        per_channel: give every channel mean 0 and standard deviation 1 of its own.

    Paper: arXiv 1511.06422. Checked against PyPI `lsuv` 0.3.0, see `nfnets.init.lsuv_`.
    """

    name = "lsuv"
    carries = KINDS
    compares = "layers"
    orthonormal: bool = True
    per_channel: bool = False
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def decide(self, net: Net) -> Iterator[Change | Start]:
        alphas = net.lifted(net.alphas(self.alpha))
        limits = net.limits(alphas)
        for site in net.sites:
            yield removed(net.graph, site, limits, net.alpha_of(site, alphas))
        yield from biased_through_sums(net.graph, net.sites)
        if self.orthonormal and net.read:
            yield Start(partial(_draw, layers=net.read, per_channel=self.per_channel), "orthonormal weights")
        yield from net.held()
        deviations = _deviations(net, alphas)
        for path in net.read:
            target = Target(
                deviations.get(path, 1.0),
                "variance",
                at_most=limits.get(path, math.inf),
                channels=math.inf if self.per_channel else None,
                required=True,
            )
            yield Change(path, action="scale", target=target, why="unit variance, α at branch ends")


def _draw(model: nn.Module, *inputs: Any, layers: Collection[str], per_channel: bool) -> None:
    knobs, others = find_knobs(model, per_channel, layers)
    if refused := [row for row in others if row.action == "refused"]:
        raise UserError(f"{refused[0].path} cannot be scaled: {refused[0].reason}; remove that first")
    with transaction() as write:
        orthonormalize(knobs, write)


def _deviations(net: Net, alphas: Mapping[int, float]) -> dict[str, float]:
    """Standard deviations of the layers that end a branch, themselves or read by the norm layer that does, and of those
    with dropout between themselves and their norm layer."""
    nodes = net.graph.nodes
    found = {nodes[i].path: alpha for i, alpha in alphas.items() if is_weighted(nodes[i].module)}
    for site in net.sites:
        alpha = net.alpha_of(site, alphas) * site.survives
        if alpha != 1:
            found |= dict.fromkeys(read_by_norms(net.graph, [site]), alpha)
    return found
