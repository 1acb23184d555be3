"""Layers that need no normalization: scaled-standardized convolutions and linears, constant scales."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.functional import EPS, scaled_weight_standardization


class _ScaledStd(nn.Module):
    """What every scaled-standardized layer adds to torch's own: a gain, two constants, the effective weight."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    gain: nn.Parameter
    scale: Tensor
    alpha: Tensor
    groups: int = 1
    unit_dim = 0
    arguments: tuple[str, ...] = ()  # constructor arguments that torch's layer keeps as attributes

    def __init__(self, *args: Any, eps: float = EPS, scale: float = 1.0, alpha: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eps = eps
        at: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.gain = nn.Parameter(torch.ones(self.units, **at))
        self.register_buffer("scale", torch.tensor(float(scale), **at))
        self.register_buffer("alpha", torch.tensor(float(alpha), **at))

    @property
    def units(self) -> int:
        """Output channels or features: one gain each."""
        return self.weight.shape[1] * self.groups if self.unit_dim else self.weight.shape[0]

    def effective_weight(self) -> Tensor:
        """scale · alpha · gain · standardized weight: what the layer is run with."""
        gain = self.gain * (self.scale * self.alpha)
        return scaled_weight_standardization(self.weight, gain, self.eps, self.unit_dim, self.groups)

    def effective_bias(self) -> Tensor | None:
        """scale · alpha · bias."""
        return None if self.bias is None else self.bias * (self.scale * self.alpha)

    @classmethod
    def from_plain(cls, layer: nn.Module, eps: float = EPS, scale: float = 1.0, alpha: float = 1.0) -> Self:
        """A scaled-standardized twin that takes over `layer`'s parameters; a missing bias is added as zeros."""
        kept = {name: getattr(layer, name) for name in cls.arguments}
        twin = cls(**kept, eps=eps, scale=scale, alpha=alpha, device="meta")
        weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        at: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        twin.weight = weight
        bias = getattr(layer, "bias", None)
        twin.bias = nn.Parameter(torch.zeros(twin.units, **at)) if bias is None else bias
        twin.gain = nn.Parameter(torch.ones(twin.units, **at))
        twin.scale, twin.alpha = torch.tensor(float(scale), **at), torch.tensor(float(alpha), **at)
        return twin.train(layer.training)

    def extra_repr(self) -> str:
        constants = "" if self.scale.is_meta else f", scale={self.scale:.4g}, alpha={self.alpha:.4g}"
        return super().extra_repr() + constants


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class _ScaledStdConv(_ScaledStd):
    arguments = _CONV

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(), self.effective_bias())  # type: ignore[operator]


class ScaledStdConv1d(_ScaledStdConv, nn.Conv1d):
    """`nn.Conv1d` with scaled weight standardization; see `ScaledStdConv2d`."""


class ScaledStdConv2d(_ScaledStdConv, nn.Conv2d):
    """`nn.Conv2d` run with scale · alpha · gain · standardized weight, and a bias.

    Ŵ_i = scale · alpha · gain_i · (W_i − μ_i) / sqrt(max(N · v_i, eps)), N = in/groups · kH · kW.
    On inputs that are independent over the receptive field with variance s², the output has mean
    `bias` and variance (scale · alpha · gain_i · s)².

    Args:
        *args, **kwargs: as `nn.Conv2d`.
        eps: floor on N · v_i.
        scale: constant factor, such as the preceding activation's gain γ or 1/β.
        alpha: constant factor of a residual branch's last layer, α.

    Example:
        >>> layer = ScaledStdConv2d(16, 32, 3, padding=1, scale=1.7128586)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])

    Paper: arXiv 2101.08692 §4.1. Checked against deepmind-research `nfnets/base.py` (`WSConv2D`).
    """


class ScaledStdConv3d(_ScaledStdConv, nn.Conv3d):
    """`nn.Conv3d` with scaled weight standardization; see `ScaledStdConv2d`."""


class ScaledStdLinear(_ScaledStd, nn.Linear):
    """`nn.Linear` with scaled weight standardization; see `ScaledStdConv2d`."""

    arguments = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight(), self.effective_bias())


class _ScaledStdConvTranspose(_ScaledStd):
    """The unit is the OUTPUT channel: dimension 1 of (in, out/groups, k…), within its group."""

    unit_dim = 1
    arguments = (*_CONV, "output_padding")

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        rank = self.weight.ndim - 2
        padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        weight, bias = self.effective_weight(), self.effective_bias()
        return convolve(input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)  # type: ignore[arg-type]


class ScaledStdConvTranspose1d(_ScaledStdConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with scaled weight standardization per output channel."""


class ScaledStdConvTranspose2d(_ScaledStdConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with scaled weight standardization per output channel."""


class ScaledStdConvTranspose3d(_ScaledStdConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with scaled weight standardization per output channel."""


class Scale(nn.Module):
    """y = value · x, a constant of the architecture that travels with the `state_dict`.

    Args:
        value: the constant, e.g. 1/β before a residual branch.

    Example:
        >>> Scale(0.5)(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    value: Tensor

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.register_buffer("value", torch.tensor(float(value)))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.value

    def extra_repr(self) -> str:
        return "" if self.value.is_meta else f"{self.value:.4g}"


class ChannelAffine(nn.Module):
    """y_c = weight_c · x_c + bias_c over dimension 1: what a BatchNorm in evaluation mode computes.

    Args:
        num_features: channels.

    Example:
        >>> ChannelAffine(3)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, num_features: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (input.ndim - 2)
        return torch.addcmul(self.bias.reshape(shape), input, self.weight.reshape(shape))

    def extra_repr(self) -> str:
        return f"{self.num_features}"


def scaled_std_class(layer: nn.Module) -> type[_ScaledStd] | None:
    """The scaled-standardized class for a convolution or linear, or None if there is none."""
    for plain, scaled in _TWINS.items():
        if isinstance(layer, plain):
            return scaled
    return None


_TWINS: dict[type[nn.Module], type[_ScaledStd]] = {
    nn.Conv1d: ScaledStdConv1d,
    nn.Conv2d: ScaledStdConv2d,
    nn.Conv3d: ScaledStdConv3d,
    nn.ConvTranspose1d: ScaledStdConvTranspose1d,
    nn.ConvTranspose2d: ScaledStdConvTranspose2d,
    nn.ConvTranspose3d: ScaledStdConvTranspose3d,
    nn.Linear: ScaledStdLinear,
}
