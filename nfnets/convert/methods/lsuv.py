"""`lsuv`: norm layers removed, weights scaled in one pass so that every layer's output has unit variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import biased_through_sums, on_meta, read_by_norms, removed
from nfnets.convert.plan import Row
from nfnets.convert.sites import Site
from nfnets.init import lsuv_
from nfnets.trace import Graph


@register
@dataclass
class LSUV(Method):
    """Norm layers removed, then layer-sequential unit-variance initialization on the example inputs.

    W ← orthonormal matrix / std(output), in layers that a norm layer read, alone or through sums and concats; they
    gain a bias for its shift, and γ and β are dropped, for their weights are drawn anew (from torch's global
    generator). Other layers, such as the classifier, stay as they are. On `meta` there is nothing to measure:
    weights then come with the `state_dict` that is loaded.

    Args:
        orthonormal: draw orthonormal weights; otherwise only scale those that are there.
        per_channel: give every channel mean 0 and standard deviation 1 of its own.

    Paper: arXiv 1511.06422. Checked against PyPI `lsuv` 0.3.0, see `nfnets.init.lsuv_`.
    """

    name = "lsuv"
    orthonormal: bool = True
    per_channel: bool = False

    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        self._layers = read_by_norms(graph, sites)
        return [removed(graph, site) for site in sites], biased_through_sums(graph, sites)

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._layers and not on_meta(model, inputs):
            lsuv_(
                model,
                *inputs,
                orthonormal=self.orthonormal,
                per_channel=self.per_channel,
                layers=self._layers,
            )
