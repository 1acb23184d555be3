"""Layers that need no normalization: scaled-standardized convolutions and linears."""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable
from typing import Any, Self

import torch
import torch.fx
from torch import Tensor, nn

from nfnets.blocks import ChannelAffine, Scale, ScaledActivation, SkipInit, SqueezeExcite, StochasticDepth
from nfnets.computed import (
    Computed,
    ComputedConv,
    ComputedConvTranspose,
    ComputedLinear,
    plain_base,
    runs_as_plain,
)
from nfnets.errors import UserError
from nfnets.functional import EPS, standardized_weight
from nfnets.pointwise import DynamicErf, DynamicTanh
from nfnets.tailored import TailoredActivation

__all__ = [
    "ChannelAffine",
    "DynamicErf",
    "DynamicTanh",
    "Scale",
    "ScaledActivation",
    "ScaledStdConv1d",
    "ScaledStdConv2d",
    "ScaledStdConv3d",
    "ScaledStdConvTranspose1d",
    "ScaledStdConvTranspose2d",
    "ScaledStdConvTranspose3d",
    "ScaledStdLinear",
    "SkipInit",
    "SqueezeExcite",
    "StochasticDepth",
    "TailoredActivation",
    "scaled_std_class",
]


# It branches on shapes, so torch.fx records a call and does not look inside.
torch.fx.wrap("standardized_weight")


class _ScaledStd(Computed):
    """What every scaled-standardized layer adds to torch's own: a gain, two constants, the effective weight."""

    gain: nn.Parameter
    scale: Tensor
    alpha: Tensor
    sources = ("gain", "scale", "alpha")

    def __init__(self, *args: Any, eps: float = EPS, scale: float = 1.0, alpha: float = 1.0, **kwargs: Any):
        self._check_fan_in(*args, **kwargs)
        super().__init__(*args, **kwargs)
        self.eps = eps
        at: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.gain = nn.Parameter(torch.ones(self.units, **at))
        self.register_buffer("scale", torch.tensor(float(scale), **at))
        self.register_buffer("alpha", torch.tensor(float(alpha), **at))

    def reset_parameters(self) -> None:
        """Weight ~ N(0, 1/N), bias 0, gain 1: DeepMind's, and the weight norm its learning rates are made for."""
        if self.weight.is_meta:
            return  # there is nothing to fill, and trying takes longer than the rest of a conversion
        fan_in = self.weight.numel() // max(1, self.units)
        nn.init.normal_(self.weight, std=max(1, fan_in) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if hasattr(self, "gain"):  # not yet, when torch's constructor calls
            nn.init.ones_(self.gain)

    def effective_weight(self) -> Tensor:
        """scale · alpha · gain · standardized weight: what the layer is run with."""
        scale = self.scale * self.alpha
        return standardized_weight(self.weight, self.gain, self.eps, self.unit_dim, self.groups, scale)

    def effective_bias(self) -> Tensor | None:
        """scale · alpha · bias."""
        return None if self.bias is None else self.bias * (self.scale * self.alpha)

    def settings(self) -> Hashable:
        return self.eps

    @classmethod
    def from_plain(cls, layer: nn.Module, eps: float = EPS, scale: float = 1.0, alpha: float = 1.0) -> Self:
        """A scaled-standardized twin that takes over `layer`'s parameters; a missing bias is added as zeros.

        Raises:
            UserError: a weight of fan-in 0 or 1, or one that is computed (a parametrization) and so no parameter.
        """
        weight = layer.weight
        if not isinstance(weight, nn.Parameter):
            raise UserError(
                f"{type(layer).__name__} computes its weight: expected a parameter; remove its parametrization first "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
        twin = cls(**cls.arguments_of(layer), eps=eps, scale=scale, alpha=alpha, device="meta")
        at: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        twin.weight = weight
        bias = getattr(layer, "bias", None)
        learn = weight.requires_grad
        twin.bias = nn.Parameter(torch.zeros(twin.units, **at), learn) if bias is None else bias
        twin.gain = nn.Parameter(torch.ones(twin.units, **at), learn)
        twin.scale, twin.alpha = torch.tensor(float(scale), **at), torch.tensor(float(alpha), **at)
        return twin.train(layer.training)

    def extra_repr(self) -> str:
        constants = "" if self.scale.is_meta else f", scale={self.scale:.4g}, alpha={self.alpha:.4g}"
        return super().extra_repr() + constants

    @classmethod
    def _check_fan_in(cls, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(plain_base(cls).__init__).bind(None, *args, **kwargs).arguments
        if "in_features" in given:
            fan_in = given["in_features"]
        else:
            kernel, rank = given["kernel_size"], int(plain_base(cls).__name__[-2])
            taps = math.prod(kernel) if isinstance(kernel, (tuple, list)) else kernel**rank
            fan_in = given["in_channels"] // max(1, given.get("groups", 1)) * taps
        if fan_in < 2:
            raise UserError(
                f"{cls.__name__} of fan-in {fan_in}: expected at least 2 weights per unit, or W − mean is 0; "
                f"leave this layer a plain {plain_base(cls).__name__}"
            )


class ScaledStdConv1d(_ScaledStd, ComputedConv, nn.Conv1d):
    """`nn.Conv1d` with scaled weight standardization; see `ScaledStdConv2d`."""


class ScaledStdConv2d(_ScaledStd, ComputedConv, nn.Conv2d):
    """`nn.Conv2d` run with scale · alpha · gain · standardized weight, and a bias.

    Ŵ_i = scale · alpha · gain_i · (W_i − μ_i) / sqrt(max(N · v_i, eps)), N = in/groups · kH · kW.
    On inputs that are independent over the receptive field with variance s², the output has mean
    `bias` and variance (scale · alpha · gain_i · s)².

    Args:
        *args, **kwargs: as `nn.Conv2d`, and `padding="tf_same"` for TensorFlow's 'SAME'.
        eps: floor on N · v_i.
        scale: constant factor, such as the preceding activation's gain γ or 1/β.
        alpha: constant factor of a residual branch's last layer, α.

    Example:
        >>> layer = ScaledStdConv2d(16, 32, 3, padding=1, scale=1.7128586)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])

    Paper: arXiv 2101.08692 §4.1. Checked against deepmind-research `nfnets/base.py` (`WSConv2D`).
    """


class ScaledStdConv3d(_ScaledStd, ComputedConv, nn.Conv3d):
    """`nn.Conv3d` with scaled weight standardization; see `ScaledStdConv2d`."""


class ScaledStdLinear(_ScaledStd, ComputedLinear, nn.Linear):
    """`nn.Linear` with scaled weight standardization; see `ScaledStdConv2d`."""


class ScaledStdConvTranspose1d(_ScaledStd, ComputedConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with scaled weight standardization per output channel."""


class ScaledStdConvTranspose2d(_ScaledStd, ComputedConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with scaled weight standardization per output channel."""


class ScaledStdConvTranspose3d(_ScaledStd, ComputedConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with scaled weight standardization per output channel."""


def scaled_std_class(layer: nn.Module) -> type[_ScaledStd] | None:
    """The scaled-standardized class for a convolution or linear, or None if there is none.

    None also for a subclass with a forward pass of its own, which a twin would not run (timm's `Conv2dSame`, whose
    padding is known here, is the exception).
    """
    plain = runs_as_plain(layer)
    return None if plain is None else _TWINS[plain]


def fan_in(layer: nn.Module) -> int:
    """Weights per output channel or feature: in/groups · k…, for transposed convolutions too."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    units = weight.shape[1] * layer.groups if transposed else weight.shape[0]
    return weight.numel() // max(1, units)


_TWINS: dict[type[nn.Module], type[_ScaledStd]] = {
    nn.Conv1d: ScaledStdConv1d,
    nn.Conv2d: ScaledStdConv2d,
    nn.Conv3d: ScaledStdConv3d,
    nn.ConvTranspose1d: ScaledStdConvTranspose1d,
    nn.ConvTranspose2d: ScaledStdConvTranspose2d,
    nn.ConvTranspose3d: ScaledStdConvTranspose3d,
    nn.Linear: ScaledStdLinear,
}
