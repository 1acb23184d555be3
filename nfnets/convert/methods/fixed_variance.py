"""`fixed_variance`: a constant and a bias in every norm layer's place, the constant by bookkeeping on the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.convert.calibrate import calibrate_
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import after, channels_of, like, on_meta, site_row
from nfnets.convert.plan import Edit, Row
from nfnets.convert.sites import Site
from nfnets.layers import Scale
from nfnets.predict import Moments, predict
from nfnets.trace import Graph, Node, trace


class FixedVariance(Scale):
    """y_c = K · x_c + β_c over dimension 1: K a constant that travels with the `state_dict`, β learnable, 0 at first.

    Args:
        num_features: channels.
        value: K.

    Example:
        >>> FixedVariance(3, 0.5)(torch.ones(2, 3, 4, 4)).mean().item()
        0.5

    Paper: KataGo, "methods" notes (fixed variance initialization).
    """

    def __init__(self, num_features: int, value: float = 1.0):
        super().__init__(value)
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.bias.reshape((1, -1) + (1,) * (input.ndim - 2))


@register
@dataclass
class FixedVarianceMethod(Method):
    """KataGo's fixed variance scaling: every norm layer becomes y = K · x + β with a constant K.

    K = 1 / √(average channel variance of x), as `nfnets.predict` derives it from the weights: variances add at sums,
    activations map a normal's moments, everything restarts at variance 1 behind each constant. No block pattern is
    matched and no weight changed; γ and β of the norm layers are dropped. Theory takes positions for independent
    and padding for small: on the images themselves the variances differ, which `measure` corrects. On `meta` there
    are no weights to read: constants then come with the `state_dict` that is loaded.

    Args:
        measure: take K from the example inputs in one forward pass instead.

    Example:
        >>> from nfnets.convert import convert
        >>> convolutions = [nn.Conv2d(c, 64, 3, padding=1, padding_mode="circular", bias=False) for c in (3, 64)]
        >>> for convolution in convolutions:
        ...     _ = nn.init.kaiming_normal_(convolution.weight)
        >>> model = nn.Sequential(convolutions[0], nn.BatchNorm2d(64), nn.ReLU(), convolutions[1], nn.BatchNorm2d(64))
        >>> x = torch.randn(8, 3, 16, 16)
        >>> converted = convert(model, x, method="fixed_variance")
        >>> 0.8 < converted(x).var((0, 2, 3)).mean().item() < 1.25
        True

    Paper: KataGo's methods notes; no code copied. Checked against measured variances on unit normal inputs.
    """

    name = "fixed_variance"
    measure: bool = False

    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        why = "1/√variance, " + ("measured" if self.measure else "predicted") + ", and a bias"
        return [site_row(s, "replace", "FixedVariance", why, Edit(s.path, _fixed)) for s in sites], []

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if on_meta(model, inputs):
            return
        if self.measure:
            calibrate_(model, *inputs)
        else:
            bookkeep_(model, *inputs)


def bookkeep_(model: nn.Module, *inputs: Any) -> dict[str, float]:
    """Choose the constant of every `FixedVariance` layer, in execution order, so that theory's variance behind is 1.

    Args:
        model: a model with such layers, whose constants are changed.
        *inputs: example inputs; only the graph that they make is read.

    Returns:
        The constants by module path. One that theory cannot tell (variance 0 or not finite) is left as it is.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, FixedVariance)}
    chosen: dict[str, float] = {}

    def correct(node: Node, moments: Moments) -> Moments:
        layer = layers.get(node.path)
        if layer is None or node.name != "mul":
            return moments
        if node.path not in chosen and 0 < moments.var < float("inf"):
            chosen[node.path] = moments.var**-0.5  # relative to the value that was traced
        factor = chosen.get(node.path, 1.0)
        return Moments(moments.mean * factor, moments.mean_sq * factor**2, moments.var * factor**2)

    predict(trace(model, *inputs), correct=correct)
    for path, factor in chosen.items():
        chosen[path] = factor * float(layers[path].value)
        layers[path].value.fill_(chosen[path])
    return chosen


def _fixed(norm: nn.Module) -> nn.Module:
    return after(norm, FixedVariance(channels_of(norm)).to(**like(norm)))
