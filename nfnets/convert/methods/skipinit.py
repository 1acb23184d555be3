"""`skipinit`: norm layers removed, and one scalar, 0 at first, at the end of every residual branch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nfnets.convert.calibrate import settle
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import (
    bias_edits,
    biased_through_sums,
    like,
    on_meta,
    removed,
    site_row,
)
from nfnets.convert.methods.residual import branches_of, ending, refusals, scalars_in_modules, settle_scales_
from nfnets.convert.plan import Edit, Row
from nfnets.convert.sites import Site
from nfnets.init import skipinit_
from nfnets.init.knob import knobs_of
from nfnets.layers import SkipInit
from nfnets.trace import Graph


@register
@dataclass
class SkipInitMethod(Method):
    """Residual branches that start at zero by one scalar each, and no norm layer.

    h ← h + α · f(h), α learnable. α stands in place of the norm layer that ends a branch; where none does (nets of
    pre-activation order), in the module that ends it, each of several on parallel paths; behind an activation that has
    no slope at 0 (`nfnets.init.skipinit_`). Branches inside a branch have an α of their own; branches without a norm
    layer stay as they are, layer norms too. Every layer that a norm layer read, alone or through sums, has a bias.
    Weights of those, and of the layers beside them on a branch, are drawn anew, He normal, from torch's global
    generator; then those that a norm layer read outside the branches (stem, shortcuts, blocks without one) are scaled
    to outputs of unit variance in one pass over the example inputs, for gates, strides and other activations than ReLU
    take from He's, and those inside one where they put out more than twice what their norm layer did. The head keeps
    its weights, scaled if its output moved by more than a factor 2. On `meta` weights come with the `state_dict` that
    is loaded. A model without residual branches is refused.

    Args:
        value: α at first, 0 or at most 1/√blocks.

    Paper: arXiv 2002.10444. Checked against DeepMind's `skip_gain`, see `nfnets.init.skipinit_`.
    """

    name = "skipinit"
    compares = "everything"
    value: float = 0.0

    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        found = branches_of(model, graph, sites, self.reference, "SkipInit")
        if isinstance(found, list):
            return found, []
        self._found = found
        if refused := refusals(sites, lambda: knobs_of(model, sorted(found.layers), "SkipInit")):
            return refused, []
        rows = [self._row(graph, site) if site.path in found.ends else removed(graph, site) for site in sites]
        return rows, biased_through_sums(graph, sites) + scalars_in_modules(graph, sites, found, self.value)

    def _row(self, graph: Graph, site: Site) -> Row:
        edits = (*bias_edits(graph, site.feeder, site.norm), Edit(site.path, partial(_skip, self.value)))
        return site_row(site, "replace", "SkipInit", f"ends a branch: α = {self.value:g}", *edits)

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not on_meta(model, inputs):
            skipinit_(model, *inputs, value=self.value, layers=self._found.layers)
            settle_scales_(model, inputs, self._found)
        settle(model)


def _skip(value: float, norm: nn.Module) -> nn.Module:
    return ending(norm, SkipInit(value, **like(norm)))
