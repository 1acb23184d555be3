"""Fixup's scalars: one bias or one multiplier for a whole tensor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ScalarBias(nn.Module):
    """y = x + bias, one scalar for the whole tensor, 0 at first.

    Its gradient sums over all channels and its step moves them all, so it learns at a tenth of the rate:
    `nfnets.param_groups` reads `lr_scale`.

    Example:
        >>> ScalarBias()(torch.ones(2)).tolist()
        [1.0, 1.0]

    Paper: arXiv 1901.09321 (rule 3). Checked against the authors' `fixup_resnet_cifar.py` (shape `(1,)`).
    """

    lr_scale: ClassVar[float] = 0.1

    def __init__(self, device: Any = None, dtype: Any = None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return (input + self.bias).to(input.dtype)  # as BatchNorm does

    def extra_repr(self) -> str:
        return "" if self.bias.is_meta else f"{self.bias.item():.4g}"


class ScalarMultiplier(nn.Module):
    """y = scale · x, one scalar for the whole tensor, 1 at first; it learns at a tenth of the rate.

    Example:
        >>> ScalarMultiplier()(torch.ones(2)).tolist()
        [1.0, 1.0]

    Paper: arXiv 1901.09321 (rule 3). Checked against the authors' `fixup_resnet_cifar.py` (shape `(1,)`).
    """

    lr_scale: ClassVar[float] = 0.1

    def __init__(self, device: Any = None, dtype: Any = None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return (input * self.scale).to(input.dtype)

    def extra_repr(self) -> str:
        return "" if self.scale.is_meta else f"{self.scale.item():.4g}"
