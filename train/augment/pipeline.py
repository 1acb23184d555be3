"""Augmentation on the device, keyed per sample: what happens to an image does not depend on its batch."""

from __future__ import annotations

import torch
from torch import Tensor

from nfnets.train.augment.erasing import RandomErasing
from nfnets.train.augment.randaugment import RandAugment
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.data.decode import normalized
from nfnets.train.data.splits import Split
from nfnets.train.keyed import bernoulli, integers, key


class Augmenter:
    """Random shifts, flips, RandAugment, normalization and erasing of resident images, in this order.

    The image is padded with zeros (black) by an eighth of its side; a window of the original size is cut at a
    keyed offset, mirrored with probability ½, then (pixel / 255 − mean) / std.

    Args:
        data: gives the size, mean and standard deviation.
        augment: "none", "crop" or "crop-flip".
        seed: the run's seed.
        randaugment: None is off.
        erasing: None is off.
    """

    def __init__(
        self,
        data: Data,
        augment: str,
        seed: int,
        *,
        randaugment: RandAugment | None = None,
        erasing: RandomErasing | None = None,
    ) -> None:
        device = data.device
        self.streamed = not isinstance(data.train, Split)
        self.seed, self.randaugment, self.erasing = seed, randaugment, erasing
        self.crop = augment in ("crop", "crop-flip")
        self.flip = augment == "crop-flip"
        self.size = data.size
        self.padding = data.size // 8 if self.crop else 0
        shape = (1, data.channels, 1, 1)
        self._mean = (torch.tensor(data.mean, dtype=torch.float64) * 255).float().view(shape).to(device)
        self._scale = (1 / (torch.tensor(data.std, dtype=torch.float64) * 255)).float().view(shape).to(device)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 pixels to float32 with the training split's mean 0 and variance 1."""
        if self.streamed and images.device.type == "cpu":
            return normalized(images, self._mean, self._scale)
        return images.float().sub_(self._mean).mul_(self._scale)

    def __call__(self, split: Split, index: Tensor, epoch: int, copy: Tensor | None = None) -> Tensor:
        """The augmented, normalized training images at these indices, for this epoch.

        Args:
            split: the resident images.
            index: int64, on the same device; an image's draws are keyed by it.
            epoch: keys the draws too.
            copy: int64, one per index: which of an image's repetitions it is; all are the first by default.

        Returns:
            float32, len(index) × C × H × W.
        """
        draw = index if copy is None else index + copy * len(split)
        images = self.cut(split, index, draw, epoch) if self.crop else split.images[index]
        return self.finish(images, draw, epoch)

    def finish(self, images: Tensor, draw: Tensor, epoch: int) -> Tensor:
        """What comes after the crop, which streamed images have had: uint8 pixels to the model's input."""
        if self.randaugment is not None:
            images = self.randaugment(images, draw, epoch)
        images = self.normalize(images)
        return images if self.erasing is None else self.erasing(images, draw, epoch)

    def cut(self, split: Split, index: Tensor, draw: Tensor, epoch: int) -> Tensor:
        """The drawn window of every image, uint8."""
        rows, columns = self.windows(draw, epoch)
        # Out-of-frame pixels are read from the nearest edge, then set to black: no padded copy of the data.
        last = self.size - 1
        inside_y, inside_x = (rows >= 0) & (rows <= last), (columns >= 0) & (columns <= last)
        rows, columns = rows.clamp_(0, last), columns.clamp_(0, last)
        flat = (rows[:, :, None] * self.size + columns[:, None, :]).flatten(1)
        images = split.images[index].flatten(2)
        cut = images.gather(2, flat[:, None].expand(-1, images.shape[1], -1))
        inside = (inside_y[:, :, None] & inside_x[:, None, :]).flatten(1)
        cut.mul_(inside[:, None])
        return cut.unflatten(2, (self.size, self.size))

    def windows(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The source row and column of every target row and column, each len(index) × size."""
        frame = torch.arange(self.size, device=index.device)
        choices = 2 * self.padding + 1
        down = integers(key(self.seed, "crop-y", epoch), index, choices) - self.padding
        right = integers(key(self.seed, "crop-x", epoch), index, choices) - self.padding
        rows, columns = frame + down[:, None], frame + right[:, None]
        if self.flip:
            mirrored = bernoulli(key(self.seed, "flip", epoch), index, 0.5)
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        return rows, columns


def augmenter(data: Data, config: RunConfig) -> Augmenter:
    """The configured augmentation; digits are never mirrored.

    Example:
        >>> from nfnets.train.data import load
        >>> config = RunConfig.create(data="digits", augment="crop-flip")
        >>> data = load(config); augment = augmenter(data, config)
        >>> alone = augment(data.train, torch.tensor([5]), 0)
        >>> batch = augment(data.train, torch.tensor([9, 5, 2]), 0)
        >>> bool((alone[0] == batch[1]).all()), augment.flip
        (True, False)
    """
    mode = "crop" if config.data == "digits" and config.augment == "crop-flip" else config.augment
    layers, probability = config.randaugment_layers, config.random_erasing
    return Augmenter(
        data,
        mode,
        config.seed,
        randaugment=RandAugment(layers, config.randaugment_magnitude, config.seed) if layers else None,
        erasing=RandomErasing(probability, config.erasing_fill, config.seed) if probability else None,
    )
