"""Random erasing on the device, keyed per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nfnets.train.keyed import bernoulli, key, normal, uniform

AREA = (0.02, 1 / 3)
LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
ATTEMPTS = 10


class RandomErasing:
    """A box of some images is replaced, after normalization, by 0 (the data's mean) or by normal noise.

    The box has an area uniform in [0.02, ⅓] of the image's and a ratio of sides log-uniform in [0.3, 1/0.3]; one
    that does not fit is drawn again, ten times at most.

    Args:
        probability: of an image's box.
        fill: "mean" or "noise".
        seed: the run's seed.

    Example:
        >>> erase = RandomErasing(1.0, "mean", seed=0)
        >>> share = (erase(torch.ones(1000, 1, 32, 32), torch.arange(1000), 0) == 0).float().mean((1, 2, 3))
        >>> bool(share.min() > 0.01 and share.max() < 0.36)
        True

    Paper: arXiv 1708.04896. Area, ratio and attempts are those of timm's `RandomErasing`.
    """

    def __init__(self, probability: float, fill: str, seed: int) -> None:
        self.probability, self.fill, self.seed = probability, fill, seed

    def __call__(self, images: Tensor, draw: Tensor, epoch: int) -> Tensor:
        """The images, boxes erased in place.

        Args:
            images: float32, N × C × H × W, normalized.
            draw: int64, N: what keys each image's draws, its sample index.
            epoch: keys the draws too.
        """
        channels, height, width = images.shape[1:]
        top, left, tall, wide = self.boxes(draw, epoch, height, width)
        down, right = (torch.arange(side, device=draw.device) for side in (height, width))
        rows = (down >= top[:, None]) & (down < (top + tall)[:, None])
        columns = (right >= left[:, None]) & (right < (left + wide)[:, None])
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        if self.fill == "mean":
            return images.masked_fill_(inside, 0.0)
        where = inside.expand(-1, channels, -1, -1).flatten(1).nonzero()
        counter = draw[where[:, 0]] * (channels * height * width) + where[:, 1]
        images.view(len(images), -1)[where[:, 0], where[:, 1]] = normal(
            key(self.seed, "erase-noise", epoch), counter
        )
        return images

    def boxes(
        self, draw: Tensor, epoch: int, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(top, left, height, width) of every image's box, the sides 0 where it has none."""
        tall, wide = torch.zeros_like(draw), torch.zeros_like(draw)
        for attempt in range(ATTEMPTS):
            # float64, so that no device rounds a side the other way.
            area = height * width * _between(*AREA, self._uniform("area", epoch, attempt, draw))
            ratio = _between(*LOG_RATIO, self._uniform("ratio", epoch, attempt, draw)).exp()
            rows, columns = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
            fits = (wide == 0) & (rows > 0) & (rows < height) & (columns > 0) & (columns < width)
            tall, wide = torch.where(fits, rows, tall), torch.where(fits, columns, wide)
        chosen = bernoulli(key(self.seed, "erase", epoch), draw, self.probability)
        tall, wide = tall * chosen, wide * chosen
        top = (self._uniform("top", epoch, 0, draw) * (height - tall + 1)).long()
        left = (self._uniform("left", epoch, 0, draw) * (width - wide + 1)).long()
        return top, left, tall, wide

    def _uniform(self, what: str, epoch: int, attempt: int, draw: Tensor) -> Tensor:
        return uniform(key(self.seed, f"erase-{what}", epoch, attempt), draw, torch.float64)


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return low + (high - low) * share
