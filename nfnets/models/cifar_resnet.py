"""BatchNorm ResNets for small images: the baseline that converters and comparisons start from."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from nfnets.errors import UserError
from nfnets.models.registry import register

DEPTHS = (8, 14, 20, 32, 56, 110)


class CifarResNet(nn.Module):
    """Post-activation ResNet of 6n+2 layers: a 3×3 stem, three stages of n basic blocks, strides 1, 2, 2.

    x ← relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))),
    the shortcut a 1×1 conv and BN where the shape changes.

    Args:
        depth: weighted layers on the longest path, 6n + 2.
        num_classes: outputs.
        in_chans: image channels.
        width: multiplies the stages' 16, 32 and 64 channels.

    Raises:
        UserError: `depth` is not 6n + 2, or another argument is not positive.

    Example:
        >>> CifarResNet(8, in_chans=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Paper: arXiv 1512.03385 §4.2, with its projection shortcuts (option B). The block is torchvision's.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3, width: float = 1):
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth={depth}: expected 6n + 2 for a CIFAR ResNet, such as 8, 14, 20 or 110")
        if min(num_classes, in_chans, 16 * width) < 1:
            raise UserError(f"{num_classes=}, {in_chans=}, {width=}: expected positive, width ≥ 1/16")
        super().__init__()
        self.num_classes = num_classes
        channels = [int(c * width) for c in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(channels[0], channels[0], blocks, stride=1)
        self.layer2 = _stage(channels[0], channels[1], blocks, stride=2)
        self.layer3 = _stage(channels[1], channels[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def get_classifier(self) -> nn.Module:
        """The last linear layer (timm's name for it)."""
        return self.fc


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or inputs != outputs:
        conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


for _depth in DEPTHS:
    register(f"bn_resnet{_depth}_cifar", partial(CifarResNet, _depth))
