"""Which samples a step sees: a keyed permutation per epoch, cut into whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nfnets.errors import UserError
from nfnets.train.augment import Augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.keyed import key, permutation

# Augmented ahead, so that a batch of 4 does not pay for a dozen kernel launches of its own.
_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Batch:
    """One optimizer step's augmented images, labels and sample indices."""

    images: Tensor
    labels: Tensor
    index: Tensor


class Batches:
    """Every step's batch, from any step on.

    An epoch has n // batch_size steps; the samples left over differ by epoch, because the permutation does.

    Args:
        data: resident.
        config: `batch_size`, `seed`, `channels_last` are read.
        augment: applied to chunks of whole batches. Chunks start at fixed steps of the epoch, so a resumed
            run cuts them at the same places.

    Raises:
        UserError: when a batch is larger than the training split.
    """

    def __init__(self, data: Data, config: RunConfig, augment: Augmenter) -> None:
        if config.batch_size > len(data.train):
            raise UserError(
                f"batch_size={config.batch_size}: expected at most {len(data.train)}, "
                f"the training images of {config.data} with these settings"
            )
        self.data, self.config, self.augment = data, config, augment
        self.per_epoch = len(data.train) // config.batch_size
        image_bytes = 4 * data.train.images[0].numel()
        self.per_chunk = max(1, _CHUNK_BYTES // (image_bytes * config.batch_size))

    def order(self, epoch: int) -> Tensor:
        """The epoch's permutation of the training split."""
        device = self.data.train.labels.device
        return permutation(key(self.config.seed, "order", epoch), len(self.data.train), device)

    def first(self) -> Batch:
        """The run's first batch."""
        return next(self.from_step(0, 1))

    def from_step(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start … stop − 1."""
        size = self.config.batch_size
        step = start
        while step < stop:
            epoch, inside = divmod(step, self.per_epoch)
            order = self.order(epoch)
            while inside < self.per_epoch and step < stop:
                chunk = inside // self.per_chunk
                begin, end = chunk * self.per_chunk, min((chunk + 1) * self.per_chunk, self.per_epoch)
                index = order[begin * size : end * size]
                images = self.augment(self.data.train, index, epoch)
                if self.config.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                parts = zip(
                    images.split(size),
                    self.data.train.labels[index].split(size),
                    index.split(size),
                    strict=True,
                )
                for at, (some, labels, rows) in enumerate(parts, begin):
                    if at < inside or step >= stop:
                        continue
                    yield Batch(some, labels, rows)
                    step += 1
                inside = end
