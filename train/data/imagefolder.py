"""A folder of class folders, decoded once into resident arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from nfnets.errors import UserError
from nfnets.train.data.decode import DecodeError, center_crop, decode, pixels
from nfnets.train.data.splits import Unreadable
from nfnets.train.data.tree import every_image_once, listing

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

# Beyond this the data set belongs in a streaming loader, not in memory.
_MOST_BYTES = 16 * 2**30


def read(
    folder: Path, size: int, faults: Unreadable
) -> tuple[Arrays, Arrays | None, Arrays | None, list[str]]:
    """Images (uint8, N × 3 × size × size), labels and class names of an image folder.

    Layout: `folder/train/CLASS/image.*` with optional `val` and `test` beside `train`, or
    `folder/CLASS/image.*` alone; what is hidden does not count. The shorter side is resized to `size` (antialiased
    bilinear), then the center is cropped.

    Args:
        folder: the root.
        size: pixels per side of the result.
        faults: counts the images that cannot be read, which are left out.

    Returns:
        (train, val or None, test or None, class names).

    Raises:
        UserError: for a missing folder, no images, an empty class folder, more unreadable images than
            the budget allows, classes that differ by split, or links by which an image counts twice.
    """
    if not folder.is_dir():
        raise UserError(
            f"imagefolder: {folder} is not a folder; pass data_dir with a folder that holds CLASS/image.jpg"
        )
    root = folder / "train" if (folder / "train").is_dir() else folder
    there = [folder / split for split in ("val", "test") if root is not folder and (folder / split).is_dir()]
    try:
        every_image_once([root, *there], _is_image)
        train, names = _split(root, size, "train", faults)
    except OSError as error:
        raise UserError(f"imagefolder: {root} cannot be read ({error.strerror or error})") from None
    others: list[Arrays | None] = []
    for split in ("val", "test"):
        place = folder / split
        if place not in there:
            others.append(None)
            continue
        arrays, found = _split(place, size, split, faults)
        if found != names:
            odd = sorted(set(found) ^ set(names))
            raise UserError(f"imagefolder: {place} and {root} differ in classes: {', '.join(odd[:5])}")
        others.append(arrays)
    return train, others[0], others[1], names


def _split(root: Path, size: int, split: str, faults: Unreadable) -> tuple[Arrays, list[str]]:
    samples, names = listing(root, _is_image)
    count = len(samples)
    needed = count * 3 * size * size
    if needed > _MOST_BYTES:
        raise UserError(
            f"imagefolder: {count} images of {size} × {size} pixels take {needed / 2**30:.0f} GiB, expected "
            f"at most {_MOST_BYTES // 2**30}; pass a smaller image_size, or data='timm:folder' to stream them"
        )
    images = np.empty((count, 3, size, size), np.uint8)
    kept: list[int] = []
    for row, (path, _) in enumerate(samples):
        try:
            images[len(kept)] = _decode(path, size)
            kept.append(row)
        except DecodeError as error:
            faults.note(split, [(row, path, str(error))])
    if not kept:
        raise UserError(f"imagefolder: none of the {count} images in {root} can be read; replace them")
    labels = np.asarray([label for _, label in samples], np.int64)
    return (images[: len(kept)], labels[kept]), names


def _is_image(path: str) -> bool:
    return has_file_allowed_extension(path, IMG_EXTENSIONS)


def _decode(path: str, size: int) -> NDArray[np.uint8]:
    try:
        with open(path, "rb") as file:
            image = decode(file)
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from None
    return pixels(center_crop(image, size, 1.0, "bilinear")).transpose(2, 0, 1)
