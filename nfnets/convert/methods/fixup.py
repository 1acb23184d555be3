"""`fixup`: scalar biases and multipliers in the norm layers' places, weights by Fixup's rule."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import nn

from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import after, like, on_meta, site_row
from nfnets.convert.methods.skipinit import (
    read_outside_branches,
    residual_or_refusals,
    scalars_in_layers,
    unit_stream_,
)
from nfnets.convert.plan import Edit, Row
from nfnets.convert.sites import Site
from nfnets.init import ScalarBias, ScalarMultiplier, fixup_
from nfnets.init.branches import Residual
from nfnets.trace import Graph


@register
@dataclass
class Fixup(Method):
    """Fixup: no statistics at any time; the initial scales make one step's change independent of the depth.

    In a norm layer's place stands one scalar bias; at a branch's end a scalar multiplier, 1 at first, and a bias; on
    a shortcut nothing. Then `nfnets.init.fixup_`: the last layer of each branch and the classifier 0, other branch
    layers He times L^(−1/(2m−2)). The authors' blocks also have a bias before each convolution (4 in a block of two
    layers, of which 2 are here): no module of a BatchNorm net stands there. Where no norm layer ends a branch, its
    last layer becomes a subclass of itself that ends in the multiplier.

    Then the layers that a norm layer read outside the branches (stem, shortcuts, blocks without one) are scaled to
    outputs of unit variance in one pass over the example inputs: gates, strides and other activations than ReLU take
    from He's. Weights are drawn anew from torch's global generator; on `meta` they come with the `state_dict` that is
    loaded. `nfnets.param_groups` gives the scalars a tenth of the learning rate. A model without residual branches,
    or with branches inside branches, is refused.

    Example:
        >>> import torch, torchvision
        >>> from nfnets.convert import convert
        >>> model = convert(torchvision.models.resnet18(), torch.randn(2, 3, 32, 32), method="fixup")
        >>> model.layer1[0].bn1, model(torch.randn(2, 3, 32, 32)).abs().max().item()
        (ScalarBias(0), 0.0)

    Paper: arXiv 1901.09321. Checked against the authors' `fixup_resnet_cifar.py`, see `nfnets.init.fixup_`.
    """

    name = "fixup"

    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        net = residual_or_refusals(model, graph, sites, "Fixup")
        if not isinstance(net, Residual):
            return net, []
        self._stream = read_outside_branches(graph, sites, net)
        joins = [branch.join for branch in net.branches]
        rows = [_row(site, site.join in joins) for site in sites]
        return rows, scalars_in_layers(graph, sites, net, 1.0, ScalarMultiplier.lr_scale)

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not on_meta(model, inputs):
            fixup_(model, *inputs)
            unit_stream_(model, inputs, self._stream)


def _row(site: Site, ends_branch: bool) -> Row:
    if ends_branch:
        edit = Edit(site.path, _multiplier)
        return site_row(site, "replace", "ScalarMultiplier, ScalarBias", "ends a branch", edit)
    if site.role == "shortcut":
        return site_row(site, "replace", "Identity", "shortcuts stay bare", Edit(site.path, after))
    return site_row(site, "replace", "ScalarBias", "one scalar for its shift", Edit(site.path, _bias))


def _bias(norm: nn.Module) -> nn.Module:
    return after(norm, ScalarBias(**like(norm)))


def _multiplier(norm: nn.Module) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict(multiplier=ScalarMultiplier(**like(norm)))
    parts["bias"] = ScalarBias(**like(norm))
    return after(norm, nn.Sequential(parts))
