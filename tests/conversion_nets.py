"""One small net for each surrounding that norm layers are found in, for tests of every conversion method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn


class NarrowResNet(torchvision.models.ResNet):
    """torchvision's own modules, paths and forward, at a quarter of the width."""

    def __init__(self, block: type[nn.Module], depths: tuple[int, ...], num_classes: int = 5):
        super().__init__(block, list(depths))  # type: ignore[arg-type]
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(128 * block.expansion, num_classes)  # type: ignore[operator]

    def _make_layer(self, block: type[nn.Module], planes: int, *args: Any, **named: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = 16
        return super()._make_layer(block, planes // 4, *args, **named)  # type: ignore[arg-type]


def resnet18(num_classes: int = 5) -> NarrowResNet:
    return NarrowResNet(torchvision.models.resnet.BasicBlock, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int = 5) -> NarrowResNet:
    return NarrowResNet(torchvision.models.resnet.Bottleneck, (3, 4, 6, 3), num_classes)


def average_channel_variance(output: Tensor) -> Tensor:
    """mean_c Var_c over dimension 1, biased, by its definition."""
    return output.detach().double().movedim(1, 0).flatten(1).var(1, correction=0).mean()


class PreActivation(nn.Module):
    """BN → ReLU → conv, twice, around an identity, three times; a norm layer and a classifier at the end."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(PreActivationBlock(channels) for _ in range(3)))
        self.last, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.blocks(self.stem(x))).relu().mean((2, 3)))


class PreActivationBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bn1, self.conv1 = (
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        self.bn2, self.conv2 = (
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


class DenseBlocks(nn.Module):
    """BN → ReLU → conv on the concatenation of all that came before, as in DenseNet."""

    def __init__(self, growth: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(growth * (i + 1)) for i in range(3))
        self.convs = nn.ModuleList(
            nn.Conv2d(growth * (i + 1), growth, 3, padding=1, bias=False) for i in range(3)
        )
        self.last, self.fc = nn.BatchNorm2d(growth * 4), nn.Linear(growth * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(torch.relu(norm(torch.cat(features, 1)))))
        return self.fc(self.last(torch.cat(features, 1)).relu().mean((2, 3)))


class Inverted(nn.Module):
    """1×1 expansion, depthwise, squeeze-excite, 1×1 projection without activation, around an identity."""

    def __init__(self, channels: int = 16, expanded: int = 32):
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded), nn.Hardswish(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            nn.Hardswish(inplace=True),
        )
        self.se = torchvision.ops.SqueezeExcitation(expanded, 8)
        self.project = nn.Sequential(nn.Conv2d(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.se(self.depthwise(self.expand(x))))


def mobile() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()]
    return nn.Sequential(
        *stem, Inverted(), Inverted(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for before, width in ((3, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if before == 16 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5))


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, bias=False, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1),
        nn.Tanh(),
    )


def features() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 32 * 32, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 48),
        nn.BatchNorm1d(48, affine=False),
        nn.ReLU(),
        nn.Linear(48, 5),
    )


def fused() -> nn.Module:
    layers = timm.layers
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        layers.BatchNormAct2d(16),
        nn.Conv2d(16, 16, 3, bias=False),
        layers.BatchNormAct2d(16, act_layer=nn.SiLU, inplace=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "pre-activation": PreActivation,
    "vgg": vgg,
    "dense": DenseBlocks,
    "mobile": mobile,
    "decoder": decoder,
    "features": features,
    "fused": fused,
}
RESIDUAL = {"resnet18", "pre-activation", "mobile"}
