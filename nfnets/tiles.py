"""Inference in tiles: a large image is cut into parts with a halo around each, and the outputs are put together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from nfnets.errors import UserError

Size = int | Sequence[int]
Run = Callable[[Tensor], Tensor]
Box = tuple[slice, ...]


class Tile(NamedTuple):
    """A part of an image, over its spatial dimensions."""

    core: Box
    """What the tile is for."""
    seen: Box
    """The core and its halo, as far as the image goes: what the model is shown."""


def tiles(space: Sequence[int], tile: Size, halo: Size) -> Iterator[Tile]:
    """The tiles that cover an image, the last of a row as long as what is left.

    Args:
        space: the image's height and width (or length, or depth, height and width).
        tile: pixels of a tile, for all dimensions or one for each.
        halo: pixels shown around it; at the image's border there are fewer.

    Raises:
        UserError: a tile below 1, a halo below 0, or another number of dimensions.

    Example:
        >>> for each in tiles((10,), tile=6, halo=2):
        ...     print(each.core, each.seen)
        (slice(0, 6, None),) (slice(0, 8, None),)
        (slice(6, 10, None),) (slice(4, 10, None),)
    """
    sizes, halos = _each("tile", tile, space, 1), _each("halo", halo, space, 0)
    starts = [range(0, n, size) for n, size in zip(space, sizes, strict=True)]
    for corner in itertools.product(*starts):
        ends = [min(a + size, n) for a, size, n in zip(corner, sizes, space, strict=True)]
        core = tuple(slice(a, b) for a, b in zip(corner, ends, strict=True))
        seen = (
            slice(max(0, a - h), min(n, b + h)) for a, b, h, n in zip(corner, ends, halos, space, strict=True)
        )
        yield Tile(core, tuple(seen))


def _each(name: str, given: Size, space: Sequence[int], least: int) -> tuple[int, ...]:
    values = (given,) * len(space) if isinstance(given, int) else tuple(given)
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if len(values) != len(space) or not whole or any(value < least for value in values):
        raise UserError(
            f"{name}={given!r} for an image of {'×'.join(map(str, space))}: expected a whole number from {least} up, "
            "or one for each dimension"
        )
    return values


def tiled(run: Run, image: Tensor, tile: Size, halo: Size) -> Tensor:
    """What a model puts out for an image, computed tile by tile.

    Equal to the whole's if nothing but a halo of pixels around a tile has a part in its output, and if tiles and halos
    are multiples of the model's stride. Layers that normalize over space break the first, whatever the halo.

    Args:
        run: the model; (N, C, *space) to (N, K, *space'), where space' is space times or divided by whole numbers.
        image: (N, C, *space).
        tile: pixels of a tile, for all dimensions or one for each.
        halo: pixels shown around it.

    Returns:
        (N, K, *space').

    Raises:
        UserError: a tile that does not divide so, an image without space, or outputs of another size.

    Example:
        >>> image = torch.randn(1, 1, 20, 30)
        >>> blur = torch.nn.Conv2d(1, 1, 5, padding=2)
        >>> torch.allclose(tiled(blur, image, tile=8, halo=2), blur(image), atol=1e-6)
        True
    """
    if image.ndim < 3:
        raise UserError(
            f"an image of shape {tuple(image.shape)}: expected (samples, channels, height, width)"
        )
    space = tuple(image.shape[2:])
    found: list[tuple[Box, Tensor]] = []
    ratios: set[tuple[Fraction, ...]] = set()
    for part in tiles(space, tile, halo):
        out = run(image[(..., *part.seen)])
        ratios.add(
            tuple(Fraction(m, s.stop - s.start) for m, s in zip(out.shape[2:], part.seen, strict=True))
        )
        if len(ratios) > 1:
            raise _odd(
                f"tiles of {' and '.join(' × '.join(map(str, r)) for r in sorted(ratios))} of their size"
            )
        inner, place = [], []
        for core, seen, n in zip(part.core, part.seen, out.shape[2:], strict=True):
            first, last = (
                _at(edge - seen.start, n, seen.stop - seen.start) for edge in (core.start, core.stop)
            )
            inner.append(slice(first, last))
            start = _at(core.start, n, seen.stop - seen.start)
            place.append(slice(start, start + last - first))
        found.append((tuple(place), out[(..., *inner)]))
    sizes = [max(place[dim].stop for place, _ in found) for dim in range(len(space))]
    whole = found[0][1].new_empty((*found[0][1].shape[:2], *sizes))
    for place, part_out in found:
        whole[(..., *place)] = part_out
    return whole


def _at(position: int, out: int, size: int) -> int:
    """Where a pixel's edge lies in an output."""
    if position * out % size:
        raise _odd(f"an output of {out} pixels for {size} shown")
    return position * out // size


def _odd(given: str) -> UserError:
    return UserError(
        f"{given}: expected tile, halo and image to be multiples of the model's stride; pass others"
    )


def reach(run: Run, image: Tensor, tile: Size) -> tuple[int, bool]:
    """How many pixels around the middle tile have a part in its output, and whether these go up to the image's border.

    By the gradient of a random sum of the tile's outputs: what is exactly 0 has no part.

    Args:
        run: the model, differentiable in its input.
        image: (N, C, *space).
        tile: pixels of a tile.
    """
    space = tuple(image.shape[2:])
    every = list(tiles(space, tile, 0))
    middle = min(
        every, key=lambda t: sum(abs(c.start + c.stop - n) for c, n in zip(t.core, space, strict=True))
    )
    leaf = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = run(leaf)
        box = tuple(
            slice(math.floor(c.start * m / n), math.ceil(c.stop * m / n))
            for c, m, n in zip(middle.core, out.shape[2:], space, strict=True)
        )
        part = out[(..., *box)]
        weights = torch.rand(part.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        (gradient,) = torch.autograd.grad((part * weights.to(part)).sum(), leaf)
    furthest, border = 0, False
    for dim, (core, n) in enumerate(zip(middle.core, space, strict=True)):
        others = [d for d in range(gradient.ndim) if d != dim + 2]
        read = (gradient != 0).float().amax(others).nonzero().flatten()
        if len(read):
            first, last = int(read[0]), int(read[-1])
            furthest = max(furthest, core.start - first, last + 1 - core.stop)
            border |= (first == 0 < core.start) or (last == n - 1 >= core.stop)
    return furthest, border
