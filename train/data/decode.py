"""From a file to pixels: decoding that says what is wrong, and crops whose draws are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# RandomResizedCrop's, from torchvision: tries before the fallback, and the bounds of width / height.
TRIES = 10
_LOG_RATIO = math.log(4 / 3)
DRAWS = 4 * TRIES


class DecodeError(Exception):
    """An image that cannot be decoded; the message says why."""


def decode(file: IO[bytes] | Image.Image) -> Image.Image:
    """The whole image in RGB.

    Args:
        file: opened for reading, or an image that a data set decoded already.

    Returns:
        An RGB image whose pixels are in memory.

    Raises:
        DecodeError: for anything that is no whole image, or one beyond `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        image = file if isinstance(file, Image.Image) else Image.open(file)
        most = Image.MAX_IMAGE_PIXELS
        # PIL itself only warns until twice its limit.
        if most is not None and image.width * image.height > most:
            raise DecodeError(f"{image.width} × {image.height} pixels, over PIL's limit of {most}")
        return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"over PIL's limit of pixels: {error}") from None
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError) as error:
        # Pillow's message names the address of a file object, which differs from run to run.
        why = (
            "no image format that PIL knows"
            if isinstance(error, Image.UnidentifiedImageError)
            else str(error)
        )
        raise DecodeError(why.splitlines()[0] if why else type(error).__name__) from None


def crop_window(width: int, height: int, draws: Sequence[float], least: float) -> tuple[int, int, int, int]:
    """A window of random area and aspect ratio, as torchvision's RandomResizedCrop draws it.

    Area: uniform in [least, 1] of the image's; width / height: log-uniform in [3/4, 4/3]; the first of ten tries
    that fits, else the largest central window within the ratio's bounds.

    Args:
        width: of the image.
        height: of the image.
        draws: 40 uniform numbers in [0, 1), four for each try.
        least: share of the area.

    Returns:
        (left, top, width, height) of the window.

    Example:
        >>> crop_window(100, 80, [0.5] * DRAWS, 0.08)
        (17, 7, 66, 66)

    Reference:
        Szegedy et al., arXiv 1409.4842; torchvision.transforms.RandomResizedCrop.
    """
    area = width * height
    for attempt in range(TRIES):
        size, ratio, across, down = draws[4 * attempt : 4 * attempt + 4]
        target = area * (least + (1 - least) * size)
        aspect = math.exp((2 * ratio - 1) * _LOG_RATIO)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def random_crop(image: Image.Image, size: int, draws: Sequence[float], least: float, how: str) -> Image.Image:
    """The window that `crop_window` draws, resized to size × size."""
    left, top, w, h = crop_window(image.width, image.height, draws, least)
    return image.crop((left, top, left + w, top + h)).resize((size, size), RESAMPLE[how])


def center_crop(image: Image.Image, size: int, share: float, how: str) -> Image.Image:
    """The central size × size pixels after the shorter side was resized to size / share.

    Example:
        >>> center_crop(Image.new("RGB", (40, 20)), 8, 0.875, "bilinear").size
        (8, 8)

    Reference:
        torchvision's Resize and CenterCrop, to the pixel.
    """
    shorter = math.floor(size / share)
    if image.width <= image.height:
        scaled = shorter, int(shorter * image.height / image.width)
    else:
        scaled = int(shorter * image.width / image.height), shorter
    if image.size != scaled:
        image = image.resize(scaled, RESAMPLE[how])
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Height × width × 3, uint8."""
    return np.asarray(image, np.uint8)


def stacked(images: Sequence[NDArray[np.uint8]], size: int) -> Tensor:
    """uint8, N × 3 × size × size."""
    batch = np.empty((len(images), 3, size, size), np.uint8)
    for row, image in enumerate(images):
        batch[row] = image.transpose(2, 0, 1)
    return torch.from_numpy(batch)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts' images as one tensor of the CPU.

    As every step between the workers and the model on a CPU, in this thread alone: torch's own threads would spin
    for a while after each operation, on cores that the workers decode on.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


def normalized(images: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(pixel − mean) · scale in float32, of uint8 images on the CPU, in this thread alone as `joined` says.

    Example:
        >>> images = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
        >>> mean, scale = torch.ones(1, 3, 1, 1), torch.full((1, 3, 1, 1), 0.3)
        >>> torch.equal(normalized(images, mean, scale), images.float().sub_(mean).mul_(scale))
        True
    """
    found = np.subtract(images.numpy(), mean.numpy(), dtype=np.float32)
    found *= scale.numpy()
    return torch.from_numpy(found)
