"""BatchNorm ResNets for small images: the baseline that converters and comparisons start from."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn

from nfnets.errors import UserError, unknown
from nfnets.models.head import PooledClassifier, check_rates
from nfnets.models.parts import ZeroPadShortcut
from nfnets.models.registry import register
from nfnets.models.resnet_blocks import BasicBlock, set_stochastic_depth
from nfnets.models.stages import Parts

DEPTHS = (8, 14, 20, 32, 56, 110)


class CifarResNet(PooledClassifier):
    """Post-activation ResNet of 6n+2 layers: a 3×3 stem, three stages of n basic blocks, strides 1, 2, 2.

    x ← relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))

    Args:
        depth: weighted layers on the longest path, 6n + 2.
        num_classes: outputs; 0 returns the pooled features.
        in_chans: image channels.
        width: multiplies the stages' 16, 32 and 64 channels.
        shortcut: where shape changes, `"projection"` (1×1 convolution and BN, option B) or `"pad"` (zeros, option A).
        global_pool: `"avg"`, or `""` for the unpooled features (with `num_classes=0`).
        drop_rate: dropout before the classifier, in training.
        drop_path_rate: stochastic depth: block i of n drops its branch with probability rate · i / n and divides
            what remains by what is kept.

    Raises:
        UserError: `depth` is not 6n + 2, or another argument is out of range.

    Example:
        >>> import torch
        >>> CifarResNet(8, in_chans=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Paper: arXiv 1512.03385 §4.2. The block is torchvision's.
    """

    stem_pattern = r"^(?:conv1|bn1)"
    stage_pattern = r"^layer(\d+)"

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        width: float = 1,
        shortcut: Literal["projection", "pad"] = "projection",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth={depth}: expected 6n + 2 for a CIFAR ResNet, such as 8, 14, 20 or 110")
        if num_classes < 0 or min(in_chans, 16 * width) < 1:
            raise UserError(f"{num_classes=}, {in_chans=}, {width=}: expected positive, width ≥ 1/16")
        if shortcut not in ("projection", "pad"):
            raise unknown("shortcut", shortcut, ("projection", "pad"))
        check_rates(drop_rate, drop_path_rate)
        super().__init__()
        self.in_chans, self.drop_rate = in_chans, drop_rate
        channels = [int(c * width) for c in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(channels[0], channels[0], blocks, 1, shortcut)
        self.layer2 = _stage(channels[0], channels[1], blocks, 2, shortcut)
        self.layer3 = _stage(channels[1], channels[2], blocks, 2, shortcut)
        self.feature_info = [
            {"num_chs": channels[0], "reduction": 1, "module": "relu"},
            *(
                {"num_chs": outputs, "reduction": 2**index, "module": f"layer{index + 1}"}
                for index, outputs in enumerate(channels)
            ),
        ]
        set_stochastic_depth(self, drop_path_rate)
        self.set_head(channels[2], num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def parts(self) -> Parts:
        stages = (self.layer1, self.layer2, self.layer3)
        return Parts((self.conv1, self.bn1, self.relu), (), stages, (), ())

    def keep_stages(self, count: int) -> None:
        for index in range(count, 3):
            setattr(self, f"layer{index + 1}", nn.Sequential())


def _stage(inputs: int, outputs: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    downsample: nn.Module | None = None
    if stride != 1 and shortcut == "pad":
        downsample = ZeroPadShortcut(outputs - inputs, stride)
    elif stride != 1:
        conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


for _depth in DEPTHS:
    register(f"bn_resnet{_depth}_cifar", partial(CifarResNet, _depth))
