"""A split, and which samples are in it: what is held out, what a limit keeps, and what could not be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfnets.errors import UserError
from nfnets.train.keyed import key, permutation

# Splits depend on the data set alone, never on a run's seed: every arm and seed is tested on the same images.
SPLIT_SEED = 0

_NAMED = 20  # unreadable files that a result names; the rest are counted


class Part(NamedTuple):
    """Some samples of a split, for one evaluation forward pass."""

    rows: Tensor
    """Their places in the split; a sample that could not be read is missing."""
    images: Tensor
    """uint8, C × H × W each."""
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """Images (uint8, N × C × H × W) and their labels (int64, N), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.labels.device

    def first(self, count: int) -> Tensor:
        """The first images, to try a model on."""
        return self.images[:count]

    def parts(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[Part]:
        """Every `size`-th batch of the split, from the `rank`-th on."""
        for start in range(rank * batch_size, len(self), size * batch_size):
            stop = min(start + batch_size, len(self))
            rows = torch.arange(start, stop, device=self.device)
            yield Part(rows, self.images[start:stop], self.labels[start:stop])


@dataclass
class Unreadable:
    """Images that could not be read, by split, and how many of them a run may have.

    Example:
        >>> unreadable = Unreadable(budget=1)
        >>> unreadable.note("train", [(7, "a.png", "truncated")])
        >>> unreadable.note("train", [(7, "a.png", "truncated")])  # the same one in a later epoch
        >>> unreadable.count
        1
        >>> unreadable.note("val", [(0, "b.png", "empty")])
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: b.png: not a readable image (empty): 2 of them, over unreadable_budget=1; replace \
or remove it, or raise the budget
    """

    budget: int
    found: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many different images, over all splits."""
        return sum(len(files) for files in self.found.values())

    def note(self, split: str, faults: Iterable[tuple[int, str, str]]) -> None:
        """Count these (index, name, reason); a UserError when there are more than the budget allows."""
        for index, name, reason in faults:
            self.found.setdefault(split, {})[index] = f"{name}: {reason}"
            if self.count > self.budget:
                over = f": {self.count} of them, over unreadable_budget={self.budget}" if self.budget else ""
                advice = "raise the budget" if self.budget else "allow some with unreadable_budget=N"
                raise UserError(
                    f"{name}: not a readable image ({reason}){over}; replace or remove it, or {advice}"
                )

    def merge(self, found: dict[str, dict[int, str]]) -> None:
        """Add what a checkpoint or another process found."""
        for split, files in found.items():
            self.found.setdefault(split, {}).update(files)

    def summary(self) -> dict[str, object]:
        """For result.json: the budget, counts by split, and the first names with their reasons."""
        names = [text for split in sorted(self.found) for _, text in sorted(self.found[split].items())]
        counts = {split: len(files) for split, files in sorted(self.found.items())}
        return {"budget": self.budget, "count": self.count, "by_split": counts, "first": names[:_NAMED]}


def limited(count: int, limit: int | None) -> NDArray[np.int64]:
    """Which of `count` samples a limit keeps: the first of a keyed permutation, in their own order.

    So a smaller limit is a subset of a larger one. What is held out is chosen before: no image that validates
    under one limit trains under another.

    Example:
        >>> set(limited(100, 10).tolist()) < set(limited(100, 20).tolist())
        True
    """
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(permutation(key(SPLIT_SEED, "limit"), count).numpy()[:limit])


def training_and_validation(
    count: int, fraction: float, limit: int | None, data: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, validation) places among `count` samples of which at most `limit` are used in all.

    Args:
        count: samples there are.
        fraction: the share of validation.
        limit: samples to use, of both together; None is all.
        data: the data set's name, for the error.

    Returns:
        Two sorted arrays of places.

    Raises:
        UserError: when one of them would be empty.

    Example:
        >>> train, val = training_and_validation(100, 0.2, None, "digits")
        >>> fewer, judged = training_and_validation(100, 0.2, 10, "digits")
        >>> len(fewer), len(judged), set(fewer) <= set(train), set(judged) <= set(val)
        (8, 2, True, True)
    """
    kept, held = held_out(count, fraction, "validation", data)
    if limit is None or limit >= count:
        return kept, held
    taken = number_held_out(limit, fraction, "validation", data)
    return kept[limited(len(kept), limit - taken)], held[limited(len(held), taken)]


def held_out(
    count: int, fraction: float, split: str, data: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(kept, held out) places among `count` samples, by keyed hash; both in their own order.

    Args:
        count: samples there are.
        fraction: the share to hold out.
        split: what for ("validation", "test"): keys the choice.
        data: the data set's name, for the error.

    Returns:
        Two sorted arrays of places that make up 0 … count − 1.

    Raises:
        UserError: when one of them would be empty.

    Example:
        >>> [len(part) for part in held_out(50, 0.1, "validation", "digits")]
        [45, 5]
    """
    taken = number_held_out(count, fraction, split, data)
    order = permutation(key(SPLIT_SEED, split), count).numpy()
    return np.sort(order[taken:]), np.sort(order[:taken])


def number_held_out(count: int, fraction: float, split: str, data: str) -> int:
    """How many of `count` samples are held out; a UserError where that leaves none on either side."""
    taken = round(fraction * count)
    if taken == 0 or taken == count:
        raise UserError(
            f"{data}: {count} training images leave {taken} for {split} and {count - taken} to train; "
            f"give more images{' or another validation_fraction' if split == 'validation' else ''}"
        )
    return taken


def at_least_two_classes(num_classes: int, labels: NDArray[np.int64] | None, data: str) -> None:
    """A UserError where there is nothing to tell apart: any net has an accuracy of 100 % on one class.

    Args:
        num_classes: of the data set.
        labels: of all its training images, where they are known.
        data: the data set's name, for the error.
    """
    there = num_classes if labels is None else len(np.unique(labels))
    if there < 2 or num_classes < 2:
        raise UserError(f"{data}: images of one class alone; expected two classes or more, a folder for each")


def every_class_trains(labels: NDArray[np.int64], names: list[str] | None, classes: int, data: str) -> None:
    """A UserError where splits were held out and left a class without a training image."""
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(missing):
        which = ", ".join(names[i] if names else str(i) for i in missing[:5])
        raise UserError(
            f"{data}: no training image is left of {len(missing)} class{'es' if len(missing) > 1 else ''} ({which}) "
            "after holding out validation and test images; give more images, or val and test folders"
        )
