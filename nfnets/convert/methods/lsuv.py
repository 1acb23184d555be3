"""`lsuv`: norm layers removed, weights scaled in one pass so that every layer's output has unit variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nfnets.convert.alpha import branch_scales, check_alpha
from nfnets.convert.calibrate import Constants, beside, calibrate_, settle
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import (
    biased_through_sums,
    largest,
    lifted,
    on_meta,
    read_by_norms,
    removed,
)
from nfnets.convert.plan import Row
from nfnets.convert.reference import kept
from nfnets.convert.sites import Site, is_weighted
from nfnets.errors import UserError
from nfnets.init import lsuv_
from nfnets.trace import Graph


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
    compares = "layers"
    orthonormal: bool = True
    per_channel: bool = False
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        self._layers = read_by_norms(graph, sites)
        scales = lifted(graph, sites, self.reference, branch_scales(model, graph, self.alpha))
        self._targets = _targets(graph, sites, scales)
        self._most = largest(graph, sites, self.reference, scales)
        self._kept = kept(graph, self.reference)
        alphas = [next((scales[call] for call in site.calls if call in scales), 1.0) for site in sites]
        rows = [removed(graph, site, alpha) for site, alpha in zip(sites, alphas, strict=True)]
        return rows, biased_through_sums(graph, sites)

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._layers and not on_meta(model, inputs):
            report = lsuv_(
                model,
                *inputs,
                strict=False,  # its advice is for its own callers
                orthonormal=self.orthonormal,
                per_channel=self.per_channel,
                layers=self._layers,
                targets={path: target for path, target in self._targets.items() if path in self._layers},
                most=self._most,
                beside=beside(self._kept, constants := Constants(most=self._most)),
            )
            if refused := report.paths("refused"):
                raise UserError(
                    f"{refused[0]} cannot be scaled: {report[refused[0]].reason}; exclude the norm layer that it "
                    'feeds, exclude="…", or use method="nf"'
                )
            constants.write()
        elif not on_meta(model, inputs):
            calibrate_(model, *inputs, most=self._most, keep=self._kept)
        settle(model)


def _targets(graph: Graph, sites: list[Site], scales: dict[int, float]) -> dict[str, float]:
    """Standard deviations of the layers that end a branch, themselves or read by the norm layer that does."""
    found = {graph.nodes[i].path: scale for i, scale in scales.items() if is_weighted(graph.nodes[i].module)}
    for site in sites:
        scale = next((scales[call] for call in site.calls if call in scales), None)
        if scale is not None:
            found |= dict.fromkeys(read_by_norms(graph, [site]), scale)
    return found
