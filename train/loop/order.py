"""Which samples a step sees: a keyed permutation per epoch, cut into whole batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nfnets.errors import UserError
from nfnets.train.augment.pipeline import Augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.data.splits import Split
from nfnets.train.keyed import key, permutation
from nfnets.train.loop.processes import Processes

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

    An epoch has n // batch_size steps; the samples left over differ by epoch, because the permutation does. With
    `augment_repeats` = r a batch holds batch_size / r samples r times, one repetition after the other, so an epoch
    of as many steps sees a share 1 / r of the samples (arXiv 1901.09335, 1902.05509).

    Args:
        data: resident.
        config: `batch_size`, `augment_repeats`, `order`, `seed`, `channels_last` are read.
        augment: applied to chunks of whole batches. Chunks start at fixed steps of the epoch, so a resumed
            run cuts them at the same places.

    Raises:
        UserError: when a batch is larger than the training split.
    """

    def __init__(
        self, data: Data, config: RunConfig, augment: Augmenter, processes: Processes | None = None
    ) -> None:
        if config.batch_size > len(data.train):
            raise UserError(
                f"batch_size={config.batch_size}: expected at most {len(data.train)}, the training images of "
                f"{config.data} (others are held out to validate and test); pass batch_size={len(data.train)} or less"
            )
        self.data, self.config, self.augment, self.processes = data, config, augment, processes
        self.per_epoch = len(data.train) // config.batch_size
        image_bytes = 4 * data.channels * data.size**2
        self.per_chunk = max(1, _CHUNK_BYTES // (image_bytes * config.batch_size))

    def order(self, epoch: int) -> Tensor:
        """The epoch's permutation of the training split, the first one's where the order is fixed."""
        device = self.data.device if isinstance(self.data.train, Split) else "cpu"
        drawn = 0 if self.config.order == "fixed" else epoch
        return permutation(key(self.config.seed, "order", drawn), len(self.data.train), device)

    def first(self) -> Batch:
        """The run's first batch."""
        return next(self.from_step(0, 1))

    def from_step(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start … stop − 1."""
        if not isinstance(self.data.train, Split):
            yield from self._streamed(start, stop)
            return
        size, repeats = self.config.batch_size, self.config.augment_repeats
        distinct = size // repeats
        step = start
        while step < stop:
            epoch, inside = divmod(step, self.per_epoch)
            order = self.order(epoch)
            while inside < self.per_epoch and step < stop:
                chunk = inside // self.per_chunk
                begin, end = chunk * self.per_chunk, min((chunk + 1) * self.per_chunk, self.per_epoch)
                index = order[begin * distinct : end * distinct]
                copy = None
                if repeats > 1:
                    index = index.view(-1, 1, distinct).expand(-1, repeats, -1).flatten()
                    copy = torch.arange(len(index), device=index.device) % size // distinct
                images = self.augment(self.data.train, index, epoch, copy)
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

    def _streamed(self, start: int, stop: int) -> Iterator[Batch]:
        """As `from_step`, from a stream: each process reads its share of a batch, or what it must mix with it."""
        stream = self.data.train
        assert not isinstance(stream, Split)
        size, count = self.config.batch_size, len(stream)
        distinct = size // self.config.augment_repeats
        share = self._share()
        asked: deque[tuple[int, Tensor, Tensor]] = deque()

        def plan() -> Iterator[tuple[int, Tensor, Tensor]]:
            at, order = -1, torch.empty(0, dtype=torch.int64)
            for step in range(start, stop):
                epoch, inside = divmod(step, self.per_epoch)
                if epoch != at:
                    at, order = epoch, self.order(epoch)
                places = order[inside * distinct : (inside + 1) * distinct]
                copy = torch.arange(size) // distinct
                places = places.repeat(self.config.augment_repeats)
                draws = places + copy * count
                asked.append((epoch, places, draws))
                yield epoch, places[share], draws[share]

        for images, labels in stream.draw(plan()):
            epoch, places, draws = asked.popleft()
            if len(share) < size:
                images, labels = self._whole(images, share), self._whole(labels, share)
            images = self.augment.finish(images, draws.to(images.device), epoch)
            if self.config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            yield Batch(images, labels, places)

    def _share(self) -> Tensor:
        """The places of a batch that this process trains on."""
        size, processes = self.config.batch_size, self.processes
        if processes is None or processes.size == 1:
            return torch.arange(size)
        parts = torch.arange(size).view(self.config.accumulation, processes.size, -1)
        return parts[:, processes.rank].flatten()

    def _whole(self, part: Tensor, share: Tensor) -> Tensor:
        """The whole batch's tensor, with the other processes' rows only where images are mixed over them."""
        whole = part.new_zeros((self.config.batch_size, *part.shape[1:]))
        whole[share.to(part.device)] = part
        mixed = self.config.mixup > 0 or self.config.cutmix > 0
        return self.processes.sum(whole) if mixed and self.processes is not None else whole
