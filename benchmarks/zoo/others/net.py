"""What a library says about one of its nets, and the wrappers that make one callable with tensors by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

Shape = tuple[int, ...]
IMAGES: tuple[Shape, ...] = (
    (3, 64, 64),
    (3, 96, 96),
    (3, 128, 128),
    (3, 160, 160),
    (3, 224, 224),
    (3, 299, 299),
)


def normal(shape: Shape, batch: int, generator: Generator) -> tuple[Any, ...]:
    """One unit normal input."""
    return (torch.randn(batch, *shape, generator=generator),)


@dataclass(frozen=True)
class Net:
    """A net of a library."""

    name: str
    build: Callable[[], nn.Module]
    """Draws the weights at random, from a configuration only."""
    shapes: tuple[Shape, ...] = IMAGES
    """Of one sample: the first that the net runs on is used."""
    kind: str = "classification"
    inputs: Callable[[Shape, int, Generator], tuple[Any, ...]] = normal
    """From a shape and the number of samples, which come first in every tensor, all arguments of the forward."""
    family: str = ""
    """By default the module that defines the class."""


class Called(nn.Module):
    """A net whose forward takes keywords or returns more than what depends on one sample each."""

    def __init__(
        self,
        net: nn.Module,
        call: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, *inputs: Tensor) -> Any:
        """What `call` makes of the net and the inputs."""
        return self.call(self.net, *inputs)
