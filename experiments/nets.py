"""Small BatchNorm nets of each family with stems for images of about 30 pixels, and nets that never had a norm layer.

nfnets train --model experiments.nets:vgg
"""

from __future__ import annotations

from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
from timm.models import ConvNeXt, VisionTransformer
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.vgg import VGG, make_layers

from nfnets.init import delta_orthogonal_, scaled_orthogonal_
from nfnets.models.cifar_resnet import CifarResNet


def mobilenetv2(num_classes: int, in_chans: int) -> nn.Module:
    """timm's MobileNetV2 at width 0.35: inverted residuals, depthwise convolutions, ReLU6."""
    return _dense_stem(timm.create_model("mobilenetv2_035", num_classes=num_classes, in_chans=in_chans))


def mobilenetv3(num_classes: int, in_chans: int) -> nn.Module:
    """timm's MobileNetV3-Small at width 0.5: with squeeze-excite and hard-swish."""
    return _dense_stem(timm.create_model("mobilenetv3_small_050", num_classes=num_classes, in_chans=in_chans))


def efficientnet(num_classes: int, in_chans: int) -> nn.Module:
    """timm's smallest EfficientNet (`test_efficientnet`): fused and plain inverted residuals, SiLU."""
    return _dense_stem(timm.create_model("test_efficientnet", num_classes=num_classes, in_chans=in_chans))


def densenet(num_classes: int, in_chans: int) -> nn.Module:
    """torchvision's DenseNet-BC with three blocks of four layers, growth 12: a norm layer before each convolution."""
    model = DenseNet(growth_rate=12, block_config=(4, 4, 4), num_init_features=24, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(in_chans, 24, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()
    return model


def vit(num_classes: int, in_chans: int, size: int) -> nn.Module:
    """timm's vision transformer of width 32 and three blocks, for 4 x 4 patches: layer norms only."""
    return VisionTransformer(
        size,
        size // 4,
        in_chans,
        num_classes,
        global_pool="avg",
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=2,
    )


def convnext(num_classes: int, in_chans: int) -> nn.Module:
    """timm's ConvNeXt with one block a stage and no patches: layer norms only."""
    return ConvNeXt(in_chans, num_classes, patch_size=1, depths=(1, 1, 1, 1), dims=(8, 16, 32, 48))


class UNet(nn.Module):
    """A U-Net of three levels, each with two convolutions, each followed by a norm layer of a kind."""

    def __init__(self, kind: str, classes: int, width: int = 8):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if kind == "instance":
                return nn.InstanceNorm2d(channels, affine=True)
            return nn.GroupNorm(4, channels)

        def level(before: int, after: int) -> nn.Sequential:
            layers = []
            for channels in (before, after):
                layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), norm(after), nn.ReLU()]
            return nn.Sequential(*layers)

        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(level(b, a) for b, a in pairwise((1, *widths)))
        self.up = nn.ModuleList(level(a + b, b) for a, b in pairwise(widths[::-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level in self.down:
            x = level(x if not kept else F.max_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return self.head(x)


def vgg(num_classes: int, in_chans: int) -> nn.Module:
    """torchvision's VGG with BatchNorm, six convolutions and a pooled linear head: no shortcut anywhere."""
    features = make_layers([16, 32, "M", 64, 64, "M", 128, 128, "M"], batch_norm=True)
    features[0] = nn.Conv2d(in_chans, 16, 3, padding=1)
    model = VGG(features, num_classes=num_classes)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Linear(128, num_classes))
    nn.init.kaiming_normal_(features[0].weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(model.classifier[0].weight, 0, 0.01)
    nn.init.zeros_(model.classifier[0].bias)
    return model


def resnet(num_classes: int, in_chans: int, depth: int = 20, weights: str | None = None) -> nn.Module:
    """The CIFAR ResNet of any depth 6n + 2; with `weights` (see `bare`) without its BatchNorm layers."""
    model = CifarResNet(depth, num_classes=num_classes, in_chans=in_chans)
    return model if weights is None else bare(model, weights)


def plain(num_classes: int, in_chans: int, depth: int = 14, weights: str | None = None) -> nn.Module:
    """`depth` − 1 convolutions of 16 channels with BatchNorm, pooled in the middle, and a linear head: no shortcut."""
    layers: list[nn.Module] = []
    for index in range(depth - 1):
        conv = nn.Conv2d(in_chans if index == 0 else 16, 16, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(16), nn.ReLU()]
        if index == depth // 2:
            layers.append(nn.MaxPool2d(2))
    head = nn.Linear(16, num_classes)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return model if weights is None else bare(model, weights)


class _ResidualDropout(nn.Module):
    """ContraWR's block: two convolutions, a projection beside them, and dropout behind the sum."""

    def __init__(self, inputs: int, channels: int, p: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ELU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels)
        )
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.drop(self.pool(out + self.downsample(x)))


def contrawr(num_classes: int, in_chans: int, p: float = 0.5) -> nn.Module:
    """ContraWR's encoder, for EEG (arXiv 2110.15278): dropout behind each sum; the image stands for a spectrogram."""
    widths = (in_chans, 16, 32, 48, 64)
    blocks = [_ResidualDropout(a, b, p) for a, b in pairwise(widths)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ELU(), nn.Linear(64, num_classes))


def deep4(num_classes: int, in_chans: int, p: float = 0.5, size: int = 8) -> nn.Module:
    """Deep4Net, for EEG (arXiv 1703.05051): dropout before convolutions; rows are electrodes, columns time."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_chans, 25, (1, 3), padding=(0, 1)),
        nn.Conv2d(25, 25, (size, 1), bias=False),
    ]
    for inputs, channels in ((25, 50), (50, 100), (100, 200)):
        layers += [nn.BatchNorm2d(inputs), nn.ELU(), nn.MaxPool2d((1, 2)), nn.Dropout(p)]
        layers.append(nn.Conv2d(inputs, channels, (1, 3), padding=(0, 1), bias=False))
    layers += [
        nn.BatchNorm2d(200),
        nn.ELU(),
        nn.Dropout(p),
        nn.Flatten(),
        nn.Linear(200 * (size // 8), num_classes),
    ]
    return nn.Sequential(*layers)


def dropped(num_classes: int, in_chans: int, p: float = 0.5, size: int = 8) -> nn.Module:
    """Eight linear layers with BatchNorm, ReLU and dropout."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(in_chans * size**2, 256)]
    for _ in range(7):
        layers += [nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(p), nn.Linear(256, 256)]
    layers += [nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(p), nn.Linear(256, num_classes)]
    return nn.Sequential(*layers)


WEIGHTS = {
    "he": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "orthogonal": lambda weight: scaled_orthogonal_(weight, gain=2**0.5),
    # Narrower than its input it cannot be an isometry; such a layer gets the mean square right.
    "delta_orthogonal": lambda weight: (
        delta_orthogonal_(weight, gain=2**0.5)
        if weight.shape[0] >= weight.shape[1]
        else scaled_orthogonal_(weight, gain=2**0.5, delta=True)
    ),
}


def bare(model: nn.Module, weights: str) -> nn.Module:
    """A BatchNorm net without its norm layers: convolutions have biases, and weights drawn by one of `WEIGHTS`."""
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.BatchNorm2d):
            setattr(parent, name.rpartition(".")[2], nn.Identity())
        elif isinstance(module, nn.Conv2d):
            WEIGHTS[weights](module.weight)
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))
    return model


def _dense_stem(model: nn.Module) -> nn.Module:
    """The stem at stride 1: 28 pixels would otherwise be 1 at the end."""
    model.conv_stem.stride = (1, 1)
    return model
