"""The Fixup-ResNets by name, and their BatchNorm twins: the ResNets they were made from."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from nfnets.errors import UserError
from nfnets.models.cifar_resnet import CifarResNet
from nfnets.models.fixup import FixupResNet
from nfnets.models.head import PooledClassifier
from nfnets.models.registry import register

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110, 164, 1202)
IMAGENET_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def fixup_cifar(
    depth: int, num_classes: int = 10, in_chans: int = 3, width: float = 1, global_pool: str = "avg"
) -> FixupResNet:
    """A Fixup-ResNet of 6n + 2 layers for small images, any n.

    Args:
        depth: weighted layers on the longest path.
        num_classes: outputs.
        in_chans: image channels.
        width: multiplies the stages' 16, 32 and 64 channels.
        global_pool: `"avg"`, or `""` for the unpooled features (with `num_classes=0`).

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
    depths = ((depth - 2) // 6,) * 3
    return FixupResNet(depths, widths, num_classes, in_chans, stem_width=widths[0], global_pool=global_pool)


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


class ImageNetResNet(PooledClassifier, ResNet):
    """torchvision's ResNet with any number of image channels, and timm's method names.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: outputs; 0 returns the pooled features.
        in_chans: image channels.
        global_pool: `"avg"`, or `""` for the unpooled features (with `num_classes=0`).

    Example:
        >>> import torch
        >>> ImageNetResNet(18, num_classes=5, in_chans=1)(torch.zeros(1, 1, 64, 64)).shape
        torch.Size([1, 5])
    """

    def __init__(self, depth: int, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg"):
        super().__init__(Bottleneck if depth >= 50 else BasicBlock, list(IMAGENET_DEPTHS[depth]))
        if in_chans != 3:
            self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.in_chans = in_chans
        self.set_head(512 * (4 if depth >= 50 else 1), num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


for _depth in CIFAR_DEPTHS:
    register(f"fixup_resnet{_depth}_cifar", partial(fixup_cifar, _depth))
    register(f"bn_fixup_resnet{_depth}_cifar", partial(CifarResNet, _depth, shortcut="pad"))
for _depth in IMAGENET_DEPTHS:
    register(f"fixup_resnet{_depth}", partial(fixup_imagenet, _depth))
    register(f"bn_fixup_resnet{_depth}", partial(ImageNetResNet, _depth))
