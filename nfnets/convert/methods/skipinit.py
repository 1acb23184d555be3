"""`skipinit`: norm layers removed, and one scalar, 0 at first, at the end of every residual branch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from nfnets.convert.fused import like
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.residual import branches_of, ending, refusals, scalars_in_modules, scales
from nfnets.convert.methods.rows import bias_edits, biased_through_sums, removed, site_row
from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Edit, Start
from nfnets.init import skipinit_
from nfnets.layers import SkipInit
from nfnets.scale.knob import knobs_of
from nfnets.structure.laws import KINDS


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
    carries = KINDS
    compares = "everything"
    value: float = 0.0

    def decide(self, net: Net) -> Iterator[Change | Start]:
        found = branches_of(net, "SkipInit")
        if isinstance(found, list):
            yield from found
            return
        layers = sorted(found.layers)
        if refused := refusals(net.sites, lambda: knobs_of(net.model, layers, "SkipInit")):
            yield from refused
            return
        for site in net.sites:
            if site.path in found.ends:
                edits = (
                    *bias_edits(net.graph, site.feeder, site.norm),
                    Edit(site.path, partial(_skip, self.value)),
                )
                yield site_row(site, "replace", "SkipInit", f"ends a branch: α = {self.value:g}", *edits)
            else:
                yield removed(net.graph, site, found.limits)
        yield from biased_through_sums(net.graph, net.sites)
        yield from scalars_in_modules(net, found, self.value)
        yield Start(partial(skipinit_, value=self.value, layers=layers), "SkipInit's rule")
        yield from scales(net, found)


def _skip(value: float, norm: nn.Module) -> nn.Module:
    return ending(norm, SkipInit(value, **like(norm)))
