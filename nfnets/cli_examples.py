"""A model by name together with images that it takes, for the commands that look at a model and train nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.keyed import seeded
from nfnets.train.loop.arm import first_images
from nfnets.train.models import build

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Example:
    """A model in training mode, float images (batch, C, H, W) that it takes, and its number of outputs."""

    model: nn.Module
    images: Tensor
    num_classes: int


def parse_shape(text: str) -> Shape:
    """An image shape from text.

    Args:
        text: channels × height × width, as "3x224x224".

    Returns:
        The three numbers.

    Raises:
        UserError: it is not three positive numbers, or the images are not square.

    Example:
        >>> parse_shape("1x28x28")
        (1, 28, 28)
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"input {text!r}: expected CHANNELSxHEIGHTxWIDTH, such as 3x224x224")
    channels, height, width = (int(part) for part in parts)
    if height != width:
        raise UserError(f"input {text!r}: expected square images, such as {channels}x{height}x{height}")
    return channels, height, width


def default_shape(spec: str) -> Shape:
    """The image shape that a model was made for: timm's own, 299 for Inception v3, 32 for CIFAR nets, else 224."""
    family, _, name = spec.partition(":")
    if family == "timm":
        import timm

        if timm.is_model(name) and (config := timm.models.get_pretrained_cfg(name)) is not None:
            channels, height, _ = config.input_size
            return channels, height, height
    if "cifar" in spec:
        return 3, 32, 32
    return (3, 299, 299) if spec == "torchvision:inception_v3" else (3, 224, 224)


def example(
    spec: str,
    *,
    shape: Shape | None = None,
    batch: int = 16,
    num_classes: int | None = None,
    data: str | None = None,
    data_dir: Path | None = None,
    seed: int = 0,
) -> Example:
    """A model with fresh weights, and a batch for it.

    Args:
        spec: As for `build`.
        shape: Channels, height and width of the images; by default what the model was made for.
        batch: Number of images.
        num_classes: Outputs; by default those of the data set, 10 for CIFAR nets, 1000 otherwise.
        data: A data set whose training images to take; standard normal noise without one.
        data_dir: Where its files lie.
        seed: Of weights and images.

    Returns:
        An `Example`.

    Raises:
        UserError: an unknown model, a data set that is not there, a shape that the model rejects.
    """
    if data is not None:
        config = RunConfig.create(
            model=spec, data=data, data_dir=data_dir, batch_size=batch, seed=seed, augment="none"
        )
        loaded = load(config)
        images = first_images(config, loaded)
        channels, size = loaded.channels, loaded.size
        classes = loaded.num_classes if num_classes is None else num_classes
    else:
        channels, size, _ = shape or default_shape(spec)
        images = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))
        classes = (10 if "cifar" in spec else 1000) if num_classes is None else num_classes
    with seeded(seed, "init"):
        model = build(spec, num_classes=classes, channels=channels, size=size)
    return Example(model, images, classes)
