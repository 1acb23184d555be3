"""Convolutions and linears that end in a SkipInit scalar: for branches that have no place for a module of their own."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn


class _Skip(nn.Module):
    """y = skip_gain · layer(x). A subclass of torch's layer, so that paths, weights and `isinstance` stay."""

    skip_gain: nn.Parameter

    @classmethod
    def from_plain(cls, layer: nn.Module, value: float) -> Self:
        """A twin that shares the layer's parameters, buffers and hooks."""
        twin: Any = copy.copy(layer)
        twin.__class__ = cls
        twin._parameters = layer._parameters.copy()
        weight: Tensor = layer.weight  # type: ignore[assignment]
        twin.skip_gain = nn.Parameter(torch.full((), value, device=weight.device, dtype=weight.dtype))
        return twin

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * self.skip_gain  # type: ignore[misc]


class SkipConv1d(_Skip, nn.Conv1d):
    """`nn.Conv1d` times a SkipInit scalar."""


class SkipConv2d(_Skip, nn.Conv2d):
    """`nn.Conv2d` times a SkipInit scalar."""


class SkipConv3d(_Skip, nn.Conv3d):
    """`nn.Conv3d` times a SkipInit scalar."""


class SkipConvTranspose1d(_Skip, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` times a SkipInit scalar."""


class SkipConvTranspose2d(_Skip, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` times a SkipInit scalar."""


class SkipConvTranspose3d(_Skip, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` times a SkipInit scalar."""


class SkipLinear(_Skip, nn.Linear):
    """`nn.Linear` times a SkipInit scalar."""


TWINS: dict[type[nn.Module], type[_Skip]] = {
    nn.Conv1d: SkipConv1d,
    nn.Conv2d: SkipConv2d,
    nn.Conv3d: SkipConv3d,
    nn.ConvTranspose1d: SkipConvTranspose1d,
    nn.ConvTranspose2d: SkipConvTranspose2d,
    nn.ConvTranspose3d: SkipConvTranspose3d,
    nn.Linear: SkipLinear,
}
