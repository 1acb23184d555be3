"""What a run starts from: the configured model, initialized by key and converted, and its first batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.advice import conversion_options
from nfnets.errors import UserError
from nfnets.parameter_groups import freeze_weights_
from nfnets.train.augment.pipeline import augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.keyed import seeded
from nfnets.train.loop.order import Batches
from nfnets.train.models import build, check_output, drop_options, start_from

# A batch of 4 images says little of what a layer puts out: MobileNetV2 at batch 4 ends 3 points lower if constants are
# measured on these (docs/experiments.md).
MEASURED = 64


def arm_model(config: RunConfig, data: Data, images: Tensor | None = None) -> nn.Module:
    """The configured model, initialized by key and converted by the configured method, on the CPU.

    Every arm of a seed starts from the same raw weights; the conversion draws from a stream of its own.

    Args:
        config: `model`, `model_options`, `init_from`, `method`, `method_options`, `train` and `seed` are read.
        data: gives the number of classes and the images' shape.
        images: what the conversion measures on; by default the run's first batches, as many as make 64 images.

    Returns:
        The module to train.

    Raises:
        UserError: for an unknown model or method, or a model that the method cannot convert.

    Example:
        >>> from nfnets.train.data import load
        >>> config = RunConfig.create(model="bn_resnet8_cifar", method="nf")
        >>> any(isinstance(m, nn.BatchNorm2d) for m in arm_model(config, load(config)).modules())
        False
    """
    model = converted(original(config, data), config, data, images)
    return freeze_weights_(model) if config.train == "affine" else model


def original(config: RunConfig, data: Data) -> nn.Module:
    """The arm's model before conversion."""
    with seeded(config.seed, "init"):
        model = build(
            config.model,
            num_classes=data.num_classes,
            channels=data.channels,
            size=data.size,
            options=config.model_options | drop_options(config),
        )
    if config.init_from is not None:
        start_from(model, config.init_from)
    return model


def converted(model: nn.Module, config: RunConfig, data: Data, images: Tensor | None = None) -> nn.Module:
    """What the configured method makes of the arm's original, which stays as it is; with method "bn" itself."""
    if config.method == "bn":
        if config.method_options:
            raise UserError(f"method_options={config.method_options}: method 'bn' leaves the model alone")
        return model
    from nfnets.convert import convert

    if images is None:
        images = first_images(config, data, MEASURED)
    images = images.cpu()
    check_output(model, images, data.num_classes, config.model)  # so that it is the setting that is blamed
    options: dict[str, Any] = conversion_options(config.method, config.batch_size) | config.method_options
    with seeded(config.seed, "convert"):
        return convert(model, images, method=config.method, **options)


def first_images(config: RunConfig, data: Data, at_least: int = 1) -> Tensor:
    """The run's first augmented and normalized training batches, as many as make `at_least` images of one epoch."""
    batches = Batches(data, config, augmenter(data, config))
    steps = min(math.ceil(at_least / config.batch_size), batches.per_epoch)
    return torch.cat([batch.images for batch in batches.from_step(0, steps)])
