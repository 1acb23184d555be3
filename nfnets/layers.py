"""Layers that need no normalization: scaled-standardized convolutions and linears."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple, Self

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.blocks import ChannelAffine, Scale, ScaledActivation, SkipInit, SqueezeExcite, StochasticDepth
from nfnets.errors import UserError
from nfnets.functional import EPS, pad_same, scaled_weight_standardization
from nfnets.snapshot import Snapshot
from nfnets.whose import runs_torchs_code

__all__ = [
    "ChannelAffine",
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
    "scaled_std_class",
]


# They branch on shapes, so torch.fx records a call of each and does not look inside.
torch.fx.wrap("pad_same")
torch.fx.wrap("scaled_weight_standardization")


class _Remembered(NamedTuple):
    snapshot: Snapshot
    eps: float
    weight: Tensor
    bias: Tensor | None


class _ScaledStd(nn.Module):
    """What every scaled-standardized layer adds to torch's own: a gain, two constants, the effective weight.

    At evaluation without gradients, on a CPU, the effective weight is computed once and reused until one of the
    five tensors that it is made of changes, by whatever means (`nfnets.snapshot`).
    """

    weight: Tensor
    bias: Tensor | None
    gain: nn.Parameter
    scale: Tensor
    alpha: Tensor
    groups: int = 1
    unit_dim = 0
    arguments: tuple[str, ...] = ()  # constructor arguments that torch's layer keeps as attributes
    _remembered: _Remembered | None = None

    def __init__(self, *args: Any, eps: float = EPS, scale: float = 1.0, alpha: float = 1.0, **kwargs: Any):
        self._check_fan_in(*args, **kwargs)
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
        gain = self.gain * (self.scale * self.alpha)
        return scaled_weight_standardization(self.weight, gain, self.eps, self.unit_dim, self.groups)

    def effective_bias(self) -> Tensor | None:
        """scale · alpha · bias."""
        return None if self.bias is None else self.bias * (self.scale * self.alpha)

    def effective(self, input: Any = None) -> tuple[Tensor, Tensor | None]:
        """Effective weight and bias, those remembered where they still hold. Not to be written to."""
        # A compiler, exporter or tracer must see the computation, not its result.
        seen = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if seen or isinstance(input, torch.fx.Proxy):
            return self.effective_weight(), self.effective_bias()
        if self.training or torch.is_grad_enabled():
            self._remembered = None
            return self.effective_weight(), self.effective_bias()
        # Out of the dictionaries: five attributes of a module take longer than everything else here.
        own, constants = self._parameters, self._buffers
        try:
            sources = own["weight"], own["gain"], own["bias"], constants["scale"], constants["alpha"]
        except KeyError:  # one of them is computed, by a parametrization for example
            return self.effective_weight(), self.effective_bias()
        kept = self._remembered
        if kept is not None and kept.eps == self.eps and kept.snapshot.holds(sources):
            return kept.weight, kept.bias
        # A weight that is no parameter is computed too (a functional call).
        snapshot = Snapshot.take(sources) if type(own["weight"]) is nn.Parameter else None
        weight, bias = self.effective_weight(), self.effective_bias()
        self._remembered = None if snapshot is None else _Remembered(snapshot, self.eps, weight, bias)
        return weight, bias

    def train(self, mode: bool = True) -> Self:
        self._remembered = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_remembered"}

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
        kept = {name: getattr(layer, name) for name in cls.arguments}
        if _pads_like_tensorflow(layer):
            kept["padding"] = "tf_same"
        twin = cls(**kept, eps=eps, scale=scale, alpha=alpha, device="meta")
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
        given = inspect.signature(_plain(cls).__init__).bind(None, *args, **kwargs).arguments
        if "in_features" in given:
            fan_in = given["in_features"]
        else:
            kernel, rank = given["kernel_size"], int(_plain(cls).__name__[-2])
            taps = math.prod(kernel) if isinstance(kernel, (tuple, list)) else kernel**rank
            fan_in = given["in_channels"] // max(1, given.get("groups", 1)) * taps
        if fan_in < 2:
            raise UserError(
                f"{cls.__name__} of fan-in {fan_in}: expected at least 2 weights per unit, or W − mean is 0; "
                f"leave this layer a plain {_plain(cls).__name__}"
            )


_CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


class _PaddedConv(nn.modules.conv._ConvNd):
    """Torch's convolutions with `padding="tf_same"` beside "same" and "valid"."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        *args: Any,
        **kwargs: Any,
    ):
        known: Any = 0 if padding == "tf_same" else padding
        super().__init__(in_channels, out_channels, kernel_size, stride, known, *args, **kwargs)
        if padding == "tf_same":
            self.padding = "tf_same"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding != "tf_same":
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        input = pad_same(input, self.kernel_size, self.stride, self.dilation, self.padding_mode)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(input, weight, bias, self.stride, 0, self.dilation, self.groups)  # type: ignore[arg-type]


class SamePadConv1d(_PaddedConv, nn.Conv1d):
    """`nn.Conv1d` that also takes `padding="tf_same"`."""


class SamePadConv2d(_PaddedConv, nn.Conv2d):
    """`nn.Conv2d` that also takes `padding="tf_same"`, like timm's `Conv2dSame`."""


class SamePadConv3d(_PaddedConv, nn.Conv3d):
    """`nn.Conv3d` that also takes `padding="tf_same"`."""


class _ScaledStdConv(_ScaledStd, _PaddedConv):
    arguments = _CONV

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.effective(input))


class ScaledStdConv1d(_ScaledStdConv, nn.Conv1d):
    """`nn.Conv1d` with scaled weight standardization; see `ScaledStdConv2d`."""


class ScaledStdConv2d(_ScaledStdConv, nn.Conv2d):
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


class ScaledStdConv3d(_ScaledStdConv, nn.Conv3d):
    """`nn.Conv3d` with scaled weight standardization; see `ScaledStdConv2d`."""


class ScaledStdLinear(_ScaledStd, nn.Linear):
    """`nn.Linear` with scaled weight standardization; see `ScaledStdConv2d`."""

    arguments = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.effective(input))


class _ScaledStdConvTranspose(_ScaledStd):
    """The unit is the OUTPUT channel: dimension 1 of (in, out/groups, k…), within its group."""

    unit_dim = 1
    arguments = (*_CONV, "output_padding")

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        rank = int(_plain(type(self)).__name__[-2])
        padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        weight, bias = self.effective(input)
        return convolve(input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)  # type: ignore[arg-type]


class ScaledStdConvTranspose1d(_ScaledStdConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with scaled weight standardization per output channel."""


class ScaledStdConvTranspose2d(_ScaledStdConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with scaled weight standardization per output channel."""


class ScaledStdConvTranspose3d(_ScaledStdConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with scaled weight standardization per output channel."""


def scaled_std_class(layer: nn.Module) -> type[_ScaledStd] | None:
    """The scaled-standardized class for a convolution or linear, or None if there is none.

    None also for a subclass with a forward pass of its own, which a twin would not run (timm's `Conv2dSame`, whose
    padding is known here, is the exception).
    """
    plain = next((plain for plain in _TWINS if isinstance(layer, plain)), None)
    own = runs_torchs_code(layer) or _pads_like_tensorflow(layer)
    return _TWINS[plain] if plain is not None and own else None


def has_own_weight(layer: nn.Module | None) -> bool:
    """Whether a layer is a convolution or linear that runs as torch's and whose weight is a parameter.

    Not so: subclasses with a forward of their own, and weights that are computed (parametrizations, weight norm).
    """
    if layer is None or scaled_std_class(layer) is None:
        return False
    own = layer._parameters
    return own.get("weight") is not None and isinstance(own.get("bias", 0), Tensor | None)


def fan_in(layer: nn.Module) -> int:
    """Weights per output channel or feature: in/groups · k…, for transposed convolutions too."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    units = weight.shape[1] * layer.groups if transposed else weight.shape[0]
    return weight.numel() // max(1, units)


def _pads_like_tensorflow(layer: nn.Module) -> bool:
    if "forward" in vars(layer):
        return False
    # Known by name: importing timm takes seconds, and who has such a layer has imported it.
    return (type(layer).__module__, type(layer).__name__) == ("timm.layers.conv2d_same", "Conv2dSame")


def plain_class(layer: nn.Module) -> type[nn.Module] | None:
    """The plain class that a scaled-standardized layer can become, or None for any other layer."""
    if not isinstance(layer, _ScaledStd):
        return None
    if layer.__dict__.get("padding") == "tf_same":
        return (SamePadConv1d, SamePadConv2d, SamePadConv3d)[layer.weight.ndim - 3]
    return _plain(type(layer))


def _plain(scaled: type[nn.Module]) -> type[nn.Module]:
    return next(plain for plain in _TWINS if issubclass(scaled, plain))


_TWINS: dict[type[nn.Module], type[_ScaledStd]] = {
    nn.Conv1d: ScaledStdConv1d,
    nn.Conv2d: ScaledStdConv2d,
    nn.Conv3d: ScaledStdConv3d,
    nn.ConvTranspose1d: ScaledStdConvTranspose1d,
    nn.ConvTranspose2d: ScaledStdConvTranspose2d,
    nn.ConvTranspose3d: ScaledStdConvTranspose3d,
    nn.Linear: ScaledStdLinear,
}
PLAIN_LAYERS: tuple[type[nn.Module], ...] = tuple(_TWINS)
"""Torch's convolutions and linear: what has a scaled-standardized twin."""
