"""Libraries of nets for medical images, volumes and video, small."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.zoo.others import library
from benchmarks.zoo.others.net import Net

_GRAY = ((1, 64, 64),)
_VOLUME = ((1, 16, 16, 16), (1, 32, 32, 32), (1, 64, 64, 64))


@library
def monai() -> Iterator[Net]:
    """Its nets with `norm="batch"` where they take one."""
    from monai.networks import nets

    plain = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    stages = {"channels": (8, 16, 32), "strides": (2, 2)}
    deep = {"channels": (8, 16, 32), "strides": (2, 2, 2)}
    batch = {"norm": "batch"}
    small = {
        "kernel_size": (3, 3, 3),
        "strides": (1, 2, 2),
        "upsample_kernel_size": (2, 2),
        "filters": (8, 16, 32),
    }
    dense = {"init_features": 16, "growth_rate": 8, "block_config": (2, 2, 2)}
    unet = {"features": (8, 8, 16, 16, 32, 8)} | batch
    residual = {"spatial_dims": 2, "n_input_channels": 1, "block_inplanes": [8, 16, 24, 32], "num_classes": 5}
    levels = {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8}
    whole: dict[str, Callable[[], nn.Module]] = {
        "AHNet": lambda: nets.AHNet(**plain, layers=(1, 1, 1, 1), psp_block_num=0),
        "AttentionUnet": lambda: nets.AttentionUnet(**plain, **stages),
        "AutoEncoder": lambda: nets.AutoEncoder(**plain, **deep, **batch, num_res_units=2),
        "BasicUNet": lambda: nets.BasicUNet(**plain, **unet),
        "BasicUNetPlusPlus": lambda: nets.BasicUNetPlusPlus(**plain, **unet),
        "DenseNet": lambda: nets.DenseNet(**plain, **dense),
        "DynUNet": lambda: nets.DynUNet(**plain, **small, norm_name="batch"),
        "DynUNet-residual": lambda: nets.DynUNet(**plain, **small, norm_name="batch", res_block=True),
        "DynUNet-supervised": lambda: nets.DynUNet(
            **plain, **small, norm_name="batch", deep_supervision=True
        ),
        "EfficientNetBN": lambda: nets.EfficientNetBN("efficientnet-b0", False, in_channels=1, num_classes=5),
        "FlexibleUNet": lambda: nets.FlexibleUNet(1, 2, "resnet18", decoder_channels=(32, 16, 16, 8, 8)),
        "HighResNet": lambda: nets.HighResNet(**plain),
        "LocalNet": lambda: nets.LocalNet(**levels, extract_levels=(0, 1, 2), out_channels=2),
        "GlobalNet": lambda: nets.GlobalNet([64, 64], **levels, depth=3),
        "RegUNet": lambda: nets.RegUNet(**levels, depth=3, out_channels=2),
        "ResNet-basic": lambda: nets.ResNet("basic", [1, 1, 1, 1], **residual),
        "ResNet-bottleneck": lambda: nets.ResNet("bottleneck", [1, 1, 1, 1], **residual),
        "SEResNet50": lambda: nets.SEResNet50(spatial_dims=2, in_channels=1, num_classes=5),
        "SegResNet": lambda: nets.SegResNet(**plain, **batch),
        "SegResNetDS": lambda: nets.SegResNetDS(**plain, **batch, init_filters=8),
        "UNet": lambda: nets.UNet(**plain, **stages, **batch),
        "UNet-residual": lambda: nets.UNet(**plain, **stages, **batch, num_res_units=2),
        "VNet": lambda: nets.VNet(**plain, dropout_dim=2),
        "VarAutoEncoder": lambda: nets.VarAutoEncoder(2, (1, 64, 64), 1, 8, **deep, **batch),
        "Discriminator": lambda: nets.Discriminator((1, 64, 64), (8, 16, 32), (2, 2, 2), norm="batch"),
        "Classifier": lambda: nets.Classifier((1, 64, 64), 5, (8, 16, 32), (2, 2, 2), norm="batch"),
        "Regressor": lambda: nets.Regressor((1, 64, 64), (3,), (8, 16, 32), (2, 2, 2), norm="batch"),
    }
    for name, build in whole.items():
        yield Net(name, build, _GRAY, "medical")
    solid = plain | {"spatial_dims": 3}
    volumes: dict[str, Callable[[], nn.Module]] = {
        "UNet-3D": lambda: nets.UNet(**solid, **stages, **batch, num_res_units=2),
        "DenseNet-3D": lambda: nets.DenseNet(**solid, **dense),
        "SegResNet-3D": lambda: nets.SegResNet(**solid, **batch),
        "ResNet-3D": lambda: nets.ResNet("basic", [1, 1, 1, 1], **residual | {"spatial_dims": 3}),
        "DynUNet-3D": lambda: nets.DynUNet(**solid, **small, norm_name="batch"),
        "HighResNet-3D": lambda: nets.HighResNet(**solid),
        "DAF3D": lambda: nets.DAF3D(1, 2),
    }
    for name, build in volumes.items():
        yield Net(name, build, _VOLUME, "volume")
    yield Net("HoVerNet", lambda: nets.HoVerNet("fast", out_classes=3), ((3, 256, 256),), "medical")
    yield Net("TorchVisionFCModel", lambda: nets.TorchVisionFCModel("resnet18", 5, pool=None), kind="medical")
    start = {"latent_shape": (32,), "start_shape": (16, 4, 4), "norm": "batch"}
    yield Net(
        "Generator", lambda: nets.Generator(**start, channels=(16, 8), strides=(2, 2)), ((32,),), "generation"
    )


@library
def dynamic_network_architectures() -> Iterator[Net]:
    """nnU-Net's."""
    from dynamic_network_architectures.architectures.unet import (
        PlainConvUNet,
        ResidualEncoderUNet,
        ResidualUNet,
    )

    for conv, norm, shapes in ((nn.Conv2d, nn.BatchNorm2d, _GRAY), (nn.Conv3d, nn.BatchNorm3d, _VOLUME)):
        given: dict[str, Any] = {"input_channels": 1, "n_stages": 3, "features_per_stage": (8, 16, 32)}
        given |= {
            "conv_op": conv,
            "kernel_sizes": 3,
            "strides": (1, 2, 2),
            "num_classes": 2,
            "conv_bias": True,
        }
        given |= {"norm_op": norm, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
        given |= {"n_conv_per_stage_decoder": (2, 2)}
        for cls, count in (
            (PlainConvUNet, "n_conv_per_stage"),
            (ResidualEncoderUNet, "n_blocks_per_stage"),
            (ResidualUNet, "n_blocks_per_stage"),
        ):
            build = functools.partial(cls, **given, **{count: (2, 2, 2)})
            yield Net(f"{cls.__name__}-{'3D' if conv is nn.Conv3d else '2D'}", build, shapes, "medical")


@library
def torchxrayvision() -> Iterator[Net]:
    """Chest X-rays."""
    from torchxrayvision.models import DenseNet

    given = {"growth_rate": 8, "block_config": (2, 2, 2, 2), "num_init_features": 16}
    yield Net("DenseNet", functools.partial(DenseNet, weights=None, **given), _GRAY, "medical")
