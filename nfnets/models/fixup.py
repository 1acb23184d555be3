"""Fixup-ResNets: residual networks without normalization, by initialization and scalars alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.init import ScalarBias, ScalarMultiplier
from nfnets.layers import StochasticDepth
from nfnets.models.head import PooledClassifier, check_rates
from nfnets.models.parts import ZeroPadShortcut
from nfnets.models.stages import Parts


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class FixupBlock(nn.Module):
    """relu(shortcut + s · conv(… relu(conv(x + b₁) + b₂) + b₃ …) + b₄): a scalar bias before and after each part.

    A shortcut with parameters or a stride reads x + b₁, as the first convolution does; an identity reads x.

    Args:
        inputs, outputs: channels.
        stride: of the first 3×3 convolution.
        bottleneck: 1×1, 3×3, 1×1 with a quarter of `outputs` between; otherwise 3×3, 3×3.
        shortcut: where shape changes, `"projection"` (1×1 convolution) or `"pad"` (zeros).
        drop_path_rate: probability of dropping the branch of a sample, in training.

    Paper: arXiv 1901.09321. Checked against the authors' repository (placement; `fixup_resnet_cifar.py`,
    `fixup_resnet_imagenet.py`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        bottleneck: bool,
        shortcut: Literal["projection", "pad"],
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        middle = outputs // 4 if bottleneck else outputs
        widths = [(inputs, middle, 1, 1), (middle, middle, 3, stride), (middle, outputs, 1, 1)]
        if not bottleneck:
            widths = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        self.bias1a = ScalarBias()
        parts: list[nn.Module] = []
        for index, (c_in, c_out, kernel, step) in enumerate(widths):
            parts += [ScalarBias()] if index else []
            parts += [_conv(c_in, c_out, kernel, step)]
            parts += (
                [ScalarBias(), nn.ReLU(inplace=True)]
                if index < len(widths) - 1
                else [ScalarMultiplier(), ScalarBias()]
            )
        parts += [StochasticDepth(drop_path_rate, rescale=True)] if drop_path_rate else []
        self.branch = nn.Sequential(*parts)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            pad = shortcut == "pad"
            self.downsample = (
                ZeroPadShortcut(outputs - inputs, stride) if pad else _conv(inputs, outputs, 1, stride)
            )
        self.relu = nn.ReLU(inplace=True)

    def convs(self) -> list[nn.Conv2d]:
        """The branch's convolutions, in order."""
        return [module for module in self.branch if isinstance(module, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        biased = self.bias1a(x)
        shortcut = x if self.downsample is None else self.downsample(biased)
        return self.relu(shortcut + self.branch(biased))


class FixupResNet(PooledClassifier):
    """A residual network whose first update does not depend on its depth.

    L blocks of m convolutions: every convolution of a branch but the last has std sqrt(2 / fan_out) · L^(−1/(2m−2)),
    the last is 0, and so is the classifier; the stem and the shortcuts keep He's sqrt(2 / fan_out).

    Args:
        depths: blocks of each stage.
        widths: output channels of each stage; the stride is 1 in the first and 2 in the others.
        num_classes: outputs; 0 returns the pooled features.
        in_chans: image channels.
        stem: `"cifar"` (3×3) or `"7x7_pool"`.
        stem_width: output channels of the stem.
        bottleneck: 1×1, 3×3, 1×1 blocks instead of 3×3, 3×3.
        shortcut: `"pad"` (CIFAR) or `"projection"` (ImageNet).
        global_pool: `"avg"`, or `""` for the unpooled features (with `num_classes=0`).
        drop_rate: dropout before the classifier, in training.
        drop_path_rate: stochastic depth: block i of n drops its branch with probability rate · i / n and divides
            what remains by what is kept.

    Raises:
        UserError: stages and widths do not match, or a padded shortcut whose width shrinks.

    Example:
        >>> model = FixupResNet((1, 1), (16, 32), num_classes=10)
        >>> model(torch.randn(2, 3, 8, 8)).abs().max().item()
        0.0

    Paper: arXiv 1901.09321. Checked against the authors' repository (parameter counts, placement) and
    deepmind-research `nfnets/fixup_resnet.py`. The repository leaves the CIFAR stem at torch's default; the paper's
    rule, followed here, is He's.
    """

    stem_pattern = r"^(?:conv1|bias1)"
    stage_pattern = r"^stages\.(\d+)"

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: Literal["cifar", "7x7_pool"] = "cifar",
        stem_width: int = 16,
        bottleneck: bool = False,
        shortcut: Literal["projection", "pad"] = "pad",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if len(depths) != len(widths) or min(*depths, *widths, stem_width, in_chans) < 1:
            raise UserError(
                f"{depths=}, {widths=}, {stem_width=}, {in_chans=}: expected as many of each, positive"
            )
        check_rates(drop_rate, drop_path_rate)
        super().__init__()
        self.in_chans, self.drop_rate = in_chans, drop_rate
        pool = stem == "7x7_pool"
        self.conv1 = nn.Conv2d(
            in_chans, stem_width, 7 if pool else 3, 2 if pool else 1, 3 if pool else 1, bias=False
        )
        self.bias1, self.relu = ScalarBias(), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if pool else nn.Identity()
        self.stages, inputs = nn.Sequential(), stem_width
        for index, (depth, outputs) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            for place in range(depth):
                stride = 2 if index and not place else 1
                if shortcut == "pad" and outputs < inputs:
                    raise UserError(f"{widths=}: padding cannot narrow a stage; pass shortcut='projection'")
                dropped = drop_path_rate * (sum(depths[:index]) + place) / sum(depths)
                stage.append(FixupBlock(inputs, outputs, stride, bottleneck, shortcut, dropped))
                inputs = outputs
            self.stages.append(stage)
        stem_stride, first = (2, 4) if pool else (1, 1)
        self.feature_info = [
            {"num_chs": stem_width, "reduction": stem_stride, "module": "relu"},
            *(
                {"num_chs": outputs, "reduction": first * 2**index, "module": f"stages.{index}"}
                for index, outputs in enumerate(widths)
            ),
        ]
        self.bias2 = ScalarBias()
        self.set_head(inputs, num_classes, global_pool)
        self._initialize()

    def _initialize(self) -> None:
        blocks = self.blocks()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            for block in blocks:
                *first, last = block.convs()
                for conv in first:
                    conv.weight *= len(blocks) ** (-1 / (2 * len(first)))
                last.weight.zero_()
        self.initialize_head()

    def initialize_head(self) -> None:
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def blocks(self) -> list[FixupBlock]:
        """Every block, in execution order."""
        return [module for module in self.modules() if isinstance(module, FixupBlock)]

    def parts(self) -> Parts:
        return Parts((self.conv1, self.bias1, self.relu), (self.maxpool,), list(self.stages), (), ())

    def keep_stages(self, count: int) -> None:
        if not count:
            self.maxpool = nn.Identity()
        for index in range(count, len(self.stages)):
            self.stages[index] = nn.Sequential()

    def drop_head(self) -> None:
        self.bias2 = nn.Identity()

    def pool(self, x: Tensor) -> Tensor:
        return self.bias2(super().pool(x))
