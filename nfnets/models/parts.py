"""Layers that only the model families use."""

from __future__ import annotations

import math

import torch
import torch.fx
from torch import Tensor, nn

from nfnets.layers import ScaledStdConv2d


class PreactConv2d(ScaledStdConv2d):
    """A scaled-standardized convolution whose `scale` stands for a multiplication of its input.

    y = Ŵ ∗ (scale · x) + bias: the constant γ/β of the activation before it, so the bias does not take part. α, which
    multiplies the output, does scale the bias.

    Example:
        >>> conv = PreactConv2d(2, 1, 1, scale=3.0, alpha=0.5)
        >>> _ = nn.init.ones_(conv.bias)
        >>> conv(torch.zeros(1, 2, 1, 1)).item()
        0.5
    """

    def effective_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias * self.alpha


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


class ZeroPadShortcut(nn.Module):
    """Every stride-th pixel, then channels of zeros: a shortcut without parameters (arXiv 1512.03385, option A).

    Args:
        extra: channels of zeros.
        stride: of the pixels kept.

    Example:
        >>> ZeroPadShortcut(16, 2)(torch.ones(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(self, extra: int, stride: int):
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        return _with_zeros(x[..., :: self.stride, :: self.stride], self.extra)


@torch.fx.wrap  # it takes a shape apart, into which torch.fx does not see
def _with_zeros(x: Tensor, extra: int) -> Tensor:
    return torch.cat((x, x.new_zeros(x.shape[0], extra, *x.shape[2:])), dim=1)
