"""Data sets resident on the device: uint8 images and labels of a training, validation and test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfnets.errors import UserError
from nfnets.train import cifar, idx
from nfnets.train.config import RunConfig
from nfnets.train.keyed import key, permutation

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it

# Splits depend on the data set alone, never on a run's seed: every arm and seed is tested on the same images.
_SPLIT_SEED = 0

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class Split:
    """Images (uint8, N × C × H × W) and their labels (int64, N), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set's three splits, and what a model and an augmentation must know of it.

    `mean` and `std` are the training split's, per channel, of pixels in [0, 1].
    """

    train: Split
    val: Split
    test: Split
    num_classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(config: RunConfig, device: torch.device | str = "cpu") -> Data:
    """The configured data set, split and resident on the device.

    A data set without its own validation split has one held out of the training set by keyed hash; digits
    and a bare image folder have their test split held out the same way, before `train_limit` applies.

    Args:
        config: `data`, `data_dir`, `image_size`, `train_limit` and `validation_fraction` are read.
        device: where the tensors go.

    Returns:
        The `Data`.

    Raises:
        UserError: for missing, truncated or foreign files, and for splits that would be empty.

    Example:
        >>> data = load(RunConfig.create(data="digits"))
        >>> len(data.train), len(data.val), len(data.test), data.num_classes
        (1294, 144, 359, 10)
        >>> data.train.images.shape, data.train.images.dtype
        (torch.Size([1294, 1, 8, 8]), torch.uint8)
    """
    train, val, test, num_classes = _read(config)
    if val is None:
        train, val = _hold_out(
            _limit(train, config.train_limit), config.validation_fraction, "validation", config
        )
    else:
        train = _limit(train, config.train_limit)
    images = train[0]
    mean, std = _moments(images)
    return Data(
        train=_resident(train, device),
        val=_resident(val, device),
        test=_resident(test, device),
        num_classes=num_classes,
        channels=images.shape[1],
        size=images.shape[2],
        mean=mean,
        std=std,
    )


def _read(config: RunConfig) -> tuple[Arrays, Arrays | None, Arrays, int]:
    """Training, validation (if the data set has one) and test arrays, and the number of classes."""
    if config.data == "digits":
        train, test = _hold_out(_digits(), 0.2, "test", config)
        return train, None, test, 10
    if config.data == "fashion-mnist":
        folder = config.data_dir or FASHION_MNIST
        return _fashion(folder, "train"), None, _fashion(folder, "t10k"), 10
    if config.data in ("cifar10", "cifar100"):
        train, test = cifar.read(config.data, config.data_dir or Path("data"))
        return train, None, test, {"cifar10": 10, "cifar100": 100}[config.data]
    from nfnets.train import (
        imagefolder,  # torchvision's import takes seconds that other data sets need not pay
    )

    assert config.data_dir is not None  # the configuration refuses an image folder without one
    train, val, test, names = imagefolder.read(config.data_dir, config.image_size)
    if test is None:
        train, test = _hold_out(train, 0.2, "test", config)
    return train, val, test, len(names)


def _digits() -> Arrays:
    from sklearn.datasets import load_digits  # the import takes a second that only this data set should pay

    bunch: Any = load_digits()
    pixels = np.rint(np.asarray(bunch["images"]) * (255.0 / 16.0)).astype(np.uint8)
    return pixels[:, None], np.asarray(bunch["target"], np.int64)


def _fashion(folder: Path, split: str) -> Arrays:
    inside = folder / "FashionMNIST" / "raw"  # where torchvision's download puts them
    place = inside if inside.is_dir() else folder
    paths = [idx.find(place, f"{split}-{name}-ubyte") for name in ("images-idx3", "labels-idx1")]
    if paths[0] is None or paths[1] is None:
        missing = f"{split}-{'images-idx3' if paths[0] is None else 'labels-idx1'}-ubyte.gz"
        raise UserError(
            f"fashion-mnist: no {missing} in {folder}; `apt-get install dataset-fashion-mnist`, "
            f"or pass the folder of the four IDX files as --data-dir"
        )
    images, labels = idx.read(paths[0], 3), idx.read(paths[1], 1).astype(np.int64)
    if len(images) != len(labels):
        raise UserError(f"{paths[1]}: {len(labels)} labels for {len(images)} images; fetch both files again")
    if labels.max(initial=0) > 9:
        raise UserError(f"{paths[1]}: label {labels.max()}, expected 0 to 9; fetch the file again")
    return images[:, None], labels


def _limit(arrays: Arrays, limit: int | None) -> Arrays:
    """The first samples of a keyed permutation, so that a smaller limit is a subset of a larger one."""
    if limit is None or limit >= len(arrays[1]):
        return arrays
    chosen = np.sort(permutation(key(_SPLIT_SEED, "limit"), len(arrays[1])).numpy()[:limit])
    return arrays[0][chosen], arrays[1][chosen]


def _hold_out(arrays: Arrays, fraction: float, name: str, config: RunConfig) -> tuple[Arrays, Arrays]:
    """(kept, held out): the held-out samples are the first of a keyed permutation; both keep their order."""
    images, labels = arrays
    count = round(fraction * len(labels))
    if count == 0 or count == len(labels):
        raise UserError(
            f"{config.data}: {len(labels)} training images leave {count} for {name} and "
            f"{len(labels) - count} to train; give more images"
        )
    order = permutation(key(_SPLIT_SEED, name), len(labels)).numpy()
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    return (images[kept], labels[kept]), (images[held], labels[held])


def _moments(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and biased standard deviation of pixels in [0, 1], from exact integer histograms."""
    means, stds = [], []
    values = np.arange(256)
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        total = int(counts.sum())
        first, second = int(counts @ values), int(counts @ values**2)
        # Integers up to here: the same on every machine.
        means.append(first / total / 255.0)
        stds.append(((second * total - first**2) ** 0.5 / total / 255.0) or 1.0)
    return tuple(means), tuple(stds)


def _resident(arrays: Arrays, device: torch.device | str) -> Split:
    images, labels = arrays
    return Split(
        torch.from_numpy(np.ascontiguousarray(images)).to(device), torch.from_numpy(labels.copy()).to(device)
    )
