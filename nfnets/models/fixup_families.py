"""The Fixup-ResNets by name, and their BatchNorm twins: the ResNets they were made from."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision.models.resnet import ResNet

from nfnets.errors import UserError
from nfnets.models.cifar_resnet import CifarResNet
from nfnets.models.fixup import FixupResNet
from nfnets.models.head import PooledClassifier, check_rates
from nfnets.models.registry import register
from nfnets.models.resnet_blocks import BasicBlock, Bottleneck, set_stochastic_depth
from nfnets.models.stages import Parts

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110, 164, 1202)
IMAGENET_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def fixup_cifar(
    depth: int, num_classes: int = 10, in_chans: int = 3, width: float = 1, **options: Any
) -> FixupResNet:
    """A Fixup-ResNet of 6n + 2 layers for small images, any n.

    Args:
        depth: weighted layers on the longest path.
        num_classes: outputs.
        in_chans: image channels.
        width: multiplies the stages' 16, 32 and 64 channels.
        **options: `global_pool`, `drop_rate`, `drop_path_rate` and `shortcut`, as `FixupResNet`'s.

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
    return FixupResNet(depths, widths, num_classes, in_chans, stem_width=widths[0], **options)


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
        drop_rate: dropout before the classifier, in training.
        drop_path_rate: stochastic depth: block i of n drops its branch with probability rate · i / n and divides
            what remains by what is kept.

    Example:
        >>> import torch
        >>> ImageNetResNet(18, num_classes=5, in_chans=1)(torch.zeros(1, 1, 64, 64)).shape
        torch.Size([1, 5])
    """

    stem_pattern = r"^(?:conv1|bn1)"
    stage_pattern = r"^layer(\d+)"

    def __init__(
        self,
        depth: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        check_rates(drop_rate, drop_path_rate)
        block = Bottleneck if depth >= 50 else BasicBlock
        super().__init__(block, list(IMAGENET_DEPTHS[depth]))
        if in_chans != 3:
            self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.feature_info = [
            {"num_chs": 64, "reduction": 2, "module": "relu"},
            *(
                {"num_chs": 64 * 2**i * block.expansion, "reduction": 4 * 2**i, "module": f"layer{i + 1}"}
                for i in range(4)
            ),
        ]
        set_stochastic_depth(self, drop_path_rate)
        self.set_head(512 * block.expansion, num_classes, global_pool)

    def parts(self) -> Parts:
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return Parts((self.conv1, self.bn1, self.relu), (self.maxpool,), stages, (), ())

    def keep_stages(self, count: int) -> None:
        if not count:
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        for index in range(count, 4):
            setattr(self, f"layer{index + 1}", nn.Sequential())


for _depth in CIFAR_DEPTHS:
    register(f"fixup_resnet{_depth}_cifar", partial(fixup_cifar, _depth))
    register(f"bn_fixup_resnet{_depth}_cifar", partial(CifarResNet, _depth, shortcut="pad"))
for _depth in IMAGENET_DEPTHS:
    register(f"fixup_resnet{_depth}", partial(fixup_imagenet, _depth))
    register(f"bn_fixup_resnet{_depth}", partial(ImageNetResNet, _depth))
