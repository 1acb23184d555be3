"""Layers that only the model families use."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.layers import ScaledStdConv2d


class PreactConv2d(ScaledStdConv2d):
    """A scaled-standardized convolution whose `scale` stands for a multiplication of its input.

    y = Ŵ ∗ (scale · x) + bias: the constant γ/β of the activation before it, so the bias does not take part. α, which
    multiplies the output, does scale the bias.

    Example:
        >>> conv = PreactConv2d(1, 1, 1, scale=3.0, alpha=0.5)
        >>> _ = nn.init.ones_(conv.bias)
        >>> conv(torch.zeros(1, 1, 1, 1)).item()
        0.5
    """

    def __init__(self, *args: Any, padding: int | str = 0, **kwargs: Any):
        super().__init__(*args, padding=0 if padding == "tf_same" else padding, **kwargs)
        self.tf_same = padding == "tf_same"

    def effective_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias * self.alpha

    def forward(self, input: Tensor) -> Tensor:
        if self.tf_same:
            (h, w), (kh, kw), (sh, sw) = input.shape[-2:], self.kernel_size, self.stride
            down = max((-(-h // sh) - 1) * sh + kh - h, 0)
            right = max((-(-w // sw) - 1) * sw + kw - w, 0)
            input = F.pad(input, (right // 2, right - right // 2, down // 2, down - down // 2))
        return super().forward(input)


class EfficientChannelAttention(nn.Module):
    """y = gain · sigmoid(conv(mean over space)) · x, a 1-D convolution over channels.

    The kernel has floor((log₂ C + 1) / 2) taps, the next odd number if even, at least 3.

    Args:
        channels: C.
        gain: 2 undoes sigmoid(0) = ½.

    Example:
        >>> [EfficientChannelAttention(c).conv.kernel_size[0] for c in (16, 256, 1536, 2048)]
        [3, 5, 5, 7]

    Paper: arXiv 1910.03151. Checked against timm `layers/eca.py`.
    """

    def __init__(self, channels: int, gain: float = 2.0):
        super().__init__()
        self.gain = gain
        taps = int((math.log2(channels) + 1) / 2)
        taps = max(taps + 1 - taps % 2, 3)
        self.conv = nn.Conv1d(1, 1, taps, padding=taps // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid() * self.gain
        return x * gate.transpose(1, 2).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}"


class SqueezeExcite(nn.Module):
    """y = gain · sigmoid(fc2(relu(fc1(mean over space)))) · x."""

    def __init__(self, channels: int, hidden: int, gain: float = 2.0):
        super().__init__()
        self.gain = gain
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean((2, 3))).relu()).sigmoid() * self.gain
        return x * gate[:, :, None, None]


class SkipInit(nn.Module):
    def __init__(self, value: float = 0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class StochasticDepth(nn.Module):
    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate)
