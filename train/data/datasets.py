"""Data sets by name: resident on the device, or streamed from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.data import checksums, cifar, idx
from nfnets.train.data.data import Data
from nfnets.train.data.splits import (
    Split,
    Unreadable,
    at_least_two_classes,
    every_class_trains,
    held_out,
    limited,
    training_and_validation,
)

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
DOWNLOADS = Path("data")  # where torchvision's downloads go without a data_dir

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


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
    device = torch.device(device)
    unreadable = Unreadable(config.unreadable_budget)
    if config.streamed:
        from nfnets.train.data import streamed_splits

        return streamed_splits.load(config, device, unreadable)
    train, val, test, num_classes = _read(config, unreadable)
    at_least_two_classes(num_classes, train[1], config.data)
    count, limit = len(train[1]), config.train_limit
    if val is None:
        trains, validates = training_and_validation(count, config.validation_fraction, limit, config.data)
        train, val = _rows(train, trains), _rows(train, validates)
    else:
        train = _rows(train, limited(count, limit))
    if config.data == "imagefolder" and config.train_limit is None:
        every_class_trains(train[1], None, num_classes, "imagefolder")
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
        unreadable=unreadable,
    )


def _read(config: RunConfig, unreadable: Unreadable) -> tuple[Arrays, Arrays | None, Arrays, int]:
    """Training, validation (if the data set has one) and test arrays, and the number of classes."""
    if config.data in ("digits", "imagefolder") and config.download:
        from nfnets.train.data.download import download

        download(config.data, DOWNLOADS)  # says what can be
    if config.data == "digits":
        train, test = _hold_out(_digits(), 0.2, "test", config)
        return train, None, test, 10
    if config.data in ("mnist", "fashion-mnist"):
        folder = _folder(config)
        return _idx(config, folder, "train"), None, _idx(config, folder, "t10k"), 10
    if config.data in ("cifar10", "cifar100"):
        train, test = cifar.read(config.data, _folder(config), config.verify_data)
        return train, None, test, {"cifar10": 10, "cifar100": 100}[config.data]
    # torchvision's import takes seconds that other data sets need not pay
    from nfnets.train.data import imagefolder

    assert config.data_dir is not None  # the configuration refuses an image folder without one
    train, val, test, names = imagefolder.read(config.data_dir, config.image_size, unreadable)
    if test is None:
        train, test = _hold_out(train, 0.2, "test", config)
    return train, val, test, len(names)


def _folder(config: RunConfig) -> Path:
    """Where the files are, after a download if one is wanted."""
    here = config.data == "fashion-mnist" and FASHION_MNIST.is_dir() and not config.download
    folder = config.data_dir or (FASHION_MNIST if here else DOWNLOADS)
    if config.download:
        from nfnets.train.data.download import download

        download(config.data, folder)
    return folder


def _digits() -> Arrays:
    from sklearn.datasets import load_digits  # the import takes a second that only this data set should pay

    bunch: Any = load_digits()
    pixels = np.rint(np.asarray(bunch["images"]) * (255.0 / 16.0)).astype(np.uint8)
    return pixels[:, None], np.asarray(bunch["target"], np.int64)


_RAW = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's folders
_ELSEWHERE = {
    "mnist": "pass --download",
    "fashion-mnist": "`apt-get install dataset-fashion-mnist`, --download",
}


def _idx(config: RunConfig, folder: Path, split: str) -> Arrays:
    """A split of MNIST or Fashion-MNIST from its two IDX files."""
    inside = folder / _RAW[config.data] / "raw"
    place = inside if inside.is_dir() else folder
    names = [f"{split}-{name}-ubyte" for name in ("images-idx3", "labels-idx1")]
    paths = [idx.find(place, name) for name in names]
    arrays: list[NDArray[np.uint8]] = []
    for name, path, dimensions in zip(names, paths, (3, 1), strict=True):
        if path is None:
            raise UserError(
                f"{config.data}: no {name}.gz in {folder}; {_ELSEWHERE[config.data]}, "
                f"or pass the folder of the four IDX files as --data-dir"
            )
        content = idx.unpack(path)
        arrays.append(idx.parse(content, dimensions, path))
        if config.verify_data:
            checksums.check(config.data, name, content, path)
    images, labels = arrays[0], arrays[1].astype(np.int64)
    if len(images) != len(labels):
        raise UserError(f"{paths[1]}: {len(labels)} labels for {len(images)} images; fetch both files again")
    if labels.max(initial=0) > 9:
        raise UserError(f"{paths[1]}: label {labels.max()}, expected 0 to 9; fetch the file again")
    return images[:, None], labels


def _rows(arrays: Arrays, rows: NDArray[np.int64]) -> Arrays:
    return arrays if len(rows) == len(arrays[1]) else (arrays[0][rows], arrays[1][rows])


def _hold_out(arrays: Arrays, fraction: float, name: str, config: RunConfig) -> tuple[Arrays, Arrays]:
    """(kept, held out) of the arrays, as `held_out` says."""
    kept, held = held_out(len(arrays[1]), fraction, name, config.data)
    return _rows(arrays, kept), _rows(arrays, held)


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
