"""The Fixup-ResNets by name, and their BatchNorm twins: the ResNets they were made from."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from nfnets.errors import UserError
from nfnets.models.cifar_resnet import CifarResNet
from nfnets.models.fixup import FixupResNet
from nfnets.models.registry import register

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110, 164, 1202)
IMAGENET_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def fixup_cifar(depth: int, num_classes: int = 10, in_chans: int = 3, width: float = 1) -> FixupResNet:
    """A Fixup-ResNet of 6n + 2 layers for small images, any n.

    Args:
        depth: weighted layers on the longest path.
        num_classes: outputs.
        in_chans: image channels.
        width: multiplies the stages' 16, 32 and 64 channels.

    Raises:
        UserError: `depth` is not 6n + 2, or the width leaves no channel.

    Example:
        >>> sum(p.numel() for p in fixup_cifar(20).parameters())
        268393
    """
    if depth < 8 or (depth - 2) % 6 or 16 * width < 1:
        raise UserError(
            f"{depth=}, {width=}: expected depth 6n + 2, such as 8, 14, 20 or 110, and width ≥ 1/16"
        )
    widths = tuple(int(c * width) for c in (16, 32, 64))
    return FixupResNet(((depth - 2) // 6,) * 3, widths, num_classes, in_chans, stem_width=widths[0])


def fixup_imagenet(depth: int, num_classes: int = 1000, in_chans: int = 3, **options: Any) -> FixupResNet:
    """A Fixup-ResNet of torchvision's shape: 18, 34 (basic), 50, 101 or 152 (bottleneck) layers."""
    bottleneck = depth >= 50
    defaults: dict[str, Any] = {
        "stem": "7x7_pool",
        "stem_width": 64,
        "bottleneck": bottleneck,
        "shortcut": "projection",
    }
    widths = tuple(c * (4 if bottleneck else 1) for c in (64, 128, 256, 512))
    return FixupResNet(IMAGENET_DEPTHS[depth], widths, num_classes, in_chans, **{**defaults, **options})


def bn_imagenet(depth: int, num_classes: int = 1000, in_chans: int = 3) -> ResNet:
    """torchvision's ResNet, for any number of image channels."""
    model = ResNet(Bottleneck if depth >= 50 else BasicBlock, list(IMAGENET_DEPTHS[depth]), num_classes)
    if in_chans != 3:
        model.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


for _depth in CIFAR_DEPTHS:
    register(f"fixup_resnet{_depth}_cifar", partial(fixup_cifar, _depth))
    register(f"bn_fixup_resnet{_depth}_cifar", partial(CifarResNet, _depth, shortcut="pad"))
for _depth in IMAGENET_DEPTHS:
    register(f"fixup_resnet{_depth}", partial(fixup_imagenet, _depth))
    register(f"bn_fixup_resnet{_depth}", partial(bn_imagenet, _depth))
