"""Small BatchNorm nets of each family with stems for images of about 30 pixels, and nets that never had a norm layer.

nfnets train --model experiments.nets:vgg
"""

from __future__ import annotations

import timm
from torch import nn
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
