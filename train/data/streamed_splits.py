"""The three splits of a streamed data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.data import download
from nfnets.train.data.data import Data
from nfnets.train.data.readers import Source, TimmReader, TorchData, is_image, open_split
from nfnets.train.data.splits import (
    Unreadable,
    at_least_two_classes,
    every_class_trains,
    held_out,
    limited,
    training_and_validation,
)
from nfnets.train.data.stream import Stream
from nfnets.train.data.tree import every_image_once

Rows = tuple[Source, NDArray[np.int64]]


def load(config: RunConfig, device: torch.device, unreadable: Unreadable) -> Data:
    """A streamed data set.

    A data set with train and test only (ImageNet, whose published validation images are what papers report on, is
    such a one) has its validation split held out of the training images by keyed hash; one without either has the
    test split held out, too.

    Args:
        config: `data`, `data_dir`, `data_options`, `train_limit`, `validation_fraction` and what the crops need.
        device: where batches go.
        unreadable: counts what cannot be read.

    Returns:
        Splits that read their images when asked; `mean` and `std` are ImageNet's.

    Raises:
        UserError: for missing or damaged files, classes that differ by split, and splits that would be empty.
    """
    if config.download and not config.data.startswith("timm:torch/"):
        download.download(config.data, Path("data"))  # says what can be
    train = open_split(config, "train")
    if train is None:
        raise UserError(
            f"{config.data}: no training images in {config.data_dir}; expected train as a folder of class folders, "
            "train.tar, or WebDataset shards with train in their names"
        )
    val, test = open_split(config, "val"), open_split(config, "test")
    if config.data == "imagenet" or test is None:
        # ImageNet's own test split has no labels.
        val, test = None, val
    roots = [source.root for source in (train, val, test) if isinstance(source, TimmReader | TorchData)]
    every_image_once([root for root in roots if root is not None], is_image)
    for other, name in ((val, "val"), (test, "test")):
        _same_classes(train, other, name, config)
    kept: Rows = train, np.arange(len(train))
    tested: Rows | None = None if test is None else (test, np.arange(len(test)))
    if tested is None:
        kept, tested = _hold_out(kept, 0.2, "test", config)
    count, limit = len(kept[1]), config.train_limit
    if val is None:
        trains, validates = training_and_validation(count, config.validation_fraction, limit, config.data)
        kept, validated = (train, kept[1][trains]), (train, kept[1][validates])
    else:
        kept, validated = (train, kept[1][limited(count, limit)]), (val, np.arange(len(val)))
    num_classes = _num_classes(config, train)
    at_least_two_classes(num_classes, train.labels, config.data)
    if train.labels is not None and config.train_limit is None:
        every_class_trains(train.labels[kept[1]], train.names, num_classes, config.data)

    def stream(rows: Rows, name: str) -> Stream:
        return Stream(rows[0], rows[1], name, config, device, unreadable)

    return Data(
        train=stream(kept, "train"),
        val=stream(validated, "val"),
        test=stream(tested, "test"),
        num_classes=num_classes,
        channels=3,
        size=config.image_size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        unreadable=unreadable,
    )


def _hold_out(rows: Rows, fraction: float, name: str, config: RunConfig) -> tuple[Rows, Rows]:
    kept, held = held_out(len(rows[1]), fraction, name, config.data)
    return (rows[0], rows[1][kept]), (rows[0], rows[1][held])


def _same_classes(train: Source, other: Source | None, name: str, config: RunConfig) -> None:
    if other is None:
        return
    if train.names != other.names:
        odd = sorted(set(train.names or ()) ^ set(other.names or ()))
        raise UserError(
            f"{config.data}: {name} and train of {config.data_dir} differ in classes: {', '.join(odd[:5])}"
        )
    if other.num_classes > _num_classes(config, train):
        raise UserError(
            f"{config.data}: {name} has class {other.num_classes - 1}, train has {train.num_classes} classes; pass "
            "num_classes in data_options"
        )


def _num_classes(config: RunConfig, train: Source) -> int:
    given = config.data_options.get("num_classes")
    if given is not None and (not isinstance(given, int) or given < max(1, train.num_classes)):
        raise UserError(
            f"data_options num_classes={given!r}: expected a whole number from {max(1, train.num_classes)}"
        )
    found = given or train.num_classes
    if not found:
        raise UserError(f"{config.data}: does not say how many classes it has; pass data_options num_classes")
    return found
