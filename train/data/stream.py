"""Images read, decoded and cropped by worker processes while a run trains, every draw keyed by the sample.

What a worker makes of a sample is a pure function of (seed, epoch, sample): the number of workers changes nothing,
and a resumed run asks for the samples that are left and reads no other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.data.decode import (
    DRAWS,
    DecodeError,
    center_crop,
    decode,
    joined,
    pixels,
    random_crop,
    stacked,
)
from nfnets.train.data.readers import Source
from nfnets.train.data.splits import Part, Unreadable
from nfnets.train.hardware import cores
from nfnets.train.keyed import bernoulli, bits, integers, key, uniform

# Samples that a worker hands over at once: enough to hide the hand-over, few enough that a run starts soon.
CHUNK = 32
# How many other samples are tried in place of one that cannot be read.
_SUBSTITUTES = 16


class Job(NamedTuple):
    """What a worker is asked for: places in the split, the numbers that key their draws, and the epoch."""

    places: tuple[int, ...]
    draws: tuple[int, ...]
    epoch: int | None
    """None: as in evaluation, nothing random."""


class Chunk(NamedTuple):
    """What a worker gives: uint8 images, labels, which of the places they are, and what could not be read."""

    images: Tensor
    # Numbers travel in the message itself: a tensor costs a file descriptor and a memory map of its own.
    labels: list[int]
    at: list[int]
    faults: list[tuple[int, str, str]]


class Draw(NamedTuple):
    """What is random about one image."""

    numbers: list[float]
    flipped: bool


@dataclass(frozen=True)
class Crops:
    """How an image becomes size × size pixels."""

    size: int
    seed: int
    augment: str
    least: float
    share: float
    how: str

    def __call__(self, image: Any, draw: Draw | None) -> NDArray[np.uint8]:
        """The pixels of one image; `draw` holds what is random, None as in evaluation."""
        if draw is None:
            return pixels(center_crop(image, self.size, self.share, self.how))
        cut = pixels(random_crop(image, self.size, draw.numbers, self.least, self.how))
        return cut[:, ::-1] if draw.flipped else cut

    def draws(self, numbers: Sequence[int], epoch: int | None) -> Sequence[Draw | None]:
        """What is random of many samples at once: one by one it would take a sixth of an image's time.

        Args:
            numbers: that key each sample's draw.
            epoch: keys them too; None is evaluation.
        """
        if epoch is None or self.augment == "none":
            return [None] * len(numbers)
        index = torch.tensor(numbers)
        # Forty numbers for each sample: the keyed bits of its own sequence.
        own = bits(key(self.seed, "resized-crop", epoch), index)
        found = uniform(own[:, None], torch.arange(DRAWS), torch.float64).tolist()
        flipped = [False] * len(numbers)
        if self.augment == "crop-flip":
            flipped = bernoulli(key(self.seed, "flip", epoch), index, 0.5).tolist()
        return [Draw(*each) for each in zip(found, flipped, strict=True)]


class Samples(Dataset[Chunk]):
    """Jobs to chunks: what runs in a worker.

    Args:
        source: the samples.
        rows: which of them are the split's.
        crops: what is made of an image.
    """

    def __init__(self, source: Source, rows: NDArray[np.int64], crops: Crops) -> None:
        self.source, self.rows, self.crops = source, rows, crops

    def __getitem__(self, index: Any) -> Chunk:
        job: Job = index
        images, labels, at = [], [], []
        faults: list[tuple[int, str, str]] = []
        random = self.crops.draws(job.draws, job.epoch)
        for position, (place, draw) in enumerate(zip(job.places, job.draws, strict=True)):
            read = self._read(place, faults)
            if read is None and job.epoch is not None:
                read = self._substitute(place, draw, job.epoch, faults)
            if read is None:
                continue
            image, label = read
            images.append(self.crops(image, random[position]))
            labels.append(label)
            at.append(position)
        return Chunk(stacked(images, self.crops.size), labels, at, faults)

    def _read(self, place: int, faults: list[tuple[int, str, str]]) -> tuple[Any, int] | None:
        row = int(self.rows[place])
        try:
            file, label = self.source.read(row)
            try:
                return decode(file), label
            finally:
                close: Callable[[], None] | None = getattr(file, "close", None)
                if close is not None:
                    close()
        except DecodeError as error:
            faults.append((place, self.source.name(row), str(error)))
        except OSError as error:
            faults.append((place, self.source.name(row), error.strerror or str(error)))
        return None

    def _substitute(
        self, place: int, draw: int, epoch: int, faults: list[tuple[int, str, str]]
    ) -> tuple[Any, int] | None:
        """Another sample of the split, so that a batch keeps its size; which one is keyed too."""
        others = torch.arange(_SUBSTITUTES) + _SUBSTITUTES * draw
        for other in integers(key(self.crops.seed, "substitute", epoch), others, len(self.rows)).tolist():
            if other != place and (read := self._read(other, faults)) is not None:
                return read
        return None


class _InOrder(Sampler[Job]):
    def __init__(self, jobs: Iterable[Job]) -> None:
        self.jobs = jobs

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)


class Stream:
    """One split that is read from its files, batch by batch.

    Args:
        source: the data set's samples.
        rows: which of them are this split's.
        split: its name, under which unreadable images are counted.
        config: of the run.
        device: where batches go.
        faults: counts what cannot be read.

    Reference:
        torch.utils.data.DataLoader's workers and their order are torch's own; nothing in them is random.
    """

    def __init__(
        self,
        source: Source,
        rows: NDArray[np.int64],
        split: str,
        config: RunConfig,
        device: torch.device,
        faults: Unreadable,
    ) -> None:
        self.split, self.device, self.faults = split, device, faults
        self.workers = workers(config)
        crops = Crops(
            config.image_size,
            config.seed,
            config.augment,
            config.min_crop,
            config.crop_pct,
            config.interpolation,
        )
        self.samples = Samples(source, rows, crops)

    def __len__(self) -> int:
        return len(self.samples.rows)

    def first(self, count: int) -> Tensor:
        """The first images that can be read, as in evaluation."""
        return next(self.parts(min(count, len(self)))).images

    def parts(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[Part]:
        """Every `size`-th batch of the split, from the `rank`-th on, as in evaluation; each sample once."""
        starts = range(rank * batch_size, len(self), size * batch_size)
        batches = [torch.arange(start, min(start + batch_size, len(self))) for start in starts]
        plan = ((None, places, places) for places in batches)
        for places, (images, labels, at) in zip(batches, self._read(plan), strict=True):
            yield Part(places[at].to(self.device), images, labels)

    def draw(self, plan: Iterable[tuple[int, Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches: for every (epoch, places, numbers that key the draws) their images and labels.

        Yields:
            uint8 images (N × 3 × size × size) and labels, on the device.

        Raises:
            UserError: for more unreadable images than the budget allows.
        """
        for images, labels, _ in self._read(plan, whole=True):
            yield images, labels

    def _read(
        self, plan: Iterable[tuple[int | None, Tensor, Tensor]], *, whole: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of (images, labels, places within the batch), put together from chunks."""
        sizes: deque[int] = deque()  # of the batches whose chunks were asked for: workers are ahead of us

        def jobs() -> Iterator[Job]:
            for epoch, places, draws in plan:
                sizes.append(len(places))
                for some, keyed in zip(places.split(CHUNK), draws.split(CHUNK), strict=True):
                    yield Job(tuple(some.tolist()), tuple(keyed.tolist()), epoch)

        chunks = self._chunks(jobs())
        try:
            for chunk in chunks:
                size, begun = sizes.popleft(), 0
                images: list[Tensor] = []
                labels: list[int] = []
                at: list[int] = []
                while True:
                    self.faults.note(self.split, chunk.faults)
                    images.append(chunk.images)
                    labels += chunk.labels
                    at += [begun + place for place in chunk.at]
                    begun += min(CHUNK, size - begun)
                    if begun == size:
                        break
                    chunk = next(chunks)
                if whole and len(at) < size:
                    raise UserError(
                        f"{self.split}: {_SUBSTITUTES} images in a row could not be read; see the files"
                    )
                move = {"device": self.device, "non_blocking": True}
                numbers = torch.tensor(labels, dtype=torch.int64)
                yield joined(images).to(**move), numbers.to(**move), torch.tensor(at, dtype=torch.int64)
        finally:
            chunks.close()  # also where a traceback keeps this frame

    def _chunks(self, jobs: Iterator[Job]) -> Generator[Chunk, None, None]:
        if self.workers == 0:
            yield from map(self.samples.__getitem__, jobs)
            return
        with warnings.catch_warnings():
            # Workers touch neither CUDA nor locks of ours: forking a process with threads is safe here.
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            # More workers than cores is the user's choice.
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            loader = DataLoader(
                self.samples,
                batch_size=None,
                sampler=_InOrder(jobs),
                num_workers=self.workers,
                collate_fn=_same,
                worker_init_fn=_begin,
                prefetch_factor=4,
                # Forked by the run itself, whatever started it: they share its index of files, and end with it.
                multiprocessing_context="fork" if hasattr(os, "fork") else None,
                pin_memory=self.device.type == "cuda",
            )
            before = set(multiprocessing.active_children())
            chunks = iter(loader)
        # Python ends its children at exit by the signal that they ignore, and waits for them: kill them before.
        children = set(multiprocessing.active_children()) - before
        last = Finalize(None, _kill, (children,), exitpriority=100)
        try:
            yield from chunks
        finally:
            del chunks
            last.cancel()


def workers(config: RunConfig) -> int:
    """How many processes decode: the configured number, or one per core (and per process of a run), up to 8."""
    if config.workers is not None:
        return config.workers
    return max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _kill(children: Iterable[BaseProcess]) -> None:
    for child in children:
        child.kill()


def _same(chunk: Any) -> Any:
    return chunk


def _begin(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM are the run's to answer: it still needs its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
