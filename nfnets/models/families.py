"""The published members: NF-ResNet, NF-RegNet, NFNet, ECA-NFNet, and the BatchNorm twin of each.

Numbers: deepmind-research `nfnets/base.py`, `nf_resnet.py`, `nf_regnet.py`, `nfnet.py`; the ECA variants and
`nfnet_l0`: timm `models/nfnet.py`, with timm's constants, so that timm's weights fit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nfnets.models.config import NormFreeConfig
from nfnets.models.norm_free import NormFreeNet
from nfnets.models.registry import register

CONFIGS: dict[str, NormFreeConfig] = {}
"""Every member by name, without the twins."""

_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24,) * 4,
    600: (50,) * 4,
}
_SMALL = (8, 14, 20, 32, 56, 110)

# Widths before the family's 0.75, depths, training and test pixels, dropout.
_REGNET: dict[int, tuple[tuple[int, ...], tuple[int, ...], int, int, float]] = {
    0: ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    1: ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    2: ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    3: ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    4: ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    5: ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    6: ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    7: ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    8: ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
}

# Training and test pixels, dropout; depths are (1, 2, 6, 3) times the index + 1.
_NFNET = (
    (192, 256, 0.2),
    (224, 320, 0.3),
    (256, 352, 0.4),
    (320, 416, 0.4),
    (384, 512, 0.5),
    (416, 544, 0.5),
    (448, 576, 0.5),
    (480, 608, 0.5),
)

# Training and test pixels, channels of the final convolution as a part of 1536.
_LIGHT = ((224, 288, 1.5), (256, 320, 2), (320, 384, 2), (352, 448, 2))


def _nf_resnets() -> dict[str, NormFreeConfig]:
    configs = {}
    for depth, depths in _BASIC.items():
        configs[f"nf_resnet{depth}"] = NormFreeConfig(depths, (64, 128, 256, 512), block="basic")
    for depth, depths in _BOTTLENECK.items():
        configs[f"nf_resnet{depth}"] = NormFreeConfig(depths, (256, 512, 1024, 2048))
    for name, config in list(configs.items()):
        configs[f"{name}_cifar"] = config.with_options(stem="cifar", train_size=32, test_size=32)
    small: dict[str, Any] = {"stem": "cifar", "stem_width": 16, "train_size": 32, "test_size": 32}
    for depth in _SMALL:
        configs[f"nf_resnet{depth}_cifar"] = NormFreeConfig(
            ((depth - 2) // 6,) * 3, (16, 32, 64), strides=(1, 2, 2), block="basic", **small
        )
    return configs


def _nf_regnets() -> dict[str, NormFreeConfig]:
    configs = {}
    for index, (unscaled, depths, train, test, dropout) in _REGNET.items():
        widths = tuple(int(0.75 * width) for width in unscaled)
        configs[f"nf_regnet_b{index}"] = NormFreeConfig(
            depths,
            widths,
            stem="3x3",
            stem_width=widths[0],
            strides=(2, 2, 2, 2),
            ratio=2.25,
            ratio_of="in",
            first_ratio=1.0,
            group_width=8,
            attention="se",
            attention_ratio=0.5,
            attention_at="middle",
            pooled_shortcut=True,
            final_width=1280 * widths[-1] // 440,
            activation="silu",
            zero_head=True,
            train_size=train,
            test_size=test,
            dropout=dropout,
        )
    return configs


def _nfnets() -> dict[str, NormFreeConfig]:
    configs = {}
    for suffix, widths in (("", (256, 512, 1536, 1536)), ("_plus", (384, 768, 2048, 2048))):
        for index, (train, test, dropout) in enumerate(_NFNET):
            configs[f"nfnet_f{index}{suffix}"] = NormFreeConfig(
                tuple((index + 1) * depth for depth in (1, 2, 6, 3)),
                widths,
                stem="deep",
                stem_width=widths[0] // 2,
                ratio=0.5,
                group_width=128,
                extra_conv=True,
                attention="se",
                attention_ratio=0.5,
                pooled_shortcut=True,
                final_width=2 * widths[-1],
                activation="gelu_tanh",
                padding="tf_same",
                train_size=train,
                test_size=test,
                dropout=dropout,
            )
    return configs


def _light_nfnets() -> dict[str, NormFreeConfig]:
    configs = {}
    for index, (train, test, final) in enumerate(_LIGHT):
        configs[f"eca_nfnet_l{index}"] = NormFreeConfig(
            tuple((index + 1) * depth for depth in (1, 2, 6, 3)),
            (256, 512, 1536, 1536),
            stem="deep",
            stem_width=128,
            group_width=64,
            divisor=8,
            extra_conv=True,
            attention="eca",
            pooled_shortcut=True,
            final_width=int(1536 * final),
            activation="silu",
            constants="deepmind",
            gain_at="conv",
            skipinit=False,
            train_size=train,
            test_size=test,
        )
    configs["nfnet_l0"] = configs["eca_nfnet_l0"].with_options(attention="se")
    return configs


def build(
    config: NormFreeConfig,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: str = "avg",
    **options: Any,
) -> NormFreeNet:
    """`NormFreeNet` with any of `NormFreeConfig`'s fields replaced."""
    config = config.with_options(**options)
    return NormFreeNet(config, num_classes, in_chans, drop_rate, drop_path_rate, global_pool)


for _family in (_nf_resnets, _nf_regnets, _nfnets, _light_nfnets):
    for _name, _config in _family().items():
        CONFIGS[_name] = _config
        _classes = {"num_classes": 10} if _name.endswith("_cifar") else {}
        register(_name, partial(build, _config, **_classes))
        register(f"bn_{_name}", partial(build, _config.with_options(norm="bn"), **_classes))
