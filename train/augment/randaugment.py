"""RandAugment on the device, keyed per sample, one call per drawn operation and sign."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nfnets.errors import UserError
from nfnets.train.keyed import bernoulli, integers, key

# torchvision's set; those from the middle on take no sign.
SIGNED = (
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
)
UNSIGNED = ("Identity", "Posterize", "Solarize", "AutoContrast", "Equalize")
OPERATIONS = SIGNED + UNSIGNED


class RandAugment:
    """`layers` operations one after the other, each drawn evenly from 14, at one strength.

    At magnitude m, in tenths: shear by 0.3 · m/10, translate by 150/331 · m/10 of the side, rotate by 30° · m/10,
    enhance brightness, color, contrast and sharpness by the factor 1 ± 0.9 · m/10, each sign with probability ½;
    keep 8 − round(4 · m/10) bits; invert pixels from 255 · (1 − m/10) on. Identity, autocontrast and equalize have
    no strength. What is moved in from outside is black; values between pixels are bilinear.

    Args:
        layers: operations per image.
        magnitude: m; 10 is full, NFNets use 5 to 15.
        seed: the run's seed.

    Example:
        >>> augment = RandAugment(2, 9, seed=0)
        >>> images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
        >>> together = augment(images, torch.arange(5), epoch=1)
        >>> bool((augment(images[3:4], torch.tensor([3]), epoch=1)[0] == together[3]).all())
        True

    Paper: arXiv 1909.13719. Checked against torchvision's `RandAugment`, whose bin b of 31 is magnitude b/3.
    """

    def __init__(self, layers: int, magnitude: float, seed: int) -> None:
        self.layers, self.magnitude, self.seed = layers, magnitude, seed

    def __call__(self, images: Tensor, draw: Tensor, epoch: int) -> Tensor:
        """The augmented images.

        Args:
            images: uint8, N × C × H × W with 1 or 3 channels.
            draw: int64, N: what keys each image's draws, its sample index.
            epoch: keys the draws too.

        Returns:
            uint8, of the same shape; a new tensor.

        Raises:
            UserError: for images of other than 1 or 3 channels.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(
                f"RandAugment of {images.shape[1]} channels: expected 1 or 3; set randaugment_layers=0"
            )
        for layer in range(self.layers):
            operation, negative = self.drawn(draw, epoch, layer)
            code = 2 * operation + negative
            order = torch.argsort(code, stable=True)
            counts = torch.bincount(code, minlength=2 * len(OPERATIONS)).tolist()  # the layer's one wait
            groups = []
            for at, group in enumerate(images[order].split(counts)):
                if len(group):
                    groups.append(apply(OPERATIONS[at // 2], group, self.magnitude, negative=at % 2 == 1))
            images = torch.empty_like(images)
            images[order] = torch.cat(groups)
        return images

    def drawn(self, draw: Tensor, epoch: int, layer: int) -> tuple[Tensor, Tensor]:
        """Every image's operation, as a place in `OPERATIONS`, and whether its strength is negative."""
        operation = integers(key(self.seed, "randaugment", epoch, layer), draw, len(OPERATIONS))
        negative = bernoulli(key(self.seed, "randaugment-sign", epoch, layer), draw, 0.5)
        return operation, negative & (operation < len(SIGNED))


def apply(operation: str, images: Tensor, magnitude: float, *, negative: bool = False) -> Tensor:
    """One operation on uint8 images, N × C × H × W; see `RandAugment`.

    Example:
        >>> apply("Solarize", torch.tensor([[[[10, 250]]]], dtype=torch.uint8), 5.0)
        tensor([[[[10,  5]]]], dtype=torch.uint8)
    """
    from torchvision.transforms.v2 import functional as F  # seconds of imports

    share = magnitude / 10
    sign = -1.0 if negative else 1.0
    height, width = images.shape[2:]
    enhance = max(0.0, 1.0 + sign * 0.9 * share)
    if operation in ("ShearX", "ShearY"):
        angle = math.degrees(math.atan(sign * 0.3 * share))
        return _affine(images, shear=[angle, 0.0] if operation == "ShearX" else [0.0, angle], center=[0, 0])
    if operation == "TranslateX":
        return _affine(images, translate=[int(sign * share * width * 150 / 331), 0])
    if operation == "TranslateY":
        return _affine(images, translate=[0, int(sign * share * height * 150 / 331)])
    if operation == "Rotate":
        return F.rotate(images, sign * 30.0 * share, interpolation=F.InterpolationMode.BILINEAR)
    if operation == "Brightness":
        return F.adjust_brightness(images, enhance)
    if operation == "Color":
        return F.adjust_saturation(images, enhance)
    if operation == "Contrast":
        return _contrast(images, enhance)
    if operation == "Sharpness":
        return F.adjust_sharpness(images, enhance)
    if operation == "Posterize":
        return F.posterize(images, max(1, 8 - round(4 * share)))
    if operation == "Solarize":
        return F.solarize(images, 255.0 * max(0.0, 1.0 - share))
    if operation == "AutoContrast":
        return F.autocontrast(images)
    if operation == "Equalize":
        return F.equalize(images)
    return images


def _affine(images: Tensor, **changed: Any) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    still: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return F.affine(images, **{**still, **changed}, interpolation=F.InterpolationMode.BILINEAR)


def _contrast(images: Tensor, factor: float) -> Tensor:
    """Blend with the mean gray; summed as integers, since float sums may differ with the number of images."""
    if images.shape[1] == 3:
        from torchvision.transforms.v2 import functional as F

        gray = F.rgb_to_grayscale(images.float()).floor_()
    else:
        gray = images
    mean = gray.long().sum((1, 2, 3), keepdim=True).double() / gray[0].numel()
    blend = images * factor + mean.float() * (1.0 - factor)
    return blend.clamp_(0, 255).to(torch.uint8)
