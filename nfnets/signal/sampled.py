"""What a probe keeps of a sampled step until its numbers are fetched."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nfnets.signal.collect import Held, Pass, Weights, norms
from nfnets.signal.facts import Facts
from nfnets.signal.points import Place

untraced = torch._C.DisableTorchFunction
"""For what a probe does in a pass that another tracer may be recording: it is no part of the model."""


@dataclass
class Layout:
    """What a graph's nodes mean for the report: found once, for every later pass with the same calls."""

    signature: tuple[Any, ...]
    found: list[Place]
    ends: dict[int, tuple[int, Tensor | None]]
    kept: set[int]
    compared: set[int]
    held: Held


@dataclass
class SampledStep:
    """One sampled step: statistics on the device, rows only when the next one comes or a report is asked for."""

    step: int
    measured: Pass
    layout: Layout
    weights: Weights
    weight_norms: dict[int, Tensor]
    before: dict[int, list[Tensor]]
    versions: list[int]
    facts: dict[int, Facts]
    updates: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def follow(self) -> None:
        """Takes the norms of the weights' gradients as they come, until `unfollow`."""
        for node, held in self.weights.items():
            for part, weight in enumerate(held):
                if weight.requires_grad:
                    self.hooks.append(weight.register_hook(partial(self._took, node, part)))

    def _took(self, node: int, part: int, gradient: Tensor) -> None:
        with untraced():
            self.gradients.setdefault(node, {})[part] = norms({0: [gradient]})[0]

    def unfollow(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def gradient_norms(self) -> dict[int, Tensor]:
        return norms({node: list(parts.values()) for node, parts in self.gradients.items()})
