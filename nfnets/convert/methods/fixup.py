"""`fixup`: scalar biases and multipliers in the norm layers' places, weights by Fixup's rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from nfnets.convert.fused import after, like
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import learns
from nfnets.convert.methods.residual import branches_of, ending, refusals, scalars_in_modules, scales
from nfnets.convert.methods.rows import removed, site_row, vacated
from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Edit, Start
from nfnets.init import ScalarBias, ScalarMultiplier, fixup_
from nfnets.init.fixup import plain_knobs
from nfnets.structure.laws import KINDS
from nfnets.structure.readers import scalable
from nfnets.structure.sites import Site
from nfnets.trace import Graph


@register
@dataclass
class Fixup(Method):
    """Fixup: no statistics at any time; the initial scales make one step's change independent of the depth.

    In a norm layer's place stands one scalar bias; at a branch's end a scalar multiplier, 1 at first, and a bias; on a
    shortcut nothing. Then `nfnets.init.fixup_`: the last layer of each branch 0, and the classifier if no norm layer is
    left; other branch layers He times L^(−1/(2m−2)). The authors' blocks also have a bias before each convolution (4 in
    a block of two layers, of which 2 are here): no module of a BatchNorm net stands there. Where no norm layer ends a
    branch, the module that does ends in the multiplier; behind an activation that has no slope at 0 the multiplier is 0
    and the last layer is not. Branches inside a branch count for themselves (`nfnets.init.fixup_`); branches without a
    norm layer stay as they are, layer norms too.

    Then the layers that a norm layer read outside the branches (stem, shortcuts, blocks without one) are scaled to
    outputs of unit variance in one pass over the example inputs: gates, strides and other activations than ReLU take
    from He's. Where no layer's weight sets the size of what a norm layer read there (CondConv, behind a gate), a
    constant stands. A layer inside a branch that puts out more than twice what its norm layer did is scaled back to
    that: He's rule by fan out lets branches grow that narrow and widen often (GhostNetV3). Weights are drawn anew from
    torch's global generator, but those of the head's hidden layers; on `meta` they come with the `state_dict` that is
    loaded. `nfnets.param_groups` gives the scalars a tenth of the learning rate. A model without residual branches is
    refused.

    Example:
        >>> import torch, torchvision
        >>> from nfnets.convert import convert
        >>> model = convert(torchvision.models.resnet18(), torch.randn(2, 3, 32, 32), method="fixup")
        >>> model.layer1[0].bn1, model(torch.randn(2, 3, 32, 32)).abs().max().item()
        (ScalarBias(0), 0.0)

    Paper: arXiv 1901.09321. Checked against the authors' `fixup_resnet_cifar.py`, see `nfnets.init.fixup_`.
    """

    name = "fixup"
    carries = KINDS
    compares = "everything"

    def decide(self, net: Net) -> Iterator[Change | Start]:
        found = branches_of(net, "Fixup")
        if isinstance(found, list):
            yield from found
            return
        layers = sorted({*found.layers, *found.head})
        if refused := refusals(net.sites, lambda: plain_knobs(net.model, layers, "Fixup")):
            yield from refused
            return
        limits = found.limits
        branches = {node for branch in found.branches for node in branch.nodes}
        for site in net.sites:
            outside = branches.isdisjoint(site.calls)
            yield _change(net.graph, site, limits, site.path in found.ends, outside)
        yield from scalars_in_modules(net, found, 1.0, ScalarMultiplier.lr_scale)
        yield Start(partial(fixup_, layers=layers), "Fixup's rule")
        yield from scales(net, found)


def _change(
    graph: Graph, site: Site, limits: Mapping[str, float], ends_branch: bool, outside: bool
) -> Change:
    if ends_branch:
        edit = Edit(site.path, _multiplier)
        return site_row(site, "replace", "ScalarMultiplier, ScalarBias", "ends a branch", edit)
    if outside and not scalable(graph, site):
        return removed(graph, site, limits)
    if site.role == "shortcut":
        name, edit = vacated(graph, site)
        return site_row(site, "replace", name, "shortcuts stay bare", edit)
    return site_row(site, "replace", "ScalarBias", "one scalar for its shift", Edit(site.path, _bias))


def _bias(norm: nn.Module) -> nn.Module:
    return after(norm, _shift(norm))


def _multiplier(norm: nn.Module) -> nn.Module:
    scalar = ScalarMultiplier(**like(norm)).requires_grad_(learns(norm, "weight"))
    return ending(norm, scalar, _shift(norm))


def _shift(norm: nn.Module) -> nn.Module:
    return ScalarBias(**like(norm)).requires_grad_(learns(norm, "bias"))
