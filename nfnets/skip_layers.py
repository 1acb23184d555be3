"""Convolutions and linears that end in a SkipInit scalar: for branches that have no place for a module of their own."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from nfnets.copying import twin_of

SCALAR = "skip_gain"


def with_scalar(module: nn.Module, value: float) -> nn.Module:
    """A twin of a module, sharing everything, whose output is times a scalar parameter `skip_gain`.

    Torch's convolutions and linears become a subclass of themselves; any other module gets a forward hook, which
    copies, pickles and compiles with it.

    Example:
        >>> with_scalar(nn.ReLU(), 0.5)(torch.ones(2)).tolist()
        [0.5, 0.5]
    """
    plain = TWINS.get(type(module))
    if plain is not None:
        return plain.from_plain(module, value)
    twin = twin_of(module)
    twin._forward_hooks = module._forward_hooks.copy()
    first = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(()))
    twin.register_parameter(
        SCALAR, nn.Parameter(torch.full((), value, device=first.device, dtype=first.dtype))
    )
    twin.register_forward_hook(_times_scalar)
    return twin


def _times_scalar(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0] * module.skip_gain, *output[1:])
    return output * module.skip_gain


class _Skip(nn.Module):
    """y = skip_gain · layer(x). A subclass of torch's layer, so that paths, weights and `isinstance` stay."""

    skip_gain: nn.Parameter

    @classmethod
    def from_plain(cls, layer: nn.Module, value: float) -> Self:
        """A twin that shares the layer's parameters, buffers and hooks."""
        twin = twin_of(layer)
        twin.__class__ = cls
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
