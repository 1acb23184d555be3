"""`tune`: keep a trained network's evaluation function and gradients, its statistics frozen for good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from nfnets.computed import has_own_weight
from nfnets.convert.fused import after
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.fold import affine_of
from nfnets.convert.methods.rows import site_row
from nfnets.convert.net import Net
from nfnets.convert.own_norm import eps_of, statistics_of
from nfnets.convert.plan import Change, Edit
from nfnets.structure.sites import Site
from nfnets.structure.walk import is_hooked
from nfnets.tuned import TunedNorm, tuned_class, untrained


class _Joining:
    """Takes the norm layer of the copy that is converted, then puts it into the layer that feeds it."""

    def take(self, norm: nn.Module) -> nn.Module:
        self.norm = norm
        return after(norm)

    def join(self, layer: nn.Module) -> nn.Module:
        twin = tuned_class(layer)
        assert twin is not None
        return twin.joined(layer, self.norm, *statistics_of(self.norm), eps_of(self.norm))


def frozen(norm: nn.Module) -> nn.Module:
    """A norm layer with its statistics frozen, then the dropout and activation fused into it."""
    return after(norm, TunedNorm.frozen(norm, *statistics_of(norm), eps_of(norm)))


@register
@dataclass
class Tune(Method):
    """Each convolution and the norm layer behind it as one layer, with running statistics that nothing moves.

    y = conv(x; W · γ/√(σ²+ε)) + β + (b − μ) · γ/√(σ²+ε); W, b, γ and β learn on. Outputs and gradients are those of the
    network in evaluation mode, so an optimizer and its rates stay as they were, but `train()` cannot thaw the
    statistics, and what lies between the two layers is not kept for the backward pass: less memory. Where no
    convolution feeds a norm layer alone, its forward or weight is its own, or forward hooks see it, a `TunedNorm`
    stands. `bake` makes plain layers of all of them. Frozen norm layers of detectors stay, unless `include` names them.

    Example:
        >>> import torch
        >>> from nfnets.convert import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> _ = model(x)  # statistics
        >>> torch.allclose(convert(model, x, method="tune").train()(x), model.eval()(x), atol=1e-5)
        True

    Paper: arXiv 2305.11624. Checked against torch's own layers in evaluation mode.
    """

    name = "tune"
    keeps_function = True

    def decide(self, net: Net) -> Iterator[Change]:
        for site in net.sites:
            yield _change(site)


def _change(site: Site) -> Change:
    norm = site.norm
    if getattr(norm, "running_mean", None) is None:
        return site_row(site, "refuse", "", "it keeps no running statistics (track_running_stats=False)")
    if not all(t.is_meta or bool(t.isfinite().all()) for t in affine_of(norm)):
        return site_row(site, "refuse", "", "its statistics or affine map are not finite, or σ² + ε is 0")
    new = "; they were never trained" if untrained(*statistics_of(norm)) else ""
    kept = f"statistics frozen{new}"
    hooked = is_hooked(norm) or (site.feeder is not None and is_hooked(site.feeder.module))
    twin = None if site.feeder is None else tuned_class(site.feeder.module)
    if site.feeder is not None and twin is not None and not hooked and has_own_weight(site.feeder.module):
        both = _Joining()
        edits = (Edit(site.path, both.take), Edit(site.feeder.path, both.join))
        why = f"one layer with {site.feeder.path}, a {twin.__name__}; {kept}"
        return site_row(site, "replace", "Identity", why, *edits)
    why = "forward hooks see it" if hooked else "no convolution feeds it alone"
    if site.feeder is not None and not hooked:
        why = f"the weight or forward of {site.feeder.path} is its own"
    return site_row(site, "replace", "TunedNorm", f"{why}; {kept}", Edit(site.path, frozen))
