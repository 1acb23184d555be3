"""Tune mode: a convolution and the BatchNorm behind it, its statistics frozen, as one layer that goes on learning."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Self

import torch
import torch.fx
from torch import Tensor, nn

from nfnets.blocks import ChannelAffine
from nfnets.computed import Computed, ComputedConv, ComputedConvTranspose, ComputedLinear, runs_as_plain

# They branch on shapes, so torch.fx records a call of each and does not look inside.
torch.fx.wrap("normalized_weight")
torch.fx.wrap("normalized_bias")
torch.fx.wrap("normalized")


def normalizing(variance: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """γ/√(σ²+ε), what batch normalization by its statistics multiplies with, in at least fp32."""
    multiplier = (_wide(variance) + eps).rsqrt()
    return multiplier if gamma is None else multiplier * _wide(gamma)


def normalized_bias(
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    bias: Tensor | None = None,
) -> Tensor:
    """β + (b − μ) · γ/√(σ²+ε), in at least fp32."""
    moved = -_wide(mean) if bias is None else _wide(bias) - _wide(mean)
    moved = moved * normalizing(variance, gamma, eps)
    return moved if beta is None else moved + _wide(beta)


def normalized_weight(
    weight: Tensor, variance: Tensor, gamma: Tensor | None, eps: float, unit_dim: int = 0, groups: int = 1
) -> Tensor:
    """W · γ/√(σ²+ε) per output channel, in the weight's type.

    Args:
        weight: (out, in/groups, k…), or of a transposed convolution (in, out/groups, k…).
        variance: σ², (out,).
        gamma: γ, (out,); None is 1.
        eps: ε.
        unit_dim: where outputs are: 0, or 1 within their group.
        groups: of a transposed convolution.
    """
    return times(_wide(weight), normalizing(variance, gamma, eps), unit_dim, groups).to(weight.dtype)


def times(weight: Tensor, multiplier: Tensor, unit_dim: int = 0, groups: int = 1) -> Tensor:
    """A weight with each output channel multiplied; of a transposed convolution dimension 1, within its group."""
    beside = (1,) * (weight.ndim - 2)
    if unit_dim:
        grouped = weight.unflatten(0, (groups, -1))
        return (grouped * multiplier.reshape(groups, 1, -1, *beside)).flatten(0, 1)
    return weight * multiplier.reshape(-1, 1, *beside)


def normalized(
    input: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """γ · (x − μ)/√(σ²+ε) + β over dimension 1, in the input's type."""
    shape = (1, -1) + (1,) * (input.ndim - 2)
    multiplier = normalizing(variance, gamma, eps)
    shift = normalized_bias(mean, variance, gamma, beta, eps)
    return torch.addcmul(shift.reshape(shape), input, multiplier.reshape(shape)).to(input.dtype)


def untrained(mean: Tensor, variance: Tensor) -> bool:
    """Whether statistics are still what a new norm layer has: 0 and 1."""
    return not mean.is_meta and not bool(mean.any()) and bool((variance == 1).all())


def _take(twin: nn.Module, tensors: dict[str, Any]) -> None:
    """Parameters as parameters; what a frozen layer keeps as a buffer, as a buffer."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            delattr(twin, name)
            twin.register_buffer(name, tensor.detach().clone())
        else:
            setattr(twin, name, tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Tuned(Computed):
    """What every tuned layer adds to torch's own: γ, β and the frozen statistics of a batch norm layer."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_mean: Tensor
    norm_var: Tensor
    sources = ("norm_weight", "norm_bias", "norm_mean", "norm_var")

    def __init__(self, *args: Any, eps: float = 1e-5, affine: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eps = eps
        at: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        ones, zeros = torch.ones(self.units, **at), torch.zeros(self.units, **at)
        self.norm_weight = nn.Parameter(ones.clone()) if affine else None
        self.norm_bias = nn.Parameter(zeros.clone()) if affine else None
        self.register_buffer("norm_mean", zeros)
        self.register_buffer("norm_var", ones)

    def effective_weight(self) -> Tensor:
        """W · γ/√(σ²+ε): what the layer is run with."""
        return normalized_weight(
            self.weight, self.norm_var, self.norm_weight, self.eps, self.unit_dim, self.groups
        )

    def effective_bias(self) -> Tensor:
        """β + (b − μ) · γ/√(σ²+ε): what the layer adds."""
        own = self.norm_mean, self.norm_var, self.norm_weight, self.norm_bias
        return normalized_bias(*own, self.eps, self.bias).to(self.weight.dtype)

    def bias_learns(self) -> bool:
        own = [t for t in (self.bias, self.norm_bias) if t is not None]
        return any(t.requires_grad for t in own) if own else self.weight.requires_grad

    def settings(self) -> Hashable:
        return self.eps

    @classmethod
    def joined(cls, layer: nn.Module, norm: nn.Module, mean: Tensor, variance: Tensor, eps: float) -> Self:
        """A layer and the norm layer behind it as one: their own parameters, and copies of the statistics."""
        bias: Any = layer.bias
        twin = cls(**cls.arguments_of(layer), bias=bias is not None, affine=False, eps=eps, device="meta")
        twin.weight, twin.bias = layer.weight, bias  # type: ignore[assignment]
        _take(twin, {"norm_weight": norm.weight, "norm_bias": norm.bias})
        twin.norm_mean, twin.norm_var = mean.detach().clone(), variance.detach().clone()
        return twin.train(layer.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


class TunedConv1d(_Tuned, ComputedConv, nn.Conv1d):
    """`nn.Conv1d` and a frozen batch norm layer as one; see `TunedConv2d`."""


class TunedConv2d(_Tuned, ComputedConv, nn.Conv2d):
    """`nn.Conv2d` and a batch norm layer with frozen statistics as one.

    y = conv(x; W · γ/√(σ²+ε)) + β + (b − μ) · γ/√(σ²+ε). W, b, γ (`norm_weight`) and β (`norm_bias`) learn. Outputs and
    gradients are those of the two layers in evaluation mode, but what lies between them is not kept for the backward
    pass. The statistics are buffers that nothing moves: `train()` does not.

    Args:
        *args, **kwargs: as `nn.Conv2d`, and `padding="tf_same"` for TensorFlow's 'SAME'.
        eps: of the norm layer.
        affine: whether there are γ and β.

    Example:
        >>> layer = TunedConv2d(3, 8, 3, bias=False)
        >>> sorted(layer.state_dict())
        ['norm_bias', 'norm_mean', 'norm_var', 'norm_weight', 'weight']

    Paper: arXiv 2305.11624. Checked against torch's own layers in evaluation mode.
    """


class TunedConv3d(_Tuned, ComputedConv, nn.Conv3d):
    """`nn.Conv3d` and a frozen batch norm layer as one; see `TunedConv2d`."""


class TunedLinear(_Tuned, ComputedLinear, nn.Linear):
    """`nn.Linear` and a frozen batch norm layer as one; see `TunedConv2d`."""


class _TunedConvTranspose(_Tuned, ComputedConvTranspose):
    unit_dim = 1


class TunedConvTranspose1d(_TunedConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` and a frozen batch norm layer as one; see `TunedConv2d`."""


class TunedConvTranspose2d(_TunedConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` and a frozen batch norm layer as one; see `TunedConv2d`."""


class TunedConvTranspose3d(_TunedConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` and a frozen batch norm layer as one; see `TunedConv2d`."""


class TunedNorm(nn.Module):
    """A batch norm layer whose statistics are frozen for good, where no convolution in front could take it in.

    y = γ · (x − μ)/√(σ²+ε) + β over dimension 1; γ and β learn.

    Args:
        num_features: channels.
        eps: added to σ².
        affine: whether there are γ and β.

    Example:
        >>> TunedNorm(4).train()(torch.ones(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = True, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features, **at)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **at)) if affine else None
        self.register_buffer("mean", torch.zeros(num_features, **at))
        self.register_buffer("var", torch.ones(num_features, **at))

    def forward(self, input: Tensor) -> Tensor:
        return normalized(input, self.mean, self.var, self.weight, self.bias, self.eps)

    def plain(self) -> ChannelAffine:
        """The same function without statistics."""
        multiplier = normalizing(self.var, self.weight, self.eps).detach()
        shift = normalized_bias(self.mean, self.var, self.weight, self.bias, self.eps).detach()
        new = ChannelAffine(self.num_features, device="meta")
        kind = self.mean.dtype
        for name, value, own in (("weight", multiplier, self.weight), ("bias", shift, self.bias)):
            learns = own is not None and own.requires_grad
            setattr(new, name, nn.Parameter(value.to(kind), learns))
        return new.train(self.training)

    @classmethod
    def frozen(cls, norm: nn.Module, mean: Tensor, variance: Tensor, eps: float) -> Self:
        """What a norm layer is in evaluation mode: its own parameters, and copies of the statistics."""
        twin = cls(mean.numel(), eps, affine=False, device="meta")
        _take(twin, {"weight": norm.weight, "bias": norm.bias})
        twin.mean, twin.var = mean.detach().clone(), variance.detach().clone()
        return twin.train(norm.training)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def tuned_class(layer: nn.Module | None) -> type[_Tuned] | None:
    """The class of a convolution or linear with a norm layer in it, or None if its forward is its own."""
    plain = None if layer is None else runs_as_plain(layer)
    return None if plain is None else _TWINS[plain]


_TWINS: dict[type[nn.Module], type[_Tuned]] = {
    nn.Conv1d: TunedConv1d,
    nn.Conv2d: TunedConv2d,
    nn.Conv3d: TunedConv3d,
    nn.ConvTranspose1d: TunedConvTranspose1d,
    nn.ConvTranspose2d: TunedConvTranspose2d,
    nn.ConvTranspose3d: TunedConvTranspose3d,
    nn.Linear: TunedLinear,
}
