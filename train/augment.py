"""Augmentation on the device, keyed per sample: what happens to an image does not depend on its batch."""

from __future__ import annotations

import torch
from torch import Tensor

from nfnets.train.config import RunConfig
from nfnets.train.data import Data, Split
from nfnets.train.keyed import bernoulli, integers, key


class Augmenter:
    """Random shifts, flips and normalization of resident images.

    The image is padded with zeros (black) by an eighth of its side; a window of the original size is cut at a
    keyed offset, mirrored with probability ½, then (pixel / 255 − mean) / std.

    Args:
        data: gives the size, mean and standard deviation.
        augment: "none", "crop" or "crop-flip".
        seed: the run's seed.
    """

    def __init__(self, data: Data, augment: str, seed: int) -> None:
        device = data.train.images.device
        self.seed = seed
        self.crop = augment in ("crop", "crop-flip")
        self.flip = augment == "crop-flip"
        self.size = data.size
        self.padding = data.size // 8 if self.crop else 0
        shape = (1, data.channels, 1, 1)
        self._mean = (torch.tensor(data.mean, dtype=torch.float64) * 255).float().view(shape).to(device)
        self._scale = (1 / (torch.tensor(data.std, dtype=torch.float64) * 255)).float().view(shape).to(device)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 pixels to float32 with the training split's mean 0 and variance 1."""
        return images.float().sub_(self._mean).mul_(self._scale)

    def __call__(self, split: Split, index: Tensor, epoch: int) -> Tensor:
        """The augmented, normalized training images at these indices, for this epoch.

        Args:
            split: the resident images.
            index: int64, on the same device; an image's draw is keyed by it.
            epoch: keys the draws too.

        Returns:
            float32, len(index) × C × H × W.
        """
        if not self.crop:
            return self.normalize(split.images[index])
        rows, columns = self.windows(index, epoch)
        # Out-of-frame pixels are read from the nearest edge, then set to black: no padded copy of the data.
        last = self.size - 1
        inside_y, inside_x = (rows >= 0) & (rows <= last), (columns >= 0) & (columns <= last)
        rows, columns = rows.clamp_(0, last), columns.clamp_(0, last)
        flat = (rows[:, :, None] * self.size + columns[:, None, :]).flatten(1)
        images = split.images[index].flatten(2)
        cut = images.gather(2, flat[:, None].expand(-1, images.shape[1], -1))
        inside = (inside_y[:, :, None] & inside_x[:, None, :]).flatten(1)
        cut.mul_(inside[:, None])
        return self.normalize(cut.unflatten(2, (self.size, self.size)))

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
    return Augmenter(data, mode, config.seed)
