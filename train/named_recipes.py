"""Published training recipes by name, every value with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from nfnets.errors import unknown
from nfnets.train import method_defaults
from nfnets.train.config import RunConfig

_BASE = "deepmind-research nfnets/experiment.py, get_config"
_NFNETS = "deepmind-research nfnets/experiment_nfnets.py, get_config"
_NF_PAPER = "arXiv 2102.06171 §5"
_FIXUP_CIFAR = "hongyi-zhang/Fixup cifar/cifar_train.py"
_FIXUP_IMAGENET = "hongyi-zhang/Fixup imagenet/imagenet_train.py"
_RESNET = "arXiv 1512.03385 §4.2"


@dataclass(frozen=True)
class Value:
    """One setting of a recipe."""

    value: Any
    source: str
    note: str = ""
    """Where ours departs from the source, and why."""


@dataclass(frozen=True)
class NamedRecipe:
    """A published way to train.

    `lr` stands for `lr_images` images per step and scales with the batch size; epochs of the schedule (warm-up,
    falls) keep their share of the run where its length is changed.
    """

    name: str
    about: str
    lr_images: int
    values: dict[str, Value]

    def fields(self, batch_size: int | None = None, epochs: int | None = None) -> dict[str, Any]:
        """The `RunConfig` fields, at another batch size or length where one is given.

        Example:
            >>> found = recipe("nfnet").fields(batch_size=1024, epochs=72)
            >>> found["lr"], found["warmup_epochs"], found["clipping"]
            (0.4, 1.0, 0.01)
        """
        fields = {name: value.value for name, value in self.values.items()}
        batch_size = batch_size or fields["batch_size"]
        epochs = epochs or fields["epochs"]
        share = epochs / fields["epochs"]
        fields["lr"] = float(f"{fields['lr'] * batch_size / self.lr_images:.6g}")
        for name in ("warmup_epochs", "decay_epochs"):
            if name in fields:
                given = fields[name]
                fields[name] = tuple(e * share for e in given) if isinstance(given, tuple) else given * share
        return fields | {"batch_size": batch_size, "epochs": epochs}


def recipe(name: str) -> NamedRecipe:
    """The recipe of this name.

    Raises:
        UserError: for an unknown one, with near matches.

    Example:
        >>> recipe("fixup-cifar").values["mixup"].value
        1.0
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def run_config(
    name: str | None, flags: dict[str, tuple[Any, bool]], settings: dict[str, Any] | None = None
) -> RunConfig:
    """A run's configuration: what is not given comes from the recipe, then from the method, then from a default.

    Args:
        name: a recipe's, or None.
        flags: `RunConfig` fields, each with whether it was given (else it is a default, and the recipe wins).
        settings: further fields that were given.

    Returns:
        The configuration. A batch size or a length that is given scales the recipe's rate and schedule.

    Raises:
        UserError: for an unknown recipe, or fields that `RunConfig` refuses.

    Example:
        >>> flags = {"lr": (0.1, False), "epochs": (20, True), "data": ("cifar10", False), "method": ("nf", False)}
        >>> run_config("bn-cifar", flags, {"batch_size": 256}).lr
        0.2
    """
    defaults = {field: value for field, (value, _) in flags.items()}
    given = {field: value for field, (value, explicit) in flags.items() if explicit} | (settings or {})
    chosen = dict(given)
    if name is not None:
        read = _checked(given, "batch_size", "epochs").model_dump(include=set(given), exclude_none=True)
        chosen = recipe(name).fields(read.get("batch_size"), read.get("epochs")) | given
        if "model" in given and "model_options" not in given:
            chosen.pop("model_options", None)  # they were the recipe's model's
    return RunConfig.create(**(defaults | by_method(defaults | chosen, chosen.get("optimizer")) | chosen))


def by_method(fields: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """What follows from the method and the batch size among these fields, which may be anything so far.

    Raises:
        UserError: they are no method and no batch size.

    Example:
        >>> by_method({"method": "bn"}, None)
        {'clipping': None}
    """
    read = _checked(fields | {"optimizer": optimizer}, "method", "batch_size", "optimizer")
    return method_defaults.recipe(read.method, read.batch_size, None if optimizer is None else read.optimizer)


def _checked(fields: dict[str, Any], *names: str) -> RunConfig:
    """A configuration of these fields alone: nothing is computed from a value that is out of bounds."""
    return RunConfig.create(**{name: fields[name] for name in names if fields.get(name) is not None})


def recipe_table(found: NamedRecipe) -> Table:
    """A recipe's settings, each with its source."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"[bold]{found.name}[/]: {found.about}",
        title_justify="left",
        caption=f"lr is for {found.lr_images} images per step and scales with the batch size",
        caption_justify="left",
    )
    for heading in ("setting", "value", "source"):
        table.add_column(heading, no_wrap=heading == "setting")
    for name, value in found.values.items():
        shown = json.dumps(value.value) if not isinstance(value.value, str) else value.value
        table.add_row(name, shown, "; ".join(part for part in (value.source, value.note) if part))
    return table


def _imagenet(model: str, size: int, source: str) -> dict[str, Value]:
    return {
        "model": Value(model, source),
        "method": Value("bn", "", "the model is built as it is named, nothing is converted"),
        "data": Value("imagenet", source),
        "image_size": Value(size, source),
        "augment": Value("crop-flip", source),
    }


def _sgd(momentum: float, nesterov: bool, weight_decay: float, source: str) -> dict[str, Value]:
    return {
        "optimizer": Value("sgd", source),
        "momentum": Value(momentum, source),
        "nesterov": Value(nesterov, source),
        "weight_decay": Value(weight_decay, source, "on weights only, as in nfnets/experiment.py"),
    }


def _deepmind(model: str, epochs: int, batch_size: int, source: str) -> dict[str, Value]:
    return {
        **_imagenet(model, 224, source),
        "batch_size": Value(batch_size, source),
        "epochs": Value(epochs, source),
        "lr": Value(0.1, source),
        "warmup_epochs": Value(5.0, source),
        "schedule": Value("cosine", source),
        "min_lr": Value(0.0, source),
        **_sgd(0.9, True, 1e-4, source),
        "label_smoothing": Value(0.1, source),
        "clipping": Value(None, source),
    }


def _nfnet() -> dict[str, Value]:
    changed = {
        "image_size": Value(192, "deepmind-research nfnets/nfnet.py, variant_dict F0"),
        "weight_decay": Value(2e-5, _NFNETS),
        "clipping": Value(0.01, _NFNETS),
        "clipping_head": Value(None, _NFNETS),
        "clipping_eps": Value(1e-3, _NFNETS),
        "drop_path_rate": Value(0.25, _NFNETS),
        "drop_rate": Value(0.2, "deepmind-research nfnets/nfnet.py, variant_dict F0"),
        "ema_decay": Value(0.99999, _NFNETS, "warms up as 1 − (1 + t)^(−⅔), theirs as (1 + t) / (10 + t)"),
        "mixup": Value(0.2, _NF_PAPER, "a coin per step chooses MixUp or CutMix, theirs halves each batch"),
        "cutmix": Value(1.0, _NF_PAPER),
        "randaugment_layers": Value(4, _NFNETS, "before mixing, theirs after it"),
        "randaugment_magnitude": Value(
            5.0, _NFNETS, "F1, F2: 10; F3 on: 15. torchvision's operations, theirs are AutoAugment's 16"
        ),
        "precision": Value("bf16", _NFNETS),
    }
    return _deepmind("nfnet_f0", 360, 4096, _NFNETS) | changed


def _cifar(
    model: str, epochs: int, falls: tuple[float, ...], weight_decay: float, source: str
) -> dict[str, Value]:
    return {
        "model": Value(model, source),
        "method": Value("bn", "", "the model is built as it is named, nothing is converted"),
        "data": Value("cifar10", source),
        "augment": Value("crop-flip", source),
        "batch_size": Value(128, source),
        "epochs": Value(epochs, source),
        "lr": Value(0.1, source),
        "schedule": Value("steps", source),
        "decay_epochs": Value(falls, source),
        "decay_factor": Value(0.1, source),
        **_sgd(0.9, False, weight_decay, source),
        "clipping": Value(None, source),
    }


def _fixup_imagenet() -> dict[str, Value]:
    source = _FIXUP_IMAGENET
    return {
        **_imagenet("fixup_resnet50", 224, source),
        "batch_size": Value(256, source),
        "epochs": Value(90, source),
        "lr": Value(0.1, source),
        "schedule": Value("steps", source),
        "decay_epochs": Value((30.0, 60.0), source),
        "decay_factor": Value(0.1, source),
        **_sgd(0.9, False, 1e-4, source),
        "mixup": Value(0.7, source),
        "clipping": Value(None, source),
    }


_MIXED = {"mixup": Value(1.0, _FIXUP_CIFAR)}

RECIPES = {
    found.name: found
    for found in (
        NamedRecipe(
            "nf-resnet",
            "NF-ResNet-50 on ImageNet, 90 epochs",
            256,
            _deepmind("nf_resnet50", 90, 1024, _BASE),
        ),
        NamedRecipe("nfnet", "NFNet-F0 on ImageNet, 360 epochs, with AGC", 256, _nfnet()),
        NamedRecipe(
            "fixup-cifar",
            "Fixup-ResNet-110 on CIFAR-10, 200 epochs, with MixUp",
            128,
            _cifar("fixup_resnet110_cifar", 200, (100.0, 150.0), 1e-4, _FIXUP_CIFAR) | _MIXED,
        ),
        NamedRecipe(
            "fixup-imagenet", "Fixup-ResNet-50 on ImageNet, 90 epochs, with MixUp", 256, _fixup_imagenet()
        ),
        NamedRecipe(
            "bn-cifar",
            "BatchNorm ResNet-110 on CIFAR-10, 64,000 steps",
            128,
            # 32,000, 48,000 and 64,000 steps of 351 per epoch of 45,000 images.
            _cifar("bn_resnet110_cifar", 182, (91.0, 137.0), 1e-4, _RESNET)
            | {"model_options": Value({"shortcut": "pad"}, _RESNET)},
        ),
        NamedRecipe(
            "bn-imagenet",
            "BatchNorm ResNet-50 on ImageNet, 90 epochs: nf-resnet's baseline",
            256,
            _deepmind("timm:resnet50", 90, 1024, _BASE),
        ),
    )
}
