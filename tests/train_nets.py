"""Models of the training tests, small enough to be trained in a moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dropout_net(num_classes: int, in_chans: int) -> nn.Module:
    """BatchNorm and dropout: running statistics and draws of torch's generator must survive a kill."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def pooled_norm(num_classes: int, in_chans: int) -> nn.Module:
    """BatchNorm over one value per image and channel."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(in_chans), nn.Flatten(), nn.Linear(in_chans, num_classes)
    )


def plain_net(num_classes: int, in_chans: int) -> nn.Module:
    """No norm and no dropout: every sample's gradient is its own."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def without_arguments() -> nn.Module:
    """A builder that takes nothing."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def wrong_classes(num_classes: int) -> nn.Module:
    """One logit too many."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes + 1))


def not_a_module() -> int:
    """A builder that builds nothing."""
    return 3


class Failing(nn.Module):
    """Rejects every input."""

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("expected 3 channels")


class _Residual(nn.Module):
    """A residual branch with BatchNorm and stochastic depth."""

    def __init__(self, width: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv(self.norm(x).relu())
        if self.training and self.drop_path_rate:
            branch = branch * (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path_rate)
        return x + branch


def residual_net(
    num_classes: int, in_chans: int, drop_rate: float = 0.0, drop_path_rate: float = 0.0
) -> nn.Module:
    """Blocks to recompute, with draws and running statistics in them."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1),
        nn.Sequential(*(_Residual(8, drop_path_rate) for _ in range(2))),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(drop_rate),
        nn.Linear(32, num_classes),
    )
