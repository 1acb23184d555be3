"""What `convert` leaves on a model: the method and batch size, for the training after it; on a layer, that its constant
was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

NAME = "nfnets_converted"
_MEASURED = "nfnets_measured"


class Measured(NamedTuple):
    """What `predict` starts from at a layer whose constant was measured, or comes with a `state_dict`."""

    square: float
    """mean(gain²) when it was: the variance before α is 1 times what it has grown by since."""
    centred: bool
    """Whether its channels were given the mean 0."""

    def put_on(self, layer: nn.Module) -> None:
        vars(layer)[_MEASURED] = self


def measured_constant(layer: nn.Module) -> Measured | None:
    """The mark of a layer whose constant was measured."""
    return vars(layer).get(_MEASURED)


@dataclass(frozen=True)
class Mark:
    """How a model was converted. An attribute of plain values, so that it goes wherever the whole model goes.

    Args:
        methods: by name, in the order in which they were used.
        batch_size: images that a training step of one process passes through the model; None if nobody said.
        measured: how many example images constants were measured on; None if nothing was measured.
        chosen: options that followed from the batch size, or from `measured` where that is unknown.
    """

    methods: tuple[str, ...]
    batch_size: int | None = None
    measured: int | None = None
    chosen: tuple[tuple[str, Any], ...] = ()


def marks_of(model: nn.Module) -> list[Mark]:
    """The marks on a model and on its parts, each once: a backbone may have been converted by itself.

    Example:
        >>> marks_of(nn.Linear(2, 3))
        []
    """
    found = (vars(module).get(NAME) for module in model.modules())
    return list(dict.fromkeys(mark for mark in found if isinstance(mark, Mark)))
