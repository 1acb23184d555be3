"""`nf`: scaled weight standardization, activation gains, α after and 1/β before every residual branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from nfnets.advice import MANY
from nfnets.convert.alpha import check_alpha, note
from nfnets.convert.fused import after
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.fixed_variance import fixed
from nfnets.convert.methods.parts import plain_because, scaled, standardizable, standardized
from nfnets.convert.methods.rows import bias_edits, constant_at, law_at, layer_row, site_row, twin_name
from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Edit
from nfnets.scale.target import Target
from nfnets.structure.laws import KINDS
from nfnets.structure.readers import behind_dropout, reads_functions
from nfnets.structure.sites import Site

FURTHEST = 4.0
"""How far a channel's gain may move from the others': a dead channel is not to be filled with what it has left."""


@register
@dataclass
class NF(Method):
    """Scaled weight standardization with constants measured in one pass, and α at every branch end.

    h ← h + α · f(h / β). Where a convolution feeds a norm layer, the convolution is standardized and its constant
    `scale` takes the norm layer's place: the preceding activation's gain γ and 1/β at once, so that its output has
    average channel variance 1 on the example inputs, but never more than twice the root mean square that BatchNorm's γ
    and β give it. On many samples its gains and biases then give each channel that variance and the mean 0. One that a
    norm layer reads through sums only stays within a factor 2 of its own, at branch ends from above alone. Elsewhere a
    constant `Scale` stands; with a bias per channel, centred too, where weights are applied by functions, as in graph
    nets' own linears: no layer of those can take the mean away. Dropout and stochastic depth are on meanwhile, as in
    training. A head whose output moved by more than a factor 2 is scaled back to the BatchNorm model's. On `meta`
    nothing can be measured: the constants then come with the `state_dict` that is loaded.

    Args:
        alpha: a residual branch's variance is α², and that of what a DenseNet's layer puts beside its input. None
            chooses min(√(2/L), 6/L), at most 1, for L of them in a row (docs/experiments.md, "α", "Concatenations").
        channelwise: whether gains and biases start from the channels' statistics, as in arXiv 1602.07868, instead of
            from 1 and from what a layer's bias was. None: if there are 32 samples or more. What helps DenseNet at batch
            64 takes from MobileNetV2 at batch 4, so pass False to train at so small a one. Layers that read what
            dropout has masked start without them: training takes their means away (docs/experiments.md, "Dropout").
            A bias that such a layer did not have is drawn as torch draws one, the same every time: clipped, zeros stay.

    Paper: arXiv 2101.08692. Checked against deepmind-research `nfnets/nf_resnet.py`.
    """

    name = "nf"
    carries = KINDS
    compares = "layers"
    alpha: float | None = None
    channelwise: bool | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def decide(self, net: Net) -> Iterator[Change]:
        alphas = net.lifted(net.alphas(self.alpha))
        limits = net.limits(alphas)
        channelwise = net.samples >= MANY if self.channelwise is None else self.channelwise
        masked = behind_dropout(net.graph)

        def target(*calls: int) -> partial[Target]:
            whole = not channelwise or not masked.isdisjoint(calls)
            return partial(Target, channels=None if whole else FURTHEST, by="constant")

        for site in net.sites:
            key = None if masked.isdisjoint(site.calls) else site.path
            yield _change(net, site, net.alpha_of(site, alphas), limits, target(*site.calls), key)
        for node in net.summed():
            if standardizable(node.module):
                alpha = alphas.get(node.index, 1.0)
                key = node.path if node.index in masked else None
                yield layer_row(
                    node,
                    "branch end" if node.index in alphas and alpha <= 1 else "branch",
                    twin_name(node),
                    f"standardized: a norm layer reads its sum{note(alpha)}",
                    Edit(node.path, partial(standardized, alpha=alpha, key=key)),
                    target=target(node.index)(alpha, at_most=limits.get(node.path, float("inf"))),
                )
        yield from net.held()


def _change(
    net: Net,
    site: Site,
    alpha: float,
    limits: Mapping[str, float],
    target: partial[Target],
    key: str | None,
) -> Change:
    feeder = site.feeder
    if feeder is not None and standardizable(feeder.module):
        own = alpha * site.survives
        why = f"{feeder.path} → {twin_name(feeder)}, with a constant{note(alpha)}"
        edits = (Edit(feeder.path, partial(standardized, alpha=own, key=key)), Edit(site.path, after))
        aim = {feeder.path: target(own, at_most=limits.get(feeder.path, float("inf")))}
        return site_row(site, "replace", "Identity", why, *edits, targets=aim)
    constant, aim = Edit(site.path, partial(scaled, alpha)), constant_at(site, alpha, limits)
    if feeder is None and reads_functions(net.graph, site):
        why = f"a constant and a bias; the weights of {site.reads} are no layer of torch's{note(alpha)}"
        centred = target.keywords["channels"] is not None
        aims = {path: replace(one, channels=1.0 if centred else None) for path, one in aim.items()}
        edit = Edit(site.path, partial(fixed, alpha, law_at(site)))
        return site_row(site, "replace", "FixedVariance", why, edit, targets=aims)
    if feeder is None:
        return site_row(
            site, "replace", "Scale", f"a constant for {site.reads}{note(alpha)}", constant, targets=aim
        )
    gains = bias_edits(net.graph, feeder, site.norm)
    gained = " and gains a bias" if gains else ""
    why = f"{feeder.path} stays plain ({plain_because(feeder.module)}){gained}; a constant{note(alpha)}"
    return site_row(site, "replace", "Scale", why, *gains, constant, targets=aim)
