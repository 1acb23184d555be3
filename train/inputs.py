"""Example inputs by their shapes, as the shell and recipes on disk write them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nfnets.errors import UserError

Shape = tuple[int, ...]
# Of a sample, as float32 one GiB: a recipe may come from a stranger.
_MOST = 2**28


class Inputs(NamedTuple):
    """What a model is run on: `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Described(NamedTuple):
    """One input of a model: its shape without the batch, and its name if it is given by keyword.

    A name with points leads into a dict: `batch.image` is what the forward's `batch` holds as `image`.
    """

    shape: Shape
    name: str = ""

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.name}={shape}" if self.name else shape


def described(texts: Sequence[str]) -> list[Described]:
    """Inputs from text.

    Args:
        texts: a shape without the batch for each, of any rank; in the forward's order, or as NAME=SHAPE, where
            NAME.KEY is one entry of a dict.

    Returns:
        As many descriptions.

    Raises:
        UserError: not positive numbers with an x between them, a name twice, a tensor and a dict of one name, or a
            sample that is larger than 1 GiB.

    Example:
        >>> [tuple(each) for each in described(["3x224x224", "scale=1"])]
        [((3, 224, 224), ''), ((1,), 'scale')]
    """
    found: list[Described] = []
    for text in texts:
        name, equals, shape = text.rpartition("=")
        if not re.fullmatch(r"0*[1-9]\d{0,8}(x0*[1-9]\d{0,8}){0,7}", shape, flags=re.I | re.A) or (
            equals and not _is_name(name)
        ):
            raise UserError(
                f"input {text!r}: expected a shape without the batch, such as 3x224x224, or NAME=SHAPE for what the "
                "forward takes by keyword, NAME.KEY=SHAPE for a dict's entry"
            )
        found.append(fitting(Described(tuple(int(part) for part in shape.lower().split("x")), name)))
    names = [each.name for each in found if each.name]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"input {name}: given {names.count(name)} times, expected once")
        inside = next((other for other in names if other.startswith(f"{name}.")), None)
        if inside:
            raise UserError(
                f"inputs {name} and {inside}: {name} cannot be a tensor and a dict; pass one of them"
            )
    return found


def _is_name(text: str) -> bool:
    """Whether a forward can have a parameter of that name, and dicts in it such keys."""
    name, *keys = text.split(".")
    return name.isidentifier() and all(re.fullmatch(r"\w+", key) for key in keys)


def fitting(one: Described) -> Described:
    """The same, or a UserError if it would take more memory than a model's input can mean."""
    if math.prod(one.shape) > _MOST:
        raise UserError(f"input {one}: expected {_MOST:,} numbers a sample or less")
    return one


def noise(inputs: Sequence[Described], batch: int, seed: int) -> Inputs:
    """Standard normal tensors, drawn in this order.

    Example:
        >>> args, kwargs = noise(described(["3x8x8", "scale=1"]), batch=2, seed=0)
        >>> args[0].shape, kwargs["scale"].shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 1]))
        >>> noise(described(["batch.image=3x8x8", "batch.age=1"]), batch=2, seed=0).kwargs["batch"].keys()
        dict_keys(['image', 'age'])
    """
    generator = torch.Generator().manual_seed(seed)
    args: list[torch.Tensor] = []
    kwargs: dict[str, Any] = {}
    for each in inputs:
        drawn = torch.randn(batch, *each.shape, generator=generator)
        *outer, last = each.name.split(".")
        if not last:
            args.append(drawn)
            continue
        place = kwargs
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = drawn
    return Inputs(tuple(args), kwargs)


def channels_and_size(inputs: Sequence[Described]) -> tuple[int, int | None]:
    """What a builder is told: the first input's first number, and its sides' length if they are of one length.

    Example:
        >>> channels_and_size(described(["3x224x224"])), channels_and_size(described(["1x64x96", "7"]))
        ((3, 224), (1, None))
    """
    channels, *sides = inputs[0].shape
    return channels, sides[0] if len(set(sides)) == 1 else None
