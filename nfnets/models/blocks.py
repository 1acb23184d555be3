"""Stem and block of the pre-activation normalizer-free networks and of their BatchNorm twins."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from timm.layers.helpers import make_divisible
from torch import Tensor, nn

from nfnets import gains
from nfnets.errors import UserError, unknown
from nfnets.layers import Scale, SkipInit, SqueezeExcite, StochasticDepth
from nfnets.models.config import NormFreeConfig
from nfnets.models.parts import EfficientChannelAttention, PreactConv2d

_ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
}


def activation(config: NormFreeConfig, channels: int, inplace: bool = False) -> nn.Module:
    """The activation, behind a BatchNorm in the twin. ReLU may overwrite a convolution's output: none else reads it."""
    if config.activation not in _ACTIVATIONS:
        raise unknown("activation", config.activation, _ACTIVATIONS)
    inplace |= config.norm == "bn"  # what the norm returns is read by no one else
    act = nn.ReLU(inplace) if config.activation == "relu" else _ACTIVATIONS[config.activation]()
    if config.norm != "bn":
        return act
    return nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(channels), act=act))


def gamma(config: NormFreeConfig) -> float:
    """γ, the gain of the configuration's activation."""
    return gains.gain(config.activation, config.constants)


def convolution(
    config: NormFreeConfig,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    grouped: bool = False,
    beta: float = 1.0,
    alpha: float = 1.0,
    activated: bool = True,
) -> nn.Conv2d:
    """A convolution with the constants of its place: γ/β of an activated input, α at a branch's end."""
    groups = inputs // config.group_width if grouped and config.group_width else 1
    arguments: dict[str, Any] = {"stride": stride, "groups": groups, "padding": kernel // 2}
    if config.norm == "bn":
        return nn.Conv2d(inputs, outputs, kernel, bias=False, **arguments)
    if config.padding == "tf_same":
        arguments["padding"] = "tf_same"
    gain = gamma(config) if activated or config.gain_at == "conv" else 1.0
    return PreactConv2d(inputs, outputs, kernel, scale=gain / beta, alpha=alpha, **arguments)


def attention(config: NormFreeConfig, channels: int) -> nn.Module:
    """Channel attention, doubled where nothing normalizes after it."""
    gain = 1.0 if config.norm == "bn" else 2.0
    if config.attention == "eca":
        return EfficientChannelAttention(channels, gain)
    hidden = channels * config.attention_ratio
    if config.divisor > 1:
        hidden = make_divisible(hidden, config.divisor, round_limit=0)
    return SqueezeExcite(channels, hidden=max(1, int(hidden)), gain=gain)


def stem(config: NormFreeConfig, in_chans: int) -> nn.Sequential:
    """Image to `stem_width` channels; the last convolution is followed by the first block's activation."""
    width = config.stem_width
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if config.stem == "deep":
        widths, strides = (16, 32, 64, width), (2, 1, 1, 2)
        for index, (outputs, stride) in enumerate(zip(widths, strides, strict=True), 1):
            first = index == 1
            parts[f"conv{index}"] = convolution(config, in_chans, outputs, 3, stride, activated=not first)
            if index < len(widths):
                # timm takes an intermediate after conv3, which nothing may overwrite then.
                parts[f"act{index + 1}"] = activation(config, outputs, inplace=index < 3)
            in_chans = outputs
    else:
        kernel, stride = {"7x7_pool": (7, 2), "3x3": (3, 2), "cifar": (3, 1)}[config.stem]
        parts["conv"] = convolution(config, in_chans, width, kernel, stride, activated=False)
        if config.stem == "7x7_pool":
            parts["pool"] = nn.MaxPool2d(3, 2, padding=1)
    return nn.Sequential(parts)


class Shortcut(nn.Module):
    """The shortcut of a transition block: an optional 2×2 mean over the valid pixels, then a 1×1 convolution."""

    def __init__(self, config: NormFreeConfig, inputs: int, outputs: int, stride: int, beta: float):
        super().__init__()
        pooled = stride > 1 and config.pooled_shortcut
        mean = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
        self.pool = mean if pooled else nn.Identity()
        self.conv = convolution(config, inputs, outputs, 1, 1 if pooled else stride, beta=beta)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class NormFreeBlock(nn.Module):
    """h + α · s · attention(f(γ · act(h) / β)), or (twin) h + attention(f(act(bn(h)))).

    Where shape changes, the shortcut is a convolution of γ · act(h) / β instead of h, which restarts the variance.

    Args:
        config: the network's.
        inputs, outputs: channels.
        stride: of the first 3×3 convolution.
        beta: β.
        ratio: of the bottleneck.
        drop_path_rate: probability of dropping the branch of a sample, in training.

    Paper: arXiv 2101.08692 §3, 2102.06171 §4. Checked against deepmind-research `nfnets/nfnet.py`,
    `nf_regnet.py`, `nf_resnet.py` and timm `models/nfnet.py`.
    """

    def __init__(
        self,
        config: NormFreeConfig,
        inputs: int,
        outputs: int,
        stride: int,
        beta: float,
        ratio: float,
        drop_path_rate: float,
    ):
        super().__init__()
        self.beta, self.alpha = beta, config.alpha
        transition = stride > 1 or inputs != outputs
        self.downsample = Shortcut(config, inputs, outputs, stride, beta) if transition else None
        width = outputs if config.block == "basic" else self._width(config, inputs, outputs, ratio)
        self.act1 = activation(config, inputs)
        self.branch = nn.Sequential(self._branch(config, inputs, width, outputs, stride, beta))
        if drop_path_rate:
            self.branch.add_module("drop_path", StochasticDepth(drop_path_rate))
        if config.norm is None and config.skipinit:
            self.branch.add_module("skip", SkipInit())
        if config.norm is None and config.attention and config.attention_at == "end":
            self.branch.add_module("scale", Scale(config.alpha))

    @staticmethod
    def _branch(
        config: NormFreeConfig, inputs: int, width: int, outputs: int, stride: int, beta: float
    ) -> OrderedDict[str, nn.Module]:
        at = config.attention_at if config.attention else None
        alpha = 1.0 if at == "end" else config.alpha  # attention is not linear: α comes after it
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if config.block == "basic":
            parts["conv1"] = convolution(config, inputs, width, 3, stride, beta=beta)
            parts["act2"] = activation(config, width, inplace=True)
            parts["conv2"] = convolution(config, width, outputs, 3, alpha=alpha)
        else:
            parts["conv1"] = convolution(config, inputs, width, 1, beta=beta)
            parts["act2"] = activation(config, width, inplace=True)
            parts["conv2"] = convolution(config, width, width, 3, stride, grouped=True)
            if config.extra_conv:
                parts["act2b"] = activation(config, width, inplace=True)
                parts["conv2b"] = convolution(config, width, width, 3, grouped=True)
            if at == "middle":
                parts["attn"] = attention(config, width)
            parts["act3"] = activation(config, width, inplace=True)
            parts["conv3"] = convolution(config, width, outputs, 1, alpha=alpha)
        if at == "end":
            parts["attn_last"] = attention(config, outputs)
        return parts

    @staticmethod
    def _width(config: NormFreeConfig, inputs: int, outputs: int, ratio: float) -> int:
        width = ratio * (outputs if config.ratio_of == "out" else inputs)
        width = int(width) if config.divisor == 1 else make_divisible(width, config.divisor)
        if config.group_width is None:
            return width
        if width < config.group_width:
            raise UserError(
                f"a bottleneck of {width} channels and group_width={config.group_width}: expected at least one "
                "group; widen the stage or narrow the groups"
            )
        return width // config.group_width * config.group_width

    def forward(self, h: Tensor) -> Tensor:
        a = self.act1(h)
        shortcut = h if self.downsample is None else self.downsample(a)
        return shortcut + self.branch(a)
