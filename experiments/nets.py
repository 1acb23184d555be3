"""Small BatchNorm nets of each family with stems for images of about 30 pixels.

nfnets train --model experiments.nets:vgg
"""

from __future__ import annotations

import timm
from torch import nn
from torchvision.models import DenseNet
from torchvision.models.vgg import VGG, make_layers


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


def _dense_stem(model: nn.Module) -> nn.Module:
    """The stem at stride 1: 28 pixels would otherwise be 1 at the end."""
    model.conv_stem.stride = (1, 1)
    return model
