"""Small layers of normalizer-free blocks: constants, scalars, gates and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.gains import gain as exact_gain


class Scale(nn.Module):
    """y = value · x, a constant of the architecture that travels with the `state_dict`.

    Args:
        value: the constant, e.g. 1/β before a residual branch.

    Example:
        >>> Scale(0.5)(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    value: Tensor

    def __init__(self, value: float = 1.0, device: Any = None, dtype: Any = None):
        super().__init__()
        self.register_buffer("value", torch.tensor(float(value), device=device, dtype=dtype))

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
        out = torch.addcmul(self.bias.reshape(shape), input, self.weight.reshape(shape))
        return out.to(input.dtype)  # as BatchNorm does

    def extra_repr(self) -> str:
        return f"{self.num_features}"


class SkipInit(nn.Module):
    """y = gain · x with one learnable scalar, 0 at first, so that a residual block starts as the identity.

    `nfnets.param_groups` leaves the scalar undecayed, as DeepMind's recipe does.

    Args:
        value: the scalar's first value. Signal propagation is measured with 1.

    Example:
        >>> SkipInit()(torch.ones(2))
        tensor([0., 0.], grad_fn=<MulBackward0>)

    Paper: arXiv 2002.10444, 2102.06171. Checked against deepmind-research `nfnets/nfnet.py` (`skip_gain`).
    """

    def __init__(self, value: float = 0.0, device: Any = None, dtype: Any = None):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(value), device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.gain

    def extra_repr(self) -> str:
        return "" if self.gain.is_meta else f"{self.gain.detach():.4g}"


class ScaledActivation(nn.Module):
    """y = γ · activation(x): unit variance out for N(0, 1) in. The activation first, then γ.

    Args:
        activation: any element-wise function or module.
        gain: γ; None for the exact 1/std(activation(z)), z ~ N(0, 1).

    Example:
        >>> ScaledActivation(nn.ReLU())(torch.tensor([-1.0, 1.0]))
        tensor([0.0000, 1.7129])

    Paper: arXiv 2101.08692 §4.2. Checked against deepmind-research `nfnets/base.py` (`nonlinearities`).
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], gain: float | None = None):
        super().__init__()
        self.activation = activation
        self.gain = exact_gain(activation) if gain is None else float(gain)

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(input) * self.gain

    def extra_repr(self) -> str:
        return f"gain={self.gain:.6g}"


class SqueezeExcite(nn.Module):
    """y = gain · sigmoid(fc2(relu(fc1(mean of x over space)))) · x, a gate per channel.

    The linears are plain: DeepMind standardizes convolutions only.

    Args:
        channels: channels of x, shape (N, C, *space).
        hidden: features between the linears; None for max(1, floor(ratio · channels)).
        ratio: 0.5 in NFNet and NF-RegNet, 0.25 in NF-ResNet.
        gain: 2 makes up for sigmoid(0) = ½.
        activation: between the linears; None for ReLU, which DeepMind's code runs (paper 2's text says GELU).

    Raises:
        UserError: fewer than one channel or hidden feature.

    Example:
        >>> SqueezeExcite(8)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])

    Paper: arXiv 1709.01507, 2101.08692. Checked against deepmind-research `nfnets/base.py` (`SqueezeExcite`).
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        ratio: float = 0.5,
        gain: float = 2.0,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        hidden = max(1, int(channels * ratio)) if hidden is None else hidden
        if channels < 1 or hidden < 1:
            raise UserError(f"channels={channels}, hidden={hidden}: expected at least 1 of each")
        self.gain = gain
        self.fc1 = nn.Linear(channels, hidden)
        self.activation = nn.ReLU() if activation is None else activation
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, input: Tensor) -> Tensor:
        pooled = input.flatten(2).mean(2)
        gate = self.fc2(self.activation(self.fc1(pooled))).sigmoid() * self.gain
        return input * gate.reshape(gate.shape + (1,) * (input.ndim - 2))

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}"


class StochasticDepth(nn.Module):
    """y = mask · x in training, one random 0 or 1 per sample: the residual branch is dropped for whole samples.

    Args:
        rate: probability of a 0.
        rescale: divide by 1 − rate, as timm does. DeepMind's networks do not, and do not scale at evaluation either.
        source: where masks come from. None: the device's global generator. A `torch.Generator`. Or a function of
            the batch size that returns N booleans, True to keep: with it a mask can be keyed to the sample and the
            step, so that a resumed run needs no generator state.

    Raises:
        UserError: a rate outside [0, 1].

    Example:
        >>> keyed = StochasticDepth(0.5, source=lambda n: torch.arange(n) % 2 == 0)
        >>> keyed(torch.ones(4, 1)).flatten()
        tensor([1., 0., 1., 0.])

    Paper: arXiv 1603.09382. Checked against deepmind-research `nfnets/base.py` (`StochDepth`) and timm `drop_path`.
    """

    def __init__(
        self,
        rate: float,
        rescale: bool = False,
        source: torch.Generator | Callable[[int], Tensor] | None = None,
    ):
        super().__init__()
        if not 0 <= rate <= 1:
            raise UserError(f"rate={rate}: expected a probability, between 0 and 1")
        self.rate, self.rescale, self.source = rate, rescale, source

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return input
        mask = self.mask(input).reshape(-1, *(1,) * (input.ndim - 1))
        if self.rescale and self.rate < 1:
            mask = mask / (1 - self.rate)
        return input * mask

    def mask(self, input: Tensor) -> Tensor:
        """One 0 or 1 per sample, in the type and on the device of `input`."""
        if self.source is None or isinstance(self.source, torch.Generator):
            where = input.device if self.source is None else self.source.device
            drawn = torch.rand(len(input), generator=self.source, device=where) >= self.rate
        else:
            drawn = self.source(len(input))
            if drawn.shape != (len(input),):
                raise UserError(
                    f"mask of shape {tuple(drawn.shape)}: expected ({len(input)},), one per sample"
                )
        return drawn.to(input.device, input.dtype)

    def extra_repr(self) -> str:
        return f"{self.rate:g}" + (", rescale=True" if self.rescale else "")
