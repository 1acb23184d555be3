"""Libraries of image nets: classification, segmentation, local features, generation."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.zoo.others import library
from benchmarks.zoo.others.net import Net

_PYTORCHCV = """
airnet50_1x64d_r16 airnext50_32x4d_r2 bagnet9 bam_resnet18 bn_vgg11b bninception cbam_resnet18 channelnet
condensenet74_c4_g4 darknet_tiny darknet19 darts densenet121 diapreresnet10 diaresnet10 dicenet_wd5 dicenet_w1
dla46c dla34 drnc26 drnd22 efficientnet_b0 efficientnet_b0b efficientnet_edge_small_b
espnetv2_wd2 espnetv2_w1 fbnet_cb fdmobilenet_wd4 fdmobilenet_w1 fishnet99 ghostnet hardnet39ds
hrnet_w18_small_v1 ibn_resnet50 ibnb_resnet50 ibn_densenet121 igcv3_wd4 igcv3_w1 inceptionresnetv1 inceptionv3
inceptionv4 irevnet301 isqrtcovresnet18 menet108_8x1_g3 menet228_12x1_g3 mixnet_s mnasnet_small mnasnet_b1
mobilenet_wd4 mobilenet_w1 mobilenetb_wd4 mobilenetv2_wd4 mobilenetv2_w1 mobilenetv2b_wd4
mobilenetv3_small_wd2 mobilenetv3_large_w7d20 msdnet22 nasnet_4a1056 octresnet10_ad2 peleenet preresnet10
preresnet18_wd4 preresnetbc14b proxylessnas_cpu proxylessnas_mobile regnetx002 regnety002 resattnet56
resnesta18 resnet10 resnet18_wd4 resneta10 resnetbc14b resnetd50b resnext14_16x4d scnet50 selecsls42 senet16
sepreresnet10 seresnet10 shufflenet_g1_wd4 shufflenet_g8_w1 shufflenetv2_wd2 shufflenetv2b_wd2 sharesnet18
spnasnet sknet50 sparsenet121 sqnxt23_w1 sqnxt23v5_w1 tresnet_m vovnet27s xception
"""
_CIFAR = """
densenet40_k12_bc_cifar10 diapreresnet20_cifar10 diaresnet20_cifar10 fractalnet_cifar10
preresnet20_cifar10 pyramidnet110_a48_cifar10 resdropresnet20_cifar10 resnet20_cifar10 resnext20_16x4d_cifar10
rir_cifar10 ror3_56_cifar10 sepreresnet20_cifar10 seresnet20_cifar10 shakedropresnet20_cifar10
shakeshakeresnet20_2x16d_cifar10 wrn16_10_cifar10 wrn20_10_1bit_cifar10 wrn20_10_32bit_cifar10
xdensenet40_2_k24_bc_cifar10 msdnet22_cifar10
"""
_SEGMENTATION = """
bisenet_resnet18_celebamaskhq cgnet_cityscapes ctxnet_cityscapes dabnet_cityscapes danet_resnetd50b_cityscapes
deeplabv3_resnetd50b_voc edanet_cityscapes enet_cityscapes erfnet_cityscapes esnet_cityscapes
espcnet_cityscapes fastscnn_cityscapes fcn8sd_resnetd50b_voc fpenet_cityscapes icnet_resnetd50b_cityscapes
lednet_cityscapes linknet_cityscapes pspnet_resnetd50b_voc segnet_cityscapes sinet_cityscapes
unet_cityscapes
"""
_POSE = """
simplepose_resnet18_coco simplepose_mobile_mobilenet_w1_coco simplepose_mobile_mobilenetv3_small_w1_coco
alphapose_fastseresnet101b_coco ibppose_coco lwopenpose2d_mobilenet_cmupan_coco centernet_resnet18_voc
"""


@library
def pytorchcv() -> Iterator[Net]:
    """One or two of each of its families, the smallest."""
    from pytorchcv.model_provider import get_model

    for name in _PYTORCHCV.split():
        yield Net(name, functools.partial(get_model, name, pretrained=False))
    for name in _CIFAR.split():
        yield Net(name, functools.partial(get_model, name, pretrained=False), ((3, 32, 32),))
    for name in _SEGMENTATION.split():
        side = 128 if name == "sinet_cityscapes" else 64
        build = functools.partial(get_model, name, pretrained=False, in_size=(side, side))
        yield Net(name, build, ((3, side, side),), "segmentation")
    for name in _POSE.split():
        build = functools.partial(get_model, name, pretrained=False)
        yield Net(name, build, ((3, 64, 64), (3, 128, 128), (3, 256, 192), (3, 256, 256)), "pose")


def _classes(module: str, names: str, **kwargs: Any) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    found = importlib.import_module(module)
    for name in names.split():
        yield name, functools.partial(getattr(found, name), **kwargs)


_SMP_ENCODERS = """
resnet18 resnext50_32x4d timm-resnest14d timm-regnetx_002 timm-res2net50_26w_4s se_resnet50 densenet121
efficientnet-b0 timm-efficientnet-b0 timm-mobilenetv3_small_075 mobilenet_v2 dpn68 vgg11_bn xception
inceptionv4 mobileone_s0 timm-gernet_s timm-skresnet18 tu-resnet10t mit_b0
"""
_SMP = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer"


@library
def segmentation_models_pytorch() -> Iterator[Net]:
    """Every decoder on a ResNet, U-Net on every encoder's smallest."""
    sizes = tuple((3, side, side) for side in (64, 128, 256))
    given = {"encoder_weights": None, "classes": 2}
    for name, build in _classes("segmentation_models_pytorch", _SMP, encoder_name="resnet18", **given):
        yield Net(f"{name}-resnet18", build, sizes, "segmentation", family=name.lower())
    for encoder in _SMP_ENCODERS.split()[1:]:
        for name, build in _classes("segmentation_models_pytorch", "Unet", encoder_name=encoder, **given):
            yield Net(f"{name}-{encoder}", build, sizes, "segmentation", family=name.lower())


@library
def pretrainedmodels() -> Iterator[Net]:
    """Cadene's, the smaller ones."""
    names = "bninception dpn68 fbresnet152 nasnetamobile resnet18 se_resnet50 se_resnext50_32x4d xception densenet121"
    for name, build in _classes("pretrainedmodels", names, num_classes=1000, pretrained=None):
        yield Net(name, build)


@library
def efficientnet_pytorch() -> Iterator[Net]:
    """The first three sizes."""
    from efficientnet_pytorch import EfficientNet

    for name in ("efficientnet-b0", "efficientnet-b1", "efficientnet-b2"):
        yield Net(name, functools.partial(EfficientNet.from_name, name))


@library
def resnest() -> Iterator[Net]:
    """Split-attention nets."""
    names = "resnest50 resnest50_fast_1s1x64d resnest50_fast_2s1x64d resnest50_fast_4s2x40d"
    for name, build in _classes("resnest.torch", names, pretrained=False):
        yield Net(name, build)


@library
def facenet_pytorch() -> Iterator[Net]:
    """Face recognition."""
    from facenet_pytorch import InceptionResnetV1

    build = functools.partial(InceptionResnetV1, classify=True, num_classes=10)
    yield Net("InceptionResnetV1", build, ((3, 96, 96), (3, 128, 128), (3, 160, 160)))


@library
def open_clip() -> Iterator[Net]:
    """The image tower of CLIP's ResNets."""
    from open_clip.modified_resnet import ModifiedResNet

    for name, layers, width in (
        ("RN14", (1, 1, 1, 1), 16),
        ("RN26", (2, 2, 2, 2), 32),
        ("RN50", (3, 4, 6, 3), 64),
    ):
        yield Net(name, functools.partial(ModifiedResNet, layers, 128, heads=4, image_size=64, width=width))


@library
def vit_pytorch() -> Iterator[Net]:
    """Transformers with convolutions."""
    from vit_pytorch.cvt import CvT
    from vit_pytorch.levit import LeViT
    from vit_pytorch.max_vit import MaxViT
    from vit_pytorch.mobile_vit import MobileViT
    from vit_pytorch.xcit import XCiT

    stages = {}
    for n, width in ((1, 16), (2, 32), (3, 48)):
        stages |= {f"s{n}_emb_dim": width, f"s{n}_heads": n, f"s{n}_depth": n, f"s{n}_mlp_mult": 2}
    yield Net("CvT", functools.partial(CvT, num_classes=10, **stages))
    levit = {
        "num_classes": 10,
        "stages": 3,
        "dim": (32, 48, 64),
        "depth": 2,
        "heads": (2, 3, 4),
        "mlp_mult": 2,
    }
    yield Net("LeViT", functools.partial(LeViT, image_size=64, **levit))
    maxvit = {"dim_conv_stem": 16, "dim": 16, "dim_head": 8, "depth": (1, 1), "window_size": 4}
    yield Net("MaxViT", functools.partial(MaxViT, num_classes=10, **maxvit))
    mobile = {"dims": [48, 64, 80], "channels": [16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 128]}
    yield Net("MobileViT", functools.partial(MobileViT, image_size=(64, 64), num_classes=10, **mobile))
    xcit = {"dim": 48, "depth": 2, "cls_depth": 1, "heads": 4, "mlp_dim": 96}
    yield Net("XCiT", functools.partial(XCiT, image_size=64, patch_size=16, num_classes=10, **xcit))


@library
def unet() -> Iterator[Net]:
    """U-Nets for images and volumes."""
    from unet import UNet2D, UNet3D

    given = {"in_channels": 3, "out_classes": 2, "normalization": "batch", "padding": True}
    given |= {"num_encoding_blocks": 3, "out_channels_first_layer": 8}
    for residual in (False, True):
        suffix = "-residual" if residual else ""
        build = functools.partial(UNet2D, residual=residual, **given)
        yield Net(f"UNet2D{suffix}", build, kind="segmentation")
        build = functools.partial(UNet3D, residual=residual, **given)
        yield Net(f"UNet3D{suffix}", build, ((3, 16, 16, 16), (3, 32, 32, 32)), "volume")


@library
def torchgan() -> Iterator[Net]:
    """Discriminators and encoders."""
    from torchgan.models import AutoEncodingDiscriminator, DCGANDiscriminator, DCGANGenerator

    yield Net(
        "DCGANDiscriminator",
        functools.partial(DCGANDiscriminator, in_size=32, step_channels=16),
        ((3, 32, 32),),
    )
    build = functools.partial(AutoEncodingDiscriminator, in_size=32, step_channels=16)
    yield Net("AutoEncodingDiscriminator", build, ((3, 32, 32),), "generation")
    build = functools.partial(DCGANGenerator, encoding_dims=32, out_size=32, step_channels=16)
    yield Net("DCGANGenerator", build, ((32,),), "generation")


@library
def kornia() -> Iterator[Net]:
    """Local features, edges, matching, small classifiers."""
    patches, gray = ((1, 32, 32),), ((1, 64, 64), (1, 128, 128))
    features = _classes(
        "kornia.feature", "HardNet HardNet8 HyNet SOSNet TFeat OriNet KeyNet DeFMO", pretrained=False
    )
    for name, build in features:
        shapes = {"KeyNet": gray, "DeFMO": ((6, 64, 64),)}.get(name, patches)
        yield Net(name, build, shapes, "features")
    from kornia.feature.loftr.backbone import build_backbone
    from kornia.feature.loftr.loftr import default_cfg
    from kornia.feature.sold2.backbones import HourglassBackbone
    from kornia.models.dexined import DexiNed
    from kornia.models.efficient_vit.backbone import efficientvit_backbone_b0
    from kornia.models.tiny_vit import TinyViT
    from kornia.models.vit_mobile import MobileViT

    yield Net("LoFTR-backbone", functools.partial(build_backbone, default_cfg), gray, "features")
    yield Net("SOLD2-hourglass", functools.partial(HourglassBackbone, 1, 4, 1, 1, 5), gray, "features")
    yield Net("DexiNed", functools.partial(DexiNed, pretrained=False), kind="edges")
    yield Net("EfficientViT-b0", efficientvit_backbone_b0)
    yield Net("TinyViT-5m", functools.partial(TinyViT.from_config, "5m", img_size=64, num_classes=10))
    for mode in ("xxs", "xs"):
        yield Net(f"MobileViT-{mode}", functools.partial(MobileViT, mode=mode))
