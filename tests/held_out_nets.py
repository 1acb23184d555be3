"""Nets that no limit of a rule was chosen on: eight for planted faults, and healthy ones of other families.

Judged by `planted_faults.py` and `healthy_nets.py`. A rule must not be tuned to what these show.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import timm
import torch
import torchvision
from planted_nets import CLASSES, Net
from timm.models.mlp_mixer import MlpMixer
from timm.models.nfnet import NormFreeNet, _nfres_cfg
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn


def started(net: nn.Module, nonlinearity: str, slope: float = 0.0) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, slope, nonlinearity=nonlinearity)
            nn.init.zeros_(module.bias)
    return net


def tanh_net() -> nn.Module:
    widths = [24, 64, 64, 80, 80, 96, 96, 64]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return started(nn.Sequential(*layers, nn.Linear(64, CLASSES)), "tanh")


def leaky_net() -> nn.Module:
    widths = [3, 24, 24, 48, 48, 72, 72, 96]
    layers = [
        m
        for i, (a, b) in enumerate(itertools.pairwise(widths))
        for m in (nn.Conv2d(a, b, 3, 1 + i % 2, 1), nn.LeakyReLU(0.2))
    ]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, CLASSES))
    return started(net, "leaky_relu", 0.2)


class Encoder(nn.Module):
    """torch's own transformer layers over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 48)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True, norm_first=True) for _ in range(4)
        )
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def normalizer_free() -> nn.Module:
    """timm's, with its own standardized convolutions; branches that start at zero would hide what is planted there."""
    net = NormFreeNet(_nfres_cfg(depths=(2, 2, 2, 2), channels=(32, 64, 96, 128)), num_classes=CLASSES)
    with torch.no_grad():
        for name, gain in net.named_parameters():
            if name.endswith("conv3.gain"):
                gain.fill_(1.0)
    return net


HELD_OUT: dict[str, Net] = {
    "tanh MLP": Net(
        tanh_net, (24,), "6", ("7",), before_activation="6", dead_at="7", block="7", gain=5 / 3, rate=0.02
    ),
    "leaky plain": Net(
        leaky_net,
        (3, 32, 32),
        "6",
        ("7",),
        before_activation="6",
        dead_at="7",
        block="7",
        gain=(2 / 1.04) ** 0.5,
        rate=0.02,
    ),
    "ResNet-26-T": Net(
        lambda: timm.create_model("resnet26t", num_classes=CLASSES, zero_init_last=False),
        (3, 48, 48),
        "layer2.1.conv2",
        ("layer2.1.bn2",),
        end="layer3.0.bn3",
        end_behind=("layer3.0",),
        before_activation="layer2.1.bn2",
        dead_at="layer2.1.act2",
        block="layer2.0",
    ),
    "MobileNetV2": Net(
        lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=0.35),
        (3, 48, 48),
        "features.9.conv.0.0",
        ("features.9.conv.0.1",),
        end="features.8.conv.3",
        end_behind=("features.8",),
        before_activation="features.9.conv.0.1",
        dead_at="features.9.conv.0.2",
        block="features.8",
    ),
    "Mixer": Net(
        lambda: MlpMixer(img_size=32, patch_size=8, num_blocks=4, embed_dim=64, num_classes=CLASSES),
        (3, 32, 32),
        "blocks.1.mlp_channels.fc1",
        ("blocks.1.mlp_channels.act",),
        end="blocks.2.mlp_channels.fc2",
        end_behind=("blocks.2#2",),
        before_activation="blocks.1.mlp_channels.fc1",
        dead_at="blocks.1.mlp_channels.act",
        block="blocks.2",
        rate=0.05,
    ),
    "Swin": Net(
        lambda: SwinTransformer(
            img_size=32,
            patch_size=2,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
            num_classes=CLASSES,
        ),
        (3, 32, 32),
        "layers.1.blocks.0.mlp.fc1",
        ("layers.1.blocks.0.mlp.act",),
        end="layers.0.blocks.1.mlp.fc2",
        end_behind=("layers.0.blocks.1#2",),
        before_activation="layers.1.blocks.0.mlp.fc1",
        dead_at="layers.1.blocks.0.mlp.act",
        block="layers.0.blocks.1",
        rate=0.05,
    ),
    "encoder": Net(
        Encoder,
        (16, 24),
        "blocks.2.linear1",
        ("blocks.2.relu",),
        end="blocks.1.linear2",
        end_behind=("blocks.1#2",),
        before_activation="blocks.2.linear1",
        dead_at="blocks.2.relu",
        block="blocks.1",
        rate=0.05,
    ),
    "NF (timm)": Net(
        normalizer_free,
        (3, 48, 48),
        "stages.1.1.conv2",
        ("stages.1.1.act3",),
        end="stages.1.1.conv3",
        end_behind=("stages.1.1",),
        before_activation="stages.1.1.conv2",
        dead_at="stages.1.1.act3",
        block="stages.1.1",
    ),
}


def timm_net(name: str, **how: int) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **how)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (net.build, net.shape) for name, net in HELD_OUT.items()},
    **{
        name: (timm_net(name), (3, 64, 64))
        for name in (
            "ghostnet_050",
            "lcnet_035",
            "regnetx_002",
            "repvgg_a0",
            "dla46_c",
            "edgenext_xx_small",
            "convmixer_768_32",
            "poolformer_s12",
            "mobileone_s0",
            "tf_efficientnet_b0",
            "ese_vovnet19b_dw",
            "nf_regnet_b0",
            "cs3darknet_focus_s",
            "gernet_s",
        )
    },
    "xcit_nano_12_p16_224": (timm_net("xcit_nano_12_p16_224", img_size=64), (3, 64, 64)),
    "deit3_small, depth 4": (timm_net("deit3_small_patch16_224", img_size=64, depth=4), (3, 64, 64)),
    "gmlp_ti16_224": (timm_net("gmlp_ti16_224"), (3, 224, 224)),
    "resmlp_12_224": (timm_net("resmlp_12_224"), (3, 224, 224)),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=CLASSES), (3, 64, 64)),
    "alexnet": (lambda: torchvision.models.alexnet(num_classes=CLASSES), (3, 64, 64)),
    "mnasnet0_5": (lambda: torchvision.models.mnasnet0_5(num_classes=CLASSES), (3, 64, 64)),
}
