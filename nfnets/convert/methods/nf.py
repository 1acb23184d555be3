"""`nf`: scaled weight standardization, activation gains, α after and 1/β before every residual branch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nfnets.convert.alpha import branch_scales, check_alpha, note
from nfnets.convert.calibrate import await_calibration, calibrate_, settle
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import (
    after,
    bias_edits,
    fed_through_sums,
    largest,
    layer_row,
    lifted,
    on_meta,
    scaled,
    site_row,
    standardizable,
    standardized,
    twin_name,
)
from nfnets.convert.plan import Edit, Row
from nfnets.convert.reference import kept
from nfnets.convert.sites import Site
from nfnets.layers import has_own_weight
from nfnets.nested import tensors_in
from nfnets.trace import Graph

MANY = 32
"""Samples from which on single channels are set, of an example batch as of a training batch."""


@register
@dataclass
class NF(Method):
    """Scaled weight standardization with constants measured in one pass, and α at every branch end.

    h ← h + α · f(h / β). Where a convolution feeds a norm layer, the convolution is standardized and its constant
    `scale` takes the norm layer's place: the preceding activation's gain γ and 1/β at once, so that its output has
    average channel variance 1 on the example inputs, but never more than twice the root mean square that BatchNorm's γ
    and β give it. On many samples its gains and biases then give each channel that variance and the mean 0. One that a
    norm layer reads through sums only stays within a factor 2 of its own, at branch ends from above alone. Elsewhere a
    constant `Scale` stands. Dropout and stochastic depth are on meanwhile, as in training. A head whose output moved by
    more than a factor 2 is scaled back to the BatchNorm model's. On `meta` nothing can be measured: the constants then
    come with the `state_dict` that is loaded.

    Args:
        alpha: a residual branch's variance is α², and that of what a DenseNet's layer puts beside its input. None
            chooses min(√(2/L), 6/L), at most 1, for L of them in a row (docs/experiments.md, "α", "Concatenations").
        channelwise: whether gains and biases start from the channels' statistics, as in arXiv 1602.07868, instead of
            from 1 and from what a layer's bias was. None: if there are 32 samples or more. What helps DenseNet at batch
            64 takes from MobileNetV2 at batch 4, so pass False to train at so small a one (docs/experiments.md).

    Paper: arXiv 2101.08692. Checked against deepmind-research `nfnets/nf_resnet.py`.
    """

    name = "nf"
    compares = "layers"
    alpha: float | None = None
    channelwise: bool | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        alphas = lifted(graph, sites, self.reference, branch_scales(model, graph, self.alpha))
        self._most = largest(graph, sites, self.reference, alphas)
        self._kept = kept(graph, self.reference)
        rows = [_row(graph, site, alphas) for site in sites]
        layers = []
        for node in fed_through_sums(graph, sites):
            if not standardizable(node.module):
                continue
            alpha = alphas.get(node.index, 1.0)
            role = "branch end" if node.index in alphas and alpha <= 1 else "branch"
            what = f"standardized: a norm layer reads its sum{note(alpha)}"
            edit = Edit(node.path, partial(_calibrated, alpha))
            layers.append(layer_row(node, role, twin_name(node), what, edit))
        return rows, layers

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not on_meta(model, inputs):
            channelwise = _samples(inputs) >= MANY if self.channelwise is None else self.channelwise
            calibrate_(model, *inputs, most=self._most, keep=self._kept, channelwise=channelwise)
        settle(model)


def _row(graph: Graph, site: Site, alphas: dict[int, float]) -> Row:
    make = partial(site_row, site, "replace")
    alpha = next((alphas[call] for call in site.calls if call in alphas), 1.0)
    feeder = site.feeder
    if feeder is not None and standardizable(feeder.module):
        edits = (Edit(feeder.path, partial(_calibrated, alpha * site.survives)), Edit(site.path, after))
        return make("Identity", f"{feeder.path} → {twin_name(feeder)}, γ/β{note(alpha)}", *edits)
    constant = Edit(site.path, partial(scaled, alpha))
    if feeder is None:
        return make("Scale", f"1/β of {site.reads}{note(alpha)}", constant)
    gains = bias_edits(graph, feeder)
    plain = "depthwise or fan-in 1" if has_own_weight(feeder.module) else "its weight or forward is its own"
    why = f"{feeder.path} stays plain ({plain}){' and gains a bias' if gains else ''}; 1/β{note(alpha)}"
    return make("Scale", why, *gains, constant)


def _samples(inputs: tuple[Any, ...]) -> int:
    first = tensors_in(inputs)[0]
    return len(first) if first.ndim else 1


def _calibrated(alpha: float, layer: nn.Module) -> nn.Module:
    return await_calibration(standardized(layer, alpha))
