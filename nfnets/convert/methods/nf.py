"""`nf`: scaled weight standardization, activation gains, α after and 1/β before every residual branch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nfnets.convert.calibrate import calibrate_
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import (
    after,
    biased,
    fed_through_sums,
    layer_row,
    like,
    site_row,
    standardizable,
    standardized,
    twin_name,
)
from nfnets.convert.plan import Edit, Row
from nfnets.convert.sites import Site, main_end
from nfnets.errors import UserError
from nfnets.layers import Scale
from nfnets.trace import Graph


@register
@dataclass
class NF(Method):
    """Scaled weight standardization with constants measured in one pass, and α at every branch end.

    h ← h + α · f(h / β). Where a convolution feeds a norm layer, the convolution is standardized and its constant
    `scale` takes the norm layer's place: the preceding activation's gain γ and 1/β at once, so that its output has
    average channel variance 1 on the example inputs. Elsewhere a constant `Scale` stands. On `meta` nothing can be
    measured: the constants then come with the `state_dict` that is loaded.

    Args:
        alpha: variance of a residual branch is α².

    Paper: arXiv 2101.08692. Checked against deepmind-research `nfnets/nf_resnet.py`.
    """

    name = "nf"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha={self.alpha}: expected a number above 0 and at most 1; pass alpha=0.2")

    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        ends = {main_end(graph, join).index for join in graph.joins}
        rows = [self._row(site, ends) for site in sites]
        layers = []
        for node in fed_through_sums(graph, sites):
            if node.module is None or not standardizable(node.module):
                continue
            alpha = self.alpha if node.index in ends else 1.0
            role = "branch end" if node.index in ends else "branch"
            what = "standardized: a norm layer reads its sum" + (f"; α={alpha:g}" if alpha != 1 else "")
            edit = Edit(node.path, partial(_calibrated, alpha))
            layers.append(layer_row(node, role, twin_name(node), what, edit))
        return rows, layers

    def _row(self, site: Site, ends: set[int]) -> Row:
        make = partial(site_row, site, "replace")
        if not site.calls:
            return make("Identity", "the forward pass never runs it", Edit(site.path, after))
        alpha = self.alpha if ends & set(site.calls) else 1.0
        note = f", α={alpha:g}" if alpha != 1 else ""
        feeder = site.feeder
        if feeder is not None and feeder.module is not None and standardizable(feeder.module):
            edits = (Edit(feeder.path, partial(_calibrated, alpha)), Edit(site.path, after))
            return make("Identity", f"{feeder.path} → {twin_name(feeder)}, γ/β{note}", *edits)
        scaled = Edit(site.path, partial(_scaled, alpha))
        if feeder is None:
            return make("Scale", f"1/β of {site.reads}{note}", scaled)
        why = f"{feeder.path} stays plain (depthwise or fan-in 1) and gains a bias; 1/β{note}"
        return make("Scale", why, Edit(feeder.path, biased), scaled)

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        calibrate_(model, *inputs)


def _calibrated(alpha: float, layer: nn.Module) -> nn.Module:
    new = standardized(layer, alpha)
    new.__dict__["calibrated"] = True  # its `scale` is measured in `finish`, so theory starts anew from here
    return new


def _scaled(alpha: float, norm: nn.Module) -> nn.Module:
    return after(norm, Scale(alpha).to(**like(norm)))
