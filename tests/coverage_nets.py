"""Nets beyond image classifiers, one for each way that norm layers are used there; small enough for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    kwargs: Callable[[], dict[str, Any]] = dict
    residual: bool = False
    """Whether it has residual branches, so that `fixup` and `skipinit` are for it."""


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def stage(before: int, width: int, rank: int = 2, **options: Any) -> nn.Sequential:
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    kept = {"kernel_size": 3, "padding": 1, "bias": False} | options
    return nn.Sequential(conv(before, width, **kept), norm(width), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Transposed convolutions up, concatenated skips."""

    def __init__(self, rank: int = 2, width: int = 8):
        super().__init__()
        up = getattr(nn, f"ConvTranspose{rank}d")
        norm = getattr(nn, f"BatchNorm{rank}d")
        self.down1, self.down2 = stage(2, width, rank), stage(width, 2 * width, rank, stride=2)
        self.bottom = stage(2 * width, 4 * width, rank, stride=2)
        self.up2 = nn.Sequential(up(4 * width, 2 * width, 2, 2, bias=False), norm(2 * width), nn.ReLU())
        self.join2 = stage(4 * width, 2 * width, rank)
        self.up1 = nn.Sequential(up(2 * width, width, 2, 2), norm(width), nn.LeakyReLU(0.1))
        self.join1 = stage(2 * width, width, rank)
        self.out = getattr(nn, f"Conv{rank}d")(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        c = self.bottom(b)
        b = self.join2(torch.cat([self.up2(c), b], 1))
        return self.out(self.join1(torch.cat([self.up1(b), a], 1)))


class ResidualUNet3d(nn.Module):
    """A V-Net: residual stages in three dimensions, added skips."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.stem, self.a1, self.a2 = stage(1, width, 3), stage(width, width, 3), stage(width, width, 3)
        self.down = stage(width, 2 * width, 3, stride=2)
        self.b1, self.b2 = stage(2 * width, 2 * width, 3), stage(2 * width, 2 * width, 3)
        self.up = nn.Sequential(nn.ConvTranspose3d(2 * width, width, 2, 2), nn.BatchNorm3d(width), nn.PReLU())
        self.c1 = stage(width, width, 3)
        self.out = nn.Conv3d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = x + self.a2(self.a1(x))
        b = self.down(a)
        b = b + self.b2(self.b1(b))
        c = self.up(b) + a
        return self.out(c + self.c1(c))


class AudioNet(nn.Module):
    """Dilated 1-D convolutions with residuals over a waveform, pooled to features with a norm layer of their own."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = stage(1, width, 1, kernel_size=9, stride=4, padding=4)
        self.blocks = nn.ModuleList(stage(width, width, 1, dilation=d, padding=d) for d in (1, 2, 4))
        self.head = nn.Sequential(
            nn.Linear(width, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(-1))


def generator() -> nn.Module:
    """DCGAN's generator: a norm layer after every transposed convolution but the last."""
    layers: list[nn.Module] = []
    for before, width, stride, padding in ((20, 32, 1, 0), (32, 16, 2, 1), (16, 8, 2, 1)):
        layers += [
            nn.ConvTranspose2d(before, width, 4, stride, padding, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for before, width in ((8, 16), (16, 32)):
        layers += [
            nn.Conv2d(before, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(32, 1, 4, bias=False), nn.Flatten(), nn.Sigmoid())


class Siamese(nn.Module):
    """One encoder called twice, as in contrastive learning; its projector normalizes features."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.stem = stage(3, width, stride=2)
        self.inner, self.last = stage(width, width), nn.Sequential(*stage(width, width)[:2])
        self.project = nn.Sequential(nn.Linear(width, 16, bias=False), nn.BatchNorm1d(16, affine=False))

    def encode(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.project(torch.relu(x + self.last(self.inner(x))).mean((2, 3)))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(first), self.encode(second)


class Record(nn.Module):
    """Dicts in and out, a keyword input, a keyword-only one, nested lists of features."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.encoder = nn.ModuleDict({"left": stage(3, width), "right": stage(1, width)})
        self.merge = stage(width, width)
        self.scale = nn.Linear(4, width)

    def forward(
        self, batch: dict[str, Tensor], style: Tensor | None = None, *, weight: Tensor
    ) -> dict[str, Any]:
        maps = [self.encoder[key](batch[key]) for key in ("left", "right")]
        x = maps[0] * weight + maps[1]
        if style is not None:
            x = x + self.scale(style)[..., None, None]
        out = self.merge(x)
        return {"features": [*maps, x], "pooled": {"mean": out.mean((2, 3)), "max": out.amax((2, 3))}}


def sync() -> nn.Module:
    net = nn.Sequential(
        stage(3, 8), stage(8, 8, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def split() -> nn.Module:
    net = nn.Sequential(stage(3, 8), nn.Conv2d(8, 8, 3), timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU))
    return timm.layers.convert_splitbn_model(nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 2)


class Auxiliary(nn.Module):
    """A second head that runs in training only."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.body, self.rest = stage(3, width), stage(width, width, stride=2)
        self.aux = nn.Sequential(
            stage(width, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        out = self.head(self.rest(x).mean((2, 3)))
        return (out, self.aux(x)) if self.training else out


class Attentive(nn.Module):
    """A convolutional stem before self-attention with layer norm; one linear with batch norm over tokens."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = nn.Sequential(stage(3, 8, stride=2), stage(8, width, stride=2))
        self.qkv, self.norm = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        self.attention = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = self.qkv(tokens)
        tokens = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        return self.head(self.attention(tokens).mean(1))


def targets(count: int = 2, masks: bool = False) -> list[dict[str, Tensor]]:
    box = torch.tensor([[4.0, 6.0, 40.0, 44.0], [10.0, 8.0, 30.0, 52.0]])
    found = {"boxes": box, "labels": torch.tensor([1, 2])}
    if masks:
        found["masks"] = torch.ones(2, 64, 64, dtype=torch.uint8)
    return [dict(found) for _ in range(count)]


def views(count: int = 2) -> list[Tensor]:
    return [noise(3, 64, 64) * 0.2 + 0.5 for _ in range(count)]


class Body(nn.Module):
    """A small residual backbone of two levels."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 7, 4, 3, bias=False), norm(12), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), norm(12))
        self.layer1 = nn.Sequential(nn.Conv2d(12, 24, 3, 2, 1, bias=False), norm(24), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(24, 24, 3, 2, 1, bias=False), norm(24), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        first = self.layer1(torch.relu(x + self.block(x)))
        return {"0": first, "1": self.layer2(first)}


class Pyramid(nn.Module):
    """torchvision's feature pyramid, with norm layers, over a small body."""

    out_channels = 32

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.body = Body(norm)
        self.fpn = torchvision.ops.FeaturePyramidNetwork([24, 24], self.out_channels, norm_layer=norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(x))


def detector(kind: str, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """torchvision's detectors over a small pyramid: lists of images and, in training, targets."""
    detection = torchvision.models.detection
    backbone, size = Pyramid(norm), {"min_size": 64, "max_size": 64, "num_classes": 3}
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    if kind == "fcos":
        return detection.FCOS(backbone, anchor_generator=anchors, **size)
    if kind == "retinanet":
        head = detection.retinanet.RetinaNetHead(32, 1, 3, norm_layer=nn.BatchNorm2d)
        return detection.RetinaNet(backbone, anchor_generator=anchors, head=head, **size)
    if kind == "ssdlite":
        boxes = detection.anchor_utils.DefaultBoxGenerator([[2], [2]], min_ratio=0.2, max_ratio=0.9)
        head = detection.ssdlite.SSDLiteHead([32, 32], boxes.num_anchors_per_location(), 3, norm)
        return detection.ssd.SSD(backbone, boxes, (64, 64), 3, head=head)
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": detection.rpn.RPNHead(32, 1),
        "box_roi_pool": torchvision.ops.MultiScaleRoIAlign(["0", "1"], 5, 2),
        "box_head": detection.faster_rcnn.FastRCNNConvFCHead((32, 5, 5), [16], [32], norm_layer=norm),
    }
    if kind == "fasterrcnn":
        parts["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(32, 3)
        return detection.FasterRCNN(backbone, **parts, **size | {"num_classes": None})
    parts["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(32, 3)
    parts["mask_roi_pool"] = torchvision.ops.MultiScaleRoIAlign(["0", "1"], 8, 2)
    parts["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(32, [16], 1, norm_layer=norm)
    parts["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(16, 16, 3)
    return detection.MaskRCNN(backbone, **parts, **size | {"num_classes": None})


def repvgg() -> nn.Module:
    """timm's RepVGG blocks, with identity branches that are a norm layer alone."""
    block = timm.models.byobnet.RepVggBlock
    blocks = [block(8, 8), block(8, 16, stride=2), block(16, 16), block(16, 16)]
    stem = stage(3, 8, stride=2)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def shuffle() -> nn.Module:
    block = torchvision.models.shufflenetv2.InvertedResidual
    return nn.Sequential(
        stage(3, 8), block(8, 16, 2), block(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def timm_net(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


def pictures(count: int = 4, size: int = 32, channels: int = 3) -> Callable[[], tuple[Tensor]]:
    return lambda: (noise(count, channels, size, size),)


def record() -> dict[str, Any]:
    return {"batch": {"left": noise(4, 3, 12, 12), "right": noise(4, 1, 12, 12)}, "weight": noise(4, 1, 1, 1)}


SMALL: dict[str, Case] = {
    "unet": Case(UNet, pictures(4, 16, 2)),
    "unet1d": Case(lambda: UNet(1), lambda: (noise(4, 2, 32),)),
    "vnet3d": Case(ResidualUNet3d, lambda: (noise(2, 1, 8, 8, 8),), residual=True),
    "audio": Case(AudioNet, lambda: (noise(4, 1, 256),), residual=True),
    "generator": Case(generator, lambda: (noise(6, 20, 1, 1),)),
    "discriminator": Case(discriminator, pictures(6, 32)),
    "siamese": Case(Siamese, lambda: (noise(8, 3, 16, 16), noise(8, 3, 16, 16).flip(0)), residual=True),
    "record": Case(Record, tuple, record),
    "sync": Case(sync, pictures()),
    "split": Case(split, pictures()),
    "auxiliary": Case(lambda: Auxiliary().eval(), pictures()),
    "attentive": Case(Attentive, pictures()),
    "squeeze": Case(timm_net("test_efficientnet"), pictures(4, 64)),
    "byob": Case(timm_net("test_byobnet"), pictures(4, 64), residual=True),
    "reparameterized": Case(repvgg, pictures(4, 32), residual=True),
    "shuffle": Case(shuffle, pictures(4, 32)),
}
DETECTION: dict[str, Case] = {
    kind: Case(
        lambda kind=kind: detector(kind), lambda kind=kind: (views(), targets(masks=kind == "maskrcnn"))
    )
    for kind in ("fasterrcnn", "maskrcnn", "retinanet", "fcos", "ssdlite")
}


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1 = stage(3, 12, stride=2), stage(12, 24, stride=2)
        self.layer2 = stage(24, 24, dilation=2, padding=2)


def segmenter(kind: str) -> nn.Module:
    """torchvision's segmentation heads over a small body; the auxiliary one too."""
    models = torchvision.models.segmentation
    body = torchvision.models._utils.IntermediateLayerGetter(Plain(), {"layer2": "out", "layer1": "aux"})
    if kind == "fcn":
        return models.FCN(body, models.fcn.FCNHead(24, 5), models.fcn.FCNHead(24, 5))
    return models.DeepLabV3(body, models.deeplabv3.DeepLabHead(24, 5, (2, 4)), None)
