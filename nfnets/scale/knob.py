"""What scales a layer's output: a weight, a standardized layer's gain, weight norm's g."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nfnets.computed import PLAIN_LAYERS
from nfnets.errors import UserError
from nfnets.layers import Scale, _ScaledStd
from nfnets.marked import Measured
from nfnets.scale.one_pass import Write
from nfnets.scale.target import Spread
from nfnets.whose import runs_torchs_code

_PLAIN: tuple[Any, ...] = (*PLAIN_LAYERS, nn.MultiheadAttention)
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


@dataclass(frozen=True, slots=True)
class Knob:
    """The parameter in which a layer's output, less its bias, is homogeneous."""

    parameter: nn.Parameter
    """The weight, the gain or g: multiply it by c and the output less the bias is multiplied by c."""
    direction: nn.Parameter
    """The weight whose rows may be made orthonormal; the same tensor as `parameter` for a plain layer."""
    units: int
    inputs: int
    """Input channels or features."""
    channel_dim: int | None
    """Dimension of the output's channels, counted from the end; None for dimension 1."""
    bias: nn.Parameter | None
    bias_factor: Tensor | None
    """The layer adds `bias_factor · bias`; None for 1."""
    unit_shape: tuple[int, ...] | None
    """Shape in which one factor per unit multiplies `parameter`; None if it has no such shape."""
    groups: int
    transposed: bool
    trusted: bool
    """Whether the forward is known to be homogeneous; otherwise the layer is run again to see."""

    @property
    def identity(self) -> int:
        """The same for layers that share what is scaled."""
        return id(self.parameter)

    @property
    def frozen(self) -> bool:
        """Whether it is not to be changed."""
        return not self.parameter.requires_grad

    def tensors(self) -> list[Tensor]:
        """Everything that scaling and centering change."""
        return [self.parameter, *([] if self.bias is None else [self.bias])]

    def dim_of(self, output: Tensor) -> int:
        """Dimension of an output's channels, counted from the end."""
        return 1 % output.ndim - output.ndim if self.channel_dim is None else self.channel_dim

    def takes_channels(self, spread: Spread) -> bool:
        """Whether every channel can have a factor of its own."""
        return self.unit_shape is not None

    def multiply(self, factor: Tensor, code: Tensor, write: Write) -> tuple[Tensor, Tensor]:
        """Multiply the output, less the bias, by one factor or one per unit, where `code` is 0; where the parameter
        would overflow, leave it: the factor is 1 and the code 4 there."""
        old = self.parameter.detach()
        new = (old.to(factor.dtype) * self.per_unit(factor)).to(old.dtype)
        code = torch.where((code == 0) & ~torch.isfinite(new).all(), 4, code)
        factor = torch.where(code == 0, factor, 1)
        write(self.parameter, torch.where(self.per_unit(code == 0), new, old))
        return factor, code

    def center(
        self, factor: Tensor, own: Tensor, code: Tensor, mean: Tensor, write: Write
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Multiply every unit by a factor and move its bias so that its mean is 0: the factors and codes that hold, and
        what is added to the output."""
        factor, code = self.multiply(factor * own, code, write)
        rest = self.rest()
        if self.bias is None or rest is None:
            return factor, code, None
        rest = rest.to(mean.dtype)
        if not self.bias.requires_grad:
            return factor, code, (1 - factor) * rest
        moved = torch.where(code == 0, (rest - mean) * factor, rest)
        shift = moved - factor * rest  # now: `rest` is the bias itself, which is written next
        write(self.bias, moved if self.bias_factor is None else moved / self.bias_factor)
        return factor, code, shift

    def rest(self) -> Tensor | None:
        """What the layer adds to each channel, whatever the parameter."""
        if self.bias is None:
            return None
        bias = self.bias.detach()
        return bias if self.bias_factor is None else bias * self.bias_factor

    def per_unit(self, factors: Tensor) -> Tensor:
        """One factor per unit (or one for all), shaped to multiply `parameter`."""
        if factors.ndim == 0:
            return factors
        assert self.unit_shape is not None
        if self.transposed and self.parameter is self.direction:  # (in, out/groups, *kernel)
            inputs = self.parameter.shape[0] // self.groups
            factors = factors.reshape(self.groups, 1, -1).expand(-1, inputs, -1)
        return factors.reshape(self.unit_shape)

    def rows(self, weight: Tensor) -> Tensor:
        """`weight` as (units, everything else)."""
        if self.transposed:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
            return weight.reshape(self.units, -1)
        return weight.reshape(self.units, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        shape = self.direction.shape
        if self.transposed:
            split = (self.groups, shape[1], shape[0] // self.groups, *shape[2:])
            return rows.reshape(split).transpose(1, 2).reshape(shape)
        return rows.reshape(shape)


FEWEST = 16
"""Values of a channel below which its own mean and variance are left alone: they would tell of these few samples."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The constant of a standardized layer or of a `Scale`: its whole output, bias and all, is homogeneous in it."""

    layer: Any
    name: str
    """Of the buffer."""
    frozen = False
    trusted = True

    @property
    def value(self) -> Tensor:
        return self.layer._buffers[self.name]

    @property
    def identity(self) -> int:
        return id(self.layer)

    def rest(self) -> None:
        """Nothing is left where the constant is 0."""

    def tensors(self) -> list[Tensor]:
        return [self.value]

    def dim_of(self, output: Tensor) -> int:
        scale = isinstance(self.layer, Scale)
        dim = getattr(self.layer, "channel_dim", 1) if scale else channel_dim(self.layer)
        return dim % output.ndim - output.ndim

    def takes_channels(self, spread: Spread) -> bool:
        own = self.layer._parameters
        gained = own.get("gain") is not None or isinstance(self.layer, Scale)
        settable = gained and own.get("bias") is not None
        return settable and spread.values >= FEWEST * spread.mean.numel()

    def multiply(self, factor: Tensor, code: Tensor, write: Write) -> tuple[Tensor, Tensor]:
        write(self.value, (self.value * factor).to(self.value.dtype))
        return factor, code

    def center(
        self, factor: Tensor, own: Tensor, code: Tensor, mean: Tensor, write: Write
    ) -> tuple[Tensor, Tensor, Tensor]:
        gain, bias = self.layer._parameters.get("gain"), self.layer._parameters["bias"]
        assert bias is not None
        settled = code == 0
        if gain is None:  # a bias that counts as it is, behind the constant
            write(bias, torch.where(settled, (bias.detach() - mean) * factor * own, bias.detach()))
        else:
            was = self.value * self.layer.alpha
            write(gain, torch.where(settled, gain.detach() * own, gain.detach()))
            write(bias, torch.where(settled, (bias.detach() - mean / was) * own, bias.detach()))
        write(self.value, (self.value * factor).to(self.value.dtype))
        factors = torch.where(settled, factor * own, 1)
        return factors, code, torch.where(settled, -(factors * mean), 0)

    def mark(self, centred: bool = False) -> None:
        """Note on the layer that its constant is measured, or comes with a `state_dict`."""
        gain = dict(self.layer.named_parameters(recurse=False)).get("gain")
        square = 1.0 if gain is None or gain.is_meta else float(gain.detach().double().pow(2).mean())
        Measured(square, centred).put_on(self.layer)


def constant(module: nn.Module) -> Constant | str:
    """The module's constant, or that it has none."""
    if isinstance(module, Scale):
        return Constant(module, "value")
    if isinstance(module, _ScaledStd):
        return Constant(module, "scale")
    return "it has no constant"


def channel_dim(layer: nn.Module | None) -> int:
    """Dimension of a weighted layer's output that holds its channels, counted from the end."""
    return -len(layer.kernel_size) - 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1


def is_weight_layer(module: nn.Module) -> bool:
    """Convolutions and linears of any kind, and attention, which is scaled by its output projection."""
    inner = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return isinstance(module, _PLAIN) and not inner and not is_complex(module)


def is_complex(module: nn.Module) -> bool:
    """Whether a layer has complex parameters: what is known here of variances is not known of those."""
    return any(own is not None and own.is_complex() for own in module._parameters.values())


def knob(module: nn.Module) -> Knob | str:
    """The layer's knob, or why it has none: of a convolution, linear or attention; else of a module with a weight for
    each channel (an affine, a group or layer norm), whose output is to show that it follows."""
    if not isinstance(module, _PLAIN):
        return _channel_knob(module)
    owner = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
    # Never read `owner.weight` here: under a parametrization that runs it, and spectral norm then moves its buffers.
    convolution = isinstance(owner, nn.modules.conv._ConvNd)
    units = int(owner.out_channels if convolution else owner.out_features)  # type: ignore[arg-type]
    transposed = isinstance(owner, _TRANSPOSED)
    groups: int = getattr(owner, "groups", 1)
    found = _parameters(owner)
    if isinstance(found, str):
        return found
    parameter, direction = found
    if parametrize.is_parametrized(owner, "bias") or not isinstance(
        owner._parameters.get("bias"), Tensor | None
    ):
        return "its bias is parametrized or not a parameter"
    unit_shape = _unit_shape(parameter, direction, units, transposed)
    scaled_std = hasattr(owner, "effective_weight") and "gain" in owner._parameters
    factor = owner.scale * owner.alpha if scaled_std else None  # type: ignore[operator]
    return Knob(
        parameter,
        direction,
        units,
        int(owner.in_channels if convolution else owner.in_features),  # type: ignore[arg-type]
        channel_dim(owner),
        owner._parameters.get("bias"),
        factor,
        unit_shape,
        groups,
        transposed,
        trusted=scaled_std or runs_torchs_code(module),
    )


def _channel_knob(module: nn.Module) -> Knob | str:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or weight.ndim != 1:
        return f"{type(module).__name__} has no weight of its own for each channel"
    last = -1 if isinstance(module, nn.LayerNorm | nn.RMSNorm) else None
    shape, size = tuple(weight.shape), weight.numel()
    return Knob(weight, weight, size, 1, last, bias, None, shape, 1, transposed=False, trusted=False)


def origin_of(module: nn.Module) -> nn.Parameter | None:
    """The one parameter that a parametrized weight is computed from; None for any other layer.

    Example:
        >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
        >>> origin_of(layer) is layer.parametrizations.weight.original, origin_of(nn.Linear(2, 2))
        (True, None)
    """
    if not parametrize.is_parametrized(module, "weight"):
        return None
    return module.parametrizations["weight"]._parameters.get("original")  # type: ignore[index, union-attr]


def knobs_of(model: nn.Module, paths: Iterable[str], what: str) -> dict[str, Knob]:
    """The layers' knobs; UserError if one has none, on behalf of an initializer that sets weights."""
    found: dict[str, Knob] = {}
    for path in dict.fromkeys(paths):
        layer = knob(model.get_submodule(path))
        if isinstance(layer, str):
            raise UserError(f"{path}: {layer}; {what} sets plain weights, remove the parametrization first")
        found[path] = layer
    return found


def _parameters(owner: nn.Module) -> tuple[nn.Parameter, nn.Parameter] | str:
    """What to scale, and the weight behind it."""
    own = owner._parameters
    if parametrize.is_parametrized(owner, "weight"):
        chain = owner.parametrizations["weight"]  # type: ignore[index]
        kinds = [type(step).__name__ for step in chain]  # type: ignore[union-attr]
        if kinds != ["_WeightNorm"]:
            return f"its weight is parametrized by {' and '.join(k.strip('_') for k in kinds)}"
        return chain.original0, chain.original1  # type: ignore[union-attr, return-value]
    gain, weight = own.get("gain"), own.get("weight")
    if gain is not None and weight is not None:
        return gain, weight
    if weight is not None:
        return weight, weight
    magnitude, direction = own.get("weight_g"), own.get("weight_v")  # torch.nn.utils.weight_norm, the old one
    if magnitude is not None and direction is not None:
        return magnitude, direction
    made_from = ", ".join(own) or "nothing of its own"
    return f"its weight is computed from {made_from}"


def _unit_shape(
    parameter: nn.Parameter, direction: nn.Parameter, units: int, transposed: bool
) -> tuple[int, ...] | None:
    if parameter is direction:
        shape = tuple(parameter.shape)
        return (*shape[:2], *(1,) * (len(shape) - 2)) if transposed else (-1, *(1,) * (len(shape) - 1))
    of_units = parameter.numel() == units and (not transposed or parameter.ndim == 1)
    return tuple(parameter.shape) if of_units else None


def scaled_to(output: Tensor, factor: Tensor, shift: Tensor | None, dim: int) -> Tensor:
    """factor · output + shift per channel, as a new tensor of the same dtype, computed in at least fp32."""
    shape = (-1,) + (1,) * (-dim - 1)
    out = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    factor = (factor if factor.ndim == 0 else factor.reshape(shape)).to(out.dtype)
    if shift is None:
        scaled = out * factor
    else:
        scaled = torch.addcmul(shift.reshape(shape).to(out.dtype), out, factor)
    return scaled.to(output.dtype)
