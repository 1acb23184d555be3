"""`fixed_variance`: a constant and a bias in every norm layer's place, the constant measured in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.convert.alpha import check_alpha, note
from nfnets.convert.fused import after, held_at, like
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import learns
from nfnets.convert.methods.rows import law_at, site_row
from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Edit, Start
from nfnets.layers import Scale
from nfnets.predict import Moments, predict, share_inside
from nfnets.scale.target import Target
from nfnets.structure.laws import KINDS, Law, along
from nfnets.structure.walk import is_weighted
from nfnets.trace import Node, trace


class FixedVariance(Scale):
    """y_c = K · x_c + β_c: K a constant that travels with the `state_dict`, β learnable, 0 at first.

    Args:
        num_features: channels.
        value: K.
        channel_dim: where the channels are in the input: 1, or −1 for the last.

    Example:
        >>> FixedVariance(3, 0.5)(torch.ones(2, 3, 4, 4)).mean().item()
        0.5

    Paper: KataGo, "methods" notes (fixed variance initialization).
    """

    def __init__(
        self,
        num_features: int,
        value: float = 1.0,
        device: Any = None,
        dtype: Any = None,
        channel_dim: int = 1,
    ):
        super().__init__(value, device, dtype)
        self.channel_dim = channel_dim
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input) + along(self.bias, input.ndim, self.channel_dim)
        return out.to(input.dtype)  # as BatchNorm does


@register
@dataclass
class FixedVarianceMethod(Method):
    """KataGo's fixed variance scaling: every norm layer becomes y = K · x + β with a constant K.

    K = α / √E[x²], E[x²] measured on the example inputs in one forward pass: each output is rescaled before anything
    reads it. α is 1 but at the ends of residual branches, and less where γ and β keep BatchNorm's own below half
    of that. No block pattern is matched and no weight changed, but that of a head whose output moved by more than a
    factor 2 from the BatchNorm model's: it is scaled back. γ and β of the norm layers are dropped. On `meta` nothing
    can be measured: constants then come with the `state_dict` that is loaded.

    The variance that is fixed is the one over random weights, which is the mean square over activations. A constant
    cannot remove a mean, so fixing the variance within channels would let the means grow without bound: on a
    ResNet-18 they made the logits 18 times as large as BatchNorm's.

    Args:
        measure: False for KataGo's bookkeeping instead: variances add at sums, activations map a normal's moments,
            everything restarts behind each constant (`nfnets.predict`). It takes positions for independent and maps
            for large: on small maps of a ResNet-50 the stream came out 5 times too large.
        alpha: as for `nf`.

    Example:
        >>> from nfnets.convert import convert
        >>> convolutions = [nn.Conv2d(c, 64, 3, padding=1, padding_mode="circular", bias=False) for c in (3, 64)]
        >>> for convolution in convolutions:
        ...     _ = nn.init.kaiming_normal_(convolution.weight)
        >>> model = nn.Sequential(convolutions[0], nn.BatchNorm2d(64), nn.ReLU(), convolutions[1], nn.BatchNorm2d(64))
        >>> x = torch.randn(8, 3, 16, 16)
        >>> converted = convert(model, x, method="fixed_variance")
        >>> 0.8 < converted(x).square().mean().item() < 1.25
        True

    Paper: KataGo's methods notes; no code copied. Checked against measured variances on unit normal inputs.
    """

    name = "fixed_variance"
    carries = KINDS
    compares = "layers"
    measure: bool = True
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def decide(self, net: Net) -> Iterator[Change | Start]:
        alphas = net.alphas(self.alpha)
        limits = net.limits(alphas)
        places = {}
        for site in net.sites:
            alpha = net.alpha_of(site, alphas)
            path = held_at(site.path, site.norm)
            places[path] = alpha
            target = Target(alpha, "mean square", at_most=limits.get(path, math.inf), by="constant")
            yield site_row(
                site,
                "replace",
                "FixedVariance",
                f"1/√(mean square), {'measured' if self.measure else 'predicted'}, and a bias{note(alpha)}",
                Edit(site.path, partial(fixed, alpha, law_at(site))),
                targets={path: target} if self.measure else None,
            )
        if self.measure:
            yield from net.held()
        else:
            yield Start(partial(bookkeep_, alphas=places), "KataGo's bookkeeping")


def bookkeep_(model: nn.Module, *inputs: Any, alphas: Mapping[str, float]) -> None:
    """Choose constants so that theory's mean square behind them is α².

    One that theory cannot tell (mean square 0 or not finite) is left as it is.

    Args:
        model: a model with `Scale` layers at these paths; their constants, α at first, are changed.
        *inputs: example inputs; only the graph that they make is read.
        alphas: α by path.
    """
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in alphas}
    factors: dict[str, float] = {}  # relative to the constant that was traced

    graph = trace(model, *inputs)
    state: dict[int, Moments] = {}

    def correct(node: Node, moments: Moments) -> Moments:
        if node.module is not None and is_weighted(node.module):
            # Over random weights an output has mean 0, and what its inputs' means add belongs to its variance.
            inside = share_inside(node.module, graph, node)
            moments = Moments(0.0, 0.0, moments.var + moments.mean_sq * inside)
        elif _averages(node):
            moments = state[node.inputs[0]]
        elif node.path in layers and node.name == "mul":
            square = moments.var + moments.mean_sq
            if node.path not in factors and 0 < square < math.inf:
                factors[node.path] = alphas[node.path] * square**-0.5
            factor = factors.get(node.path, 1.0)
            moments = Moments(moments.mean * factor, moments.mean_sq * factor**2, moments.var * factor**2)
        state[node.index] = moments
        return moments

    predict(graph, correct=correct)
    for path, factor in factors.items():
        layers[path].value.mul_(factor)


def _averages(node: Node) -> bool:
    """Average pooling. Positions of a network with random weights agree, the deeper the more."""
    name = (type(node.module).__name__ if node.module is not None else node.name).lower()
    return bool(node.inputs) and (name == "mean" or ("avg" in name and "pool" in name))


def fixed(alpha: float, law: Law, norm: nn.Module) -> nn.Module:
    """A constant and a bias in a norm layer's place."""
    new = FixedVariance(law.shape[0], alpha, **like(norm), channel_dim=law.dim)
    new.bias.requires_grad_(learns(norm, law.beta))
    return after(norm, new)
