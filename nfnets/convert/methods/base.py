"""What a conversion method is, and the methods by name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from nfnets.convert.plan import Row
from nfnets.convert.reference import Reference
from nfnets.convert.sites import Site
from nfnets.errors import UserError, unknown
from nfnets.trace import Graph


class Method(ABC):
    """A way to do without BatchNorm: a dataclass whose fields are its options.

    Subclasses set `name`, decide what happens to every site in `rows`, and may measure on the converted model
    in `finish`. `register` makes one available to `convert(method=name)`.
    """

    name: ClassVar[str]
    compares: ClassVar[Literal["nothing", "layers", "everything"]] = "nothing"
    """What of `reference` is to be measured."""
    reference: Reference = Reference()
    """What the layers of the model put out before the conversion; set before `rows` is called."""

    @abstractmethod
    def rows(self, model: nn.Module, graph: Graph, sites: list[Site]) -> tuple[list[Row], list[Row]]:
        """A row per site, and rows for further layers that must change with them."""

    def finish(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:  # noqa: B027
        """Initialize the converted model; raises if that fails, and the conversion is undone."""


M = TypeVar("M", bound=Method)
_METHODS: dict[str, type[Method]] = {}


def register(method: type[M]) -> type[M]:
    """Make a method available by its name; usable as a decorator.

    Args:
        method: a dataclass that derives from `Method`.

    Returns:
        The same class.
    """
    _METHODS[method.name] = method
    return method


def list_methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    return dict(_METHODS)


def find_method(name: str, options: dict[str, Any]) -> Method:
    """The method called `name` with its options; UserError if either is unknown."""
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    chosen = _METHODS[name]
    known = {f.name for f in dataclasses.fields(chosen)}  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            if not known:
                raise UserError(f"unknown option {option!r} of method {name!r}: it takes no options")
            raise unknown(f"option of method {name!r}", option, known)
    try:
        return chosen(**options)
    except TypeError as error:  # a text where a number belongs, say
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise UserError(f"method {name!r} with {given}: {error}; pass a value of the option's type") from None
