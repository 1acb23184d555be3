"""`nf`: scaled weight standardization, activation gains, α after and 1/β before every residual branch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from nfnets.convert.calibrate import calibrate_
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.fold import after, with_parameters
from nfnets.convert.plan import Edit, Row
from nfnets.convert.sites import Site, is_weighted, main_end
from nfnets.errors import UserError
from nfnets.layers import Scale, scaled_std_class
from nfnets.trace import Graph, Node, is_batch_norm_like


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
        rows = [self._row(site, graph, ends) for site in sites]
        taken = {site.feeder.path for site in sites if site.feeder is not None}
        layers = []
        for node in graph.nodes:
            if node.path in taken or not self._standardizes(graph, node):
                continue
            taken.add(node.path)
            alpha = self.alpha if node.index in ends else 1.0
            role = "branch end" if node.index in ends else "branch"
            edits = (Edit(node.path, partial(_standardized, alpha)),)
            what = "standardized: a norm layer reads its sum" + (f"; α={alpha:g}" if alpha != 1 else "")
            layers.append(
                Row(node.path, role, "replace", _twin_name(node), what, type(node.module).__name__, "", edits)
            )
        return rows, layers

    def _row(self, site: Site, graph: Graph, ends: set[int]) -> Row:
        make = partial(Row, site.path, site.role, norm=type(site.norm).__name__, reads=site.reads)
        if not site.calls:
            return make(
                "replace", "Identity", "the forward pass never runs it", edits=(Edit(site.path, after),)
            )
        alpha = self.alpha if ends & set(site.calls) else 1.0
        note = f", α={alpha:g}" if alpha != 1 else ""
        feeder = site.feeder
        if feeder is not None and feeder.module is not None and standardizable(feeder.module):
            edits = (Edit(feeder.path, partial(_standardized, alpha)), Edit(site.path, after))
            return make(
                "replace", "Identity", f"{feeder.path} → {_twin_name(feeder)}, γ/β{note}", edits=edits
            )
        edits = (Edit(site.path, partial(_scaled, alpha)),)
        if feeder is None:
            return make("replace", "Scale", f"1/β of {site.reads}{note}", edits=edits)
        why = f"{feeder.path} stays plain (depthwise or fan-in 1) and gains a bias; 1/β{note}"
        return make("replace", "Scale", why, edits=(Edit(feeder.path, _biased), *edits))

    def _standardizes(self, graph: Graph, node: Node) -> bool:
        return node.module is not None and standardizable(node.module) and _reaches_norm(graph, node)

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        calibrate_(model, *inputs)


def standardizable(module: nn.Module) -> bool:
    """Whether scaled weight standardization makes sense: torch's own layer, fan-in above 1, not depthwise."""
    if not is_weighted(module) or type(module).__module__.split(".")[0] != "torch":
        return False
    weight: Tensor = module.weight  # type: ignore[assignment]
    depthwise = getattr(module, "groups", 1) > 1 and getattr(module, "groups", 1) == getattr(
        module, "in_channels", 0
    )
    return not depthwise and weight.ndim >= 2 and weight[0].numel() > 1


def _twin_name(node: Node) -> str:
    twin = scaled_std_class(node.module) if node.module is not None else None
    return twin.__name__ if twin else ""


def _standardized(alpha: float, layer: nn.Module) -> nn.Module:
    twin = scaled_std_class(layer)
    assert twin is not None
    new = twin.from_plain(layer, alpha=alpha)
    new.__dict__["calibrated"] = True  # its `scale` is measured in `finish`, so theory starts anew from here
    return new


def _biased(layer: nn.Module) -> nn.Module:
    """The norm layer's shift is what a layer without bias would lose with it."""
    if layer.bias is not None:
        return layer
    weight: Tensor = layer.weight  # type: ignore[assignment]
    units = getattr(layer, "out_channels", None) or len(weight)
    return with_parameters(layer, bias=weight.new_zeros(units).detach())


def _scaled(alpha: float, norm: nn.Module) -> nn.Module:
    scale = Scale(alpha)
    like = next((t for t in [*norm.parameters(), *norm.buffers()] if t.is_floating_point()), None)
    return after(norm, scale if like is None else scale.to(like.device, like.dtype))


def _reaches_norm(graph: Graph, node: Node) -> bool:
    """Whether a norm layer reads this output through nothing but sums, concats, pools and activations."""
    seen, queue = set(), list(graph.consumers(node.index))
    while queue:
        current = graph.nodes[queue.pop()]
        if current.index in seen:
            continue
        seen.add(current.index)
        if current.module is not None and is_batch_norm_like(current.module):
            return True
        if current.module is not None and is_weighted(current.module):
            continue
        if current.name == "mul" and len(current.inputs) > 1 and current.inputs[0] != current.inputs[1]:
            continue
        queue.extend(graph.consumers(current.index))
    return False
