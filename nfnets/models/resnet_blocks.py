"""torchvision's ResNet blocks with stochastic depth, for the BatchNorm twins."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torchvision.models import resnet

from nfnets.layers import StochasticDepth


class BasicBlock(resnet.BasicBlock):
    """relu(shortcut(x) + drop(bn(conv(relu(bn(conv(x)))))))."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return _join(self, x, self.bn2(self.conv2(out)))


class Bottleneck(resnet.Bottleneck):
    """relu(shortcut(x) + drop(bn(conv(relu(bn(conv(relu(bn(conv(x)))))))))): 1×1, 3×3, 1×1."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return _join(self, x, self.bn3(self.conv3(out)))


def _join(block: BasicBlock | Bottleneck, x: Tensor, branch: Tensor) -> Tensor:
    if block.drop_path is not None:
        branch = block.drop_path(branch)
    shortcut = x if block.downsample is None else block.downsample(x)
    branch += shortcut  # in place, as torchvision's: nothing else reads the branch
    return block.relu(branch)


def set_stochastic_depth(net: nn.Module, rate: float) -> None:
    """Block i of n drops its branch with probability rate · i / n in training, and rescales what remains."""
    blocks = [module for module in net.modules() if isinstance(module, BasicBlock | Bottleneck)]
    for index, block in enumerate(blocks):
        if rate and index:
            cast(Any, block).drop_path = StochasticDepth(rate * index / len(blocks), rescale=True)
