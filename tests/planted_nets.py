"""Eight small nets and the places in them that faults are planted at (`planted_faults.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import torchvision
from coverage_nets import UNet
from torch import nn

import nfnets

CLASSES = 10


class Net(NamedTuple):
    """A net and the places in it that faults are planted at."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layer: str
    """A weight layer in the middle."""
    behind: tuple[str, ...]
    """Points right behind that layer: its norm layer, its activation, what they are added to."""
    end: str = ""
    """The last weight layer of a branch, if there are branches."""
    end_behind: tuple[str, ...] = ()
    before_activation: str = ""
    """The layer whose bias can kill the units of an activation."""
    dead_at: str = ""
    block: str = ""
    """A module on the trunk, for detaching it."""
    gain: float = 0.0
    """The factor that a layer's gain stands for where weights carry one, else 0."""
    rate: float = 0.1
    """A learning rate that trains it."""


def he(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return net


def mlp() -> nn.Module:
    widths = [32, 48, 64, 96, 96, 128, 128]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return he(nn.Sequential(*layers, nn.Linear(128, CLASSES)))


def plain() -> nn.Module:
    widths = [3, 16, 16, 32, 32, 64, 64]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Conv2d(a, b, 3, 1, 1), nn.ReLU())]
    return he(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)))


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        depth=4,
        embed_dim=48,
        num_heads=3,
        num_classes=CLASSES,
    )


def convnext() -> nn.Module:
    net = timm.create_model("test_convnext", num_classes=CLASSES)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("gamma"):
                weight.fill_(1.0)  # branches that start at a millionth would hide what is planted in them
    return net


def sixteen(channels: int = 3, size: int = 16) -> tuple[int, ...]:
    return channels, size, size


NETS: dict[str, Net] = {
    "MLP": Net(
        mlp, (32,), "6", ("7",), before_activation="6", dead_at="7", block="7", gain=2**0.5, rate=0.02
    ),
    "plain": Net(
        plain, sixteen(), "6", ("7",), before_activation="6", dead_at="7", block="7", gain=2**0.5, rate=0.02
    ),
    "ResNet": Net(
        lambda: nfnets.create_model("bn_resnet20_cifar"),
        sixteen(),
        "layer2.1.conv1",
        ("layer2.1.bn1",),
        end="layer2.1.bn2",
        end_behind=("layer2.1",),
        before_activation="layer2.1.bn1",
        dead_at="layer2.1.relu",
        block="layer2.1",
    ),
    "ConvNeXt": Net(
        convnext,
        sixteen(3, 32),
        "stages.2.blocks.1.mlp.fc1",
        ("stages.2.blocks.1.mlp.act",),
        end="stages.2.blocks.2.mlp.fc2",
        end_behind=("stages.2.blocks.2",),
        before_activation="stages.2.blocks.1.mlp.fc1",
        dead_at="stages.2.blocks.1.mlp.act",
        block="stages.1.blocks.1",
        rate=0.05,
    ),
    "ViT": Net(
        vit,
        sixteen(),
        "blocks.2.mlp.fc1",
        ("blocks.2.mlp.act",),
        end="blocks.1.mlp.fc2",
        end_behind=("blocks.1#2",),
        before_activation="blocks.2.mlp.fc1",
        dead_at="blocks.2.mlp.act",
        block="blocks.1",
        rate=0.05,
    ),
    "DenseNet": Net(
        lambda: torchvision.models.DenseNet(8, (3, 3), 16, num_classes=CLASSES),
        sixteen(3, 32),
        "features.denseblock1.denselayer2.conv1",
        ("features.denseblock1.denselayer2.norm2",),
        before_activation="features.denseblock1.denselayer2.norm2",
        dead_at="features.denseblock1.denselayer2.relu2",
        block="features.transition1",
    ),
    "U-Net": Net(
        UNet,
        sixteen(2),
        "bottom.0",
        ("bottom.1",),
        before_activation="bottom.1",
        dead_at="bottom.2",
        block="bottom",
    ),
    "NF-ResNet": Net(
        lambda: nfnets.create_model("nf_resnet20_cifar"),
        sixteen(),
        "stages.1.1.branch.conv1",
        ("stages.1.1.branch.act2",),
        end="stages.1.1.branch.conv2",
        end_behind=("stages.1.1",),
        before_activation="stages.1.1.branch.conv1",
        dead_at="stages.1.1.branch.act2",
        block="stages.1.1",
        gain=1.7128585577011108,
    ),
}
