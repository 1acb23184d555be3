"""A model by name together with inputs that it takes, for the commands that look at a model and train nothing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nfnets.convert import convert
from nfnets.convert.example import completed
from nfnets.convert.example import example as listed
from nfnets.errors import UserError
from nfnets.init import Comparison, compare, initialize
from nfnets.init.comparison import METHODS
from nfnets.scale.report import Report
from nfnets.signal import SignalReport, profile
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.inputs import Described, Inputs, Shape, channels_and_size, described, noise
from nfnets.train.keyed import seeded
from nfnets.train.loop.arm import first_images
from nfnets.train.models import build, outputs_of
from nfnets.train.saved_models import Recipe


@dataclass(frozen=True)
class ModelAndInputs:
    """A model in training mode with float inputs that it takes, and what a recipe says of both."""

    model: nn.Module
    inputs: Inputs
    described: list[Described]
    num_classes: int | None
    """Outputs that were asked for; None where a builder of the user's own chose them."""

    def recipe(
        self, spec: str, method: str, options: dict[str, Any], seed: int, batch_size: int | None = None
    ) -> Recipe:
        """How to rebuild the model, converted by this method."""
        channels, size = channels_and_size(self.described)
        texts = [str(each) for each in self.described]
        images = [f"{channels}x{size}x{size}"]
        return Recipe(
            spec,
            method,
            options,
            num_classes=self.num_classes,
            channels=channels,
            size=size,
            seed=seed,
            inputs=[] if texts == images else texts,
            batch_size=batch_size,
        )


def default_shape(spec: str) -> Shape:
    """The images that a model was made for: timm's own, 299 for Inception v3, 32 for CIFAR nets, else 224."""
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
    inputs: list[str] | None = None,
    batch: int = 16,
    num_classes: int | None = None,
    data: str | None = None,
    data_dir: Path | None = None,
    seed: int = 0,
) -> ModelAndInputs:
    """A model with fresh weights, and a batch for it.

    Args:
        spec: As for `build`.
        inputs: Shapes as for `described`; by default images that the model was made for.
        batch: Number of samples.
        num_classes: Outputs; by default those of the data set, 10 for CIFAR nets, 1000 otherwise; a builder of the
            user's own keeps its default if it has one.
        data: A data set whose training images to take; standard normal noise without one.
        data_dir: Where its files lie.
        seed: Of weights and noise.

    Returns:
        An `ModelAndInputs`.

    Raises:
        UserError: an unknown model, a data set that is not there, shapes that are none, or both of them.
    """
    usual = 10 if "cifar" in spec else 1000
    if data is not None:
        if inputs:
            raise UserError(
                f"input {inputs[0]} and data {data}: the data's images are the input; pass one of both"
            )
        config = RunConfig.create(
            model=spec, data=data, data_dir=data_dir, batch_size=batch, seed=seed, augment="none"
        )
        loaded = load(config)
        usual = loaded.num_classes
        given = Inputs((first_images(config, loaded),), {})
        shapes = [Described((loaded.channels, loaded.size, loaded.size))]
    else:
        shapes = described(inputs) if inputs else [Described(default_shape(spec))]
        given = noise(shapes, batch, seed)
    channels, size = channels_and_size(shapes)
    classes = outputs_of(spec, num_classes, usual)
    with seeded(seed, "init"):
        model = build(spec, num_classes=classes, channels=channels, size=size)
    return ModelAndInputs(model, given, shapes, classes)


def converted(example: ModelAndInputs, method: str) -> nn.Module:
    """The example's model by this method, as it is by default."""
    args, kwargs = example.inputs
    return convert(example.model, *args, method=method, kwargs=kwargs)


def measured(models: dict[str, nn.Module], inputs: Inputs, backward: bool) -> SignalReport:
    """`nfnets.signal.profile` of models that take the same inputs, some of them by keyword."""
    given = listed(inputs.args, inputs.kwargs)
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(completed(model, given))
        return profile(models, *given.listed, backward=backward)


def started(example: ModelAndInputs, method: str, options: dict[str, Any], seed: int) -> Report:
    """The example's model, initialized; its weights are drawn from the seed."""
    args, kwargs = example.inputs
    with seeded(seed, "init"):
        return initialize(example.model, *args, method=method, kwargs=kwargs, **options)


def starts(example: ModelAndInputs, methods: list[str] | None, seed: int) -> Comparison:
    """Copies of the example's model, started in several ways."""
    args, kwargs = example.inputs
    if kwargs:
        raise UserError("comparing starts takes inputs by position only: pass --input without names")
    return compare(example.model, *args, methods=METHODS if methods is None else methods, seed=seed)
