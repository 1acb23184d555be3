"""What distinguishes one pre-activation normalizer-free network from another."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from nfnets.errors import UserError, unknown


@dataclass(frozen=True)
class NormFreeConfig:
    """One member of the NF-ResNet, NF-RegNet, NFNet or ECA-NFNet families, or its BatchNorm twin.

    A block computes h + α · s · attention(f(γ · act(h) / β)), with γ the activation's gain, β² the predicted
    variance of h, α a constant and s SkipInit's scalar.

    Args:
        depths: blocks of each stage.
        widths: output channels of each stage.
        stem: `"7x7_pool"` (ResNet), `"3x3"` (RegNet), `"deep"` (NFNet: four 3×3, to 16, 32, 64
            and `stem_width` channels), `"cifar"` (3×3, no stride).
        stem_width: output channels of the stem.
        strides: of each stage's first block.
        block: `"bottleneck"` (1×1, 3×3, 1×1) or `"basic"` (3×3, 3×3).
        ratio: channels between a bottleneck's 1×1 convolutions, as a part of `ratio_of`.
        ratio_of: `"out"` (ResNet) or `"in"` (RegNet) channels of the block.
        first_ratio: replaces `ratio` in the very first block.
        group_width: channels in a group of the 3×3 convolutions; None for no groups.
        divisor: bottleneck and attention widths are rounded to its multiples; 1 truncates to an integer.
        extra_conv: a second 3×3 convolution in every bottleneck (NFNet).
        attention: `"se"`, `"eca"` or None; doubled, since sigmoid(0) = ½.
        attention_ratio: hidden part of squeeze-excite.
        attention_at: `"end"` (after the last convolution) or `"middle"` (after the 3×3, before its activation).
        pooled_shortcut: a strided shortcut averages 2×2 before its 1×1 convolution, instead of striding it.
        final_width: channels of a last 1×1 convolution, 0 for none.
        activation: a name `nfnets.gains.gain` knows.
        constants: which gains, `"exact"` or `"deepmind"`.
        gain_at: `"input"`: γ multiplies each activation (folded into the convolution after it). `"conv"`: γ
            multiplies every convolution, whatever precedes it, and not the last activation (timm).
        alpha: α.
        skipinit: a scalar at each branch's end, 0 at first; otherwise its last convolution's gain is 0 at first.
        padding: `"same"` is symmetric; `"tf_same"` adds odd rows and columns at the bottom and right.
        zero_head: initialize the classifier with zeros instead of N(0, 0.01²).
        norm: `"bn"` for the BatchNorm twin: a BatchNorm before every activation, no constants, plain convolutions.
        train_size, test_size: the published resolutions in pixels.
        dropout: the published dropout rate.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: Literal["7x7_pool", "3x3", "deep", "cifar"] = "7x7_pool"
    stem_width: int = 64
    strides: tuple[int, ...] = (1, 2, 2, 2)
    block: Literal["bottleneck", "basic"] = "bottleneck"
    ratio: float = 0.25
    ratio_of: Literal["out", "in"] = "out"
    first_ratio: float | None = None
    group_width: int | None = None
    divisor: int = 1
    extra_conv: bool = False
    attention: Literal["se", "eca"] | None = None
    attention_ratio: float = 0.25
    attention_at: Literal["end", "middle"] = "end"
    pooled_shortcut: bool = False
    final_width: int = 0
    activation: str = "relu"
    constants: Literal["exact", "deepmind"] = "exact"
    gain_at: Literal["input", "conv"] = "input"
    alpha: float = 0.2
    skipinit: bool = True
    padding: Literal["same", "tf_same"] = "same"
    zero_head: bool = False
    norm: Literal["bn"] | None = None
    train_size: int = 224
    test_size: int = 224
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.widths) == len(self.strides):
            raise UserError(
                f"depths={self.depths}, widths={self.widths}, strides={self.strides}: "
                "expected as many of each; give one number per stage"
            )
        if min(*self.depths, *self.widths, *self.strides, self.stem_width) < 1 or self.ratio <= 0:
            raise UserError(
                f"depths={self.depths}, widths={self.widths}, strides={self.strides}, stem_width="
                f"{self.stem_width}, ratio={self.ratio:g}: expected positive numbers"
            )

        if self.block == "basic" and (self.extra_conv or (self.attention and self.attention_at == "middle")):
            raise UserError("a basic block has no middle: expected attention_at='end' and no extra_conv")

    def with_options(self, **options: Any) -> NormFreeConfig:
        """A copy with these fields replaced.

        Raises:
            UserError: no such field (the nearest are given), or a value out of range.

        Example:
            >>> NormFreeConfig((1,), (64,), strides=(1,)).with_options(attention="se").attention
            'se'
        """
        known = {field.name for field in fields(self)}
        for name in options:
            if name not in known:
                raise unknown("model option", name, known | {"num_classes", "in_chans", "drop_rate"})
        return replace(self, **options)

    def betas(self) -> list[float]:
        """β of every block: β² is 1 at first, grows by α² a block, and restarts at 1 after a stage's first.

        Example:
            >>> [round(b * b, 2) for b in NormFreeConfig((2, 3), (64, 64), strides=(1, 2)).betas()]
            [1.0, 1.04, 1.08, 1.04, 1.08]

        Paper: arXiv 2101.08692 §3. Checked against deepmind-research `nfnets/nf_resnet.py` (`expected_std`).
        """
        variance, betas = 1.0, []
        for depth in self.depths:
            for index in range(depth):
                betas.append(variance**0.5)
                variance = (1.0 if index == 0 else variance) + self.alpha**2
        return betas

    def reductions(self) -> list[int]:
        """Image pixels per side and pixel of each stage's output.

        Example:
            >>> NormFreeConfig((1, 1), (64, 128), strides=(1, 2)).reductions()
            [4, 8]
        """
        stem = {"cifar": 1, "3x3": 2, "7x7_pool": 4, "deep": 4}[self.stem]
        return [stem * math.prod(self.strides[: index + 1]) for index in range(len(self.strides))]
