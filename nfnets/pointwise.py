"""Pointwise layers in norm layers' places: a bounded function of each value, and no statistics at any time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError


class _Pointwise(nn.Module):
    """What both share: α, γ and β, and where these two stand."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        channel_dim: int = -1,
        affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        shape: tuple[int, ...] = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
        if channel_dim not in (1, -1) or (channel_dim == 1 and len(shape) != 1):
            raise UserError(
                f"channel_dim={channel_dim} with normalized_shape={shape}: expected -1, or 1 and a number of channels"
            )
        if not math.isfinite(alpha) or alpha <= 0:
            raise UserError(f"alpha={alpha}: expected a finite number above 0; pass alpha=0.5")
        self.normalized_shape, self.channel_dim = shape, channel_dim
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.full((1,), float(alpha), **at))
        self.weight = nn.Parameter(torch.ones(shape, **at)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape, **at)) if affine and bias else None

    def argument(self, input: Tensor) -> Tensor:
        """What the bounded function is applied to."""
        return self.alpha * input

    def bounded(self, argument: Tensor) -> Tensor:
        """The function, between −1 and 1."""
        raise NotImplementedError

    def slope(self, argument: Tensor) -> Tensor:
        """The function's derivative, relative to the one at 0: 1 where it is linear, 0 where it is saturated."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        out = self.bounded(self.argument(input))
        weight, bias = (
            p if p is None or self.channel_dim == -1 else p.reshape((-1,) + (1,) * (input.ndim - 2))
            for p in (self.weight, self.bias)
        )
        if weight is not None and bias is not None:
            out = torch.addcmul(bias, out, weight)
        elif weight is not None:
            out = out * weight
        elif bias is not None:
            out = out + bias
        return out.to(input.dtype)  # as BatchNorm does

    def extra_repr(self) -> str:
        alpha = "" if self.alpha.is_meta else f", alpha={self.alpha.detach().item():.4g}"
        where = "" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}"
        sizes = ", ".join(map(str, self.normalized_shape))
        shape = sizes if len(self.normalized_shape) == 1 else f"({sizes})"
        return f"{shape}{alpha}{where}" + ("" if self.weight is not None else ", affine=False")


class DynamicTanh(_Pointwise):
    """y = γ · tanh(α · x) + β (DyT), for layer norms' places. α is one number; γ, β have the normalized shape.

    A `state_dict` of the official module fits: `alpha`, `weight`, `bias`.

    Args:
        normalized_shape: channels, or the last dimensions as of `nn.LayerNorm`.
        alpha: α at first.
        channel_dim: where the channels are in the input: −1, or 1 for (N, C, *space).
        affine: whether there is a γ; without it there is no β either.
        bias: whether there is a β.

    Raises:
        UserError: an α that is not above 0, or a shape that has no place at `channel_dim`.

    Example:
        >>> DynamicTanh(4)(torch.tensor([0.0, 1.0, 2.0, 100.0])).detach()
        tensor([0.0000, 0.4621, 0.7616, 1.0000])

    Paper: arXiv 2503.10622. Checked against the formula of `jiachenzhu/DyT` (`dynamic_tanh.py`).
    """

    def bounded(self, argument: Tensor) -> Tensor:
        return argument.tanh()

    def slope(self, argument: Tensor) -> Tensor:
        return 1 - argument.tanh().square()


class DynamicErf(_Pointwise):
    """y = γ · erf(α · x + s) + β (Derf), for layer norms' places. α and s are one number each, and learn.

    A `state_dict` of the official module fits: `alpha`, `shift`, `weight`, `bias`.

    Args:
        normalized_shape: channels, or the last dimensions as of `nn.LayerNorm`.
        alpha: α at first.
        channel_dim: where the channels are in the input: −1, or 1 for (N, C, *space).
        affine: whether there is a γ; without it there is no β either.
        bias: whether there is a β.
        shift: s at first.

    Raises:
        UserError: as `DynamicTanh`.

    Example:
        >>> DynamicErf(4)(torch.tensor([0.0, 1.0, 2.0, 100.0])).detach()
        tensor([0.0000, 0.5205, 0.8427, 1.0000])

    Paper: Derf. Checked against the formula of `zlab-princeton/Derf`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        channel_dim: int = -1,
        affine: bool = True,
        bias: bool = True,
        shift: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(normalized_shape, alpha, channel_dim, affine, bias, device, dtype)
        self.shift = nn.Parameter(torch.full((1,), float(shift), device=device, dtype=dtype))

    def argument(self, input: Tensor) -> Tensor:
        return self.alpha * input + self.shift

    def bounded(self, argument: Tensor) -> Tensor:
        return argument.erf()

    def slope(self, argument: Tensor) -> Tensor:
        return (-argument.square()).exp()
