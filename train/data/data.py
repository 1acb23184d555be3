"""What a data set is to the rest of the harness: three splits, resident or streamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from nfnets.train.data.splits import Split, Unreadable

if TYPE_CHECKING:
    from nfnets.train.data.stream import (
        Stream,  # torch's loader and timm's readers: seconds that digits need not pay
    )


@dataclass(frozen=True)
class Data:
    """A data set's three splits, and what a model and an augmentation must know of it.

    `mean` and `std` are per channel, of pixels in [0, 1]: the training split's, or ImageNet's where images are
    streamed.
    """

    train: Split | Stream
    val: Split | Stream
    test: Split | Stream
    num_classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unreadable: Unreadable = field(default_factory=lambda: Unreadable(0))

    @property
    def device(self) -> torch.device:
        """Where batches are wanted."""
        return self.train.device
