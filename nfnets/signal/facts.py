"""What a layer tells by itself, whatever goes through it: its shape, whether it is trained, its gain, its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.trace import Graph


@dataclass(frozen=True)
class Facts:
    """Of one layer with a weight.

    Attributes:
        shape: of its (first) weight.
        groups: of a convolution.
        frozen: none of its weights is trained.
        gain: on the device, what a standardized layer multiplies its weight by; root mean square over units.
        apart: on the device, the largest difference between the weights of its first units.
    """

    shape: tuple[int, ...]
    groups: int | None
    frozen: bool
    gain: Tensor | None
    apart: Tensor | None


def facts(
    graph: Graph, weights: Mapping[int, Sequence[nn.Parameter]], units: bool = True
) -> dict[int, Facts]:
    """The facts of every point with a weight; nothing is synchronized.

    Args:
        graph: of the pass.
        weights: parameters by node.
        units: whether to compare units: those that differ once do so ever after.

    Returns:
        By node.
    """
    with torch.no_grad():
        return {i: _facts(graph.nodes[i].module, held, units) for i, held in weights.items()}


def _facts(module: Any, held: Sequence[nn.Parameter], compared: bool) -> Facts:
    weight = held[0]
    compared = compared and weight.dim() > 1 and not isinstance(module, nn.Embedding)
    compared = compared and not isinstance(module, nn.modules.conv._ConvTransposeNd)
    units = weight[:4] if compared else None
    apart = (units[1:] - units[:1]).abs().amax() if units is not None and len(units) > 1 else None
    frozen = not any(w.requires_grad for w in held)
    return Facts(tuple(weight.shape), getattr(module, "groups", None), frozen, _gain(module), apart)


def _gain(module: Any) -> Tensor | None:
    scale, alpha, gain = (getattr(module, name, None) for name in ("scale", "alpha", "gain"))
    if not (isinstance(scale, Tensor) and isinstance(alpha, Tensor) and scale.numel() == alpha.numel() == 1):
        return None
    constant = scale.detach() * alpha.detach()
    return constant * gain.detach().square().mean().sqrt() if isinstance(gain, Tensor) else constant
