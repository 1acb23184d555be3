"""What a conversion method is, and the methods by name."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import GenericAlias
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Start
from nfnets.errors import UserError, unknown
from nfnets.structure.laws import KINDS, NormKind


class Method(ABC):
    """A way to do without norm layers: a dataclass whose fields are its options.

    Subclasses set `name` and decide, purely, what changes. `register` makes one available to `convert(method=name)`.

    Attributes:
        name: what the method is called by.
        compares: what of `Net.sizes` is measured before anything changes: `"layers"`, convolutions and linears, which
            `Net.held`, `Net.limits` and `Net.lifted` need; `"everything"`, every node; `"nothing"`.
        keeps_function: whether the function in evaluation mode stays, to rounding.
        carries: the kinds of norm layers that it can replace, of "batch", "group", "instance", "layer" and "rms".
        channels_only: whether it replaces only norm layers over the channels, and not those over further dimensions, or
            others.
        leaves_frozen: whether norm layers that couple no samples stay, unless the user's `include` names them.
    """

    name: ClassVar[str]
    compares: ClassVar[Literal["nothing", "layers", "everything"]] = "nothing"
    keeps_function: ClassVar[bool] = False
    carries: ClassVar[tuple[NormKind, ...]] = ("batch",)
    channels_only: ClassVar[bool] = True
    leaves_frozen: ClassVar[bool] = True

    @abstractmethod
    def decide(self, net: Net) -> Iterable[Change | Start]:
        """A change for every site, and for further layers that must change with them; nothing is changed yet."""


M = TypeVar("M", bound=Method)
_METHODS: dict[str, type[Method]] = {}


def register(method: type[M]) -> type[M]:
    """Make a method available by its name; usable as a decorator.

    Args:
        method: a dataclass that derives from `Method`. One that is defined anew (a cell that runs again) takes its
            predecessor's place.

    Returns:
        The same class.

    Raises:
        UserError: no such class, no `name`, or the name of another method.
    """
    shown = getattr(method, "__name__", repr(method))
    if not (isinstance(method, type) and issubclass(method, Method) and dataclasses.is_dataclass(method)):
        raise UserError(f"{shown} as a method: expected a dataclass that derives from Method; add @dataclass")
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name:
        raise UserError(f'{shown} has no name: expected a text to call it by; set name = "…" in the class')
    if method.compares not in ("nothing", "layers", "everything"):
        raise UserError(
            f"{shown}.compares={method.compares!r}: expected 'nothing', 'layers' or 'everything'; pass one of these"
        )
    if not isinstance(method.carries, tuple) or not {*method.carries} <= {*KINDS}:
        kinds = ", ".join(KINDS)
        raise UserError(
            f"{shown}.carries={method.carries!r}: expected a tuple of kinds; pass some of {kinds}"
        )
    if inspect.isabstract(method):
        raise UserError(f"{shown} decides nothing: expected a method `decide`; define it")
    taken = _METHODS.get(name)
    if taken is not None and _home(taken) != _home(method):
        raise UserError(
            f"{shown}.name={name!r}: expected a name of its own, {_home(taken)} has it; rename it"
        )
    _METHODS[name] = method
    return method


def _home(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def list_methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    return dict(_METHODS)


def find_method(name: str, options: dict[str, Any]) -> Method:
    """The method called `name` with its options; UserError if either is unknown or of another type than its field."""
    of_type("method", name, str, f"pass one of {', '.join(sorted(_METHODS))}")
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    chosen = _METHODS[name]
    fields = [f for f in dataclasses.fields(chosen) if f.init]  # type: ignore[arg-type]
    known = {f.name for f in fields}
    try:
        types = get_type_hints(chosen)
    except NameError:  # annotated with classes that only the function which defined it knows
        types = {}
    for option, value in options.items():
        if option not in known:
            if not known:
                raise UserError(f"unknown option {option!r} of method {name!r}: it takes no options")
            raise unknown(f"option of method {name!r}", option, known)
        of_type(f"method {name!r} with {option}", value, types.get(option, Any), "pass a value of that type")
    missing = [f.name for f in fields if f.name not in options and f.default is f.default_factory]
    if missing:
        raise UserError(f"method {name!r} without {missing[0]}: expected a value for it; pass {missing[0]}=…")
    return chosen(**options)


def of_type(name: str, value: Any, kind: Any, remedy: str) -> None:
    """Refuse a value that is not of a type as written in an annotation. An int is a float; nothing else is converted.

    Args:
        name: what the value is for.
        value: what was given.
        kind: a type, or what stands in an annotation, as `int | None`.
        remedy: what to do.

    Raises:
        UserError: it is of another type.

    Example:
        >>> of_type("size", 2.0, int, "pass size=2")
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: size=2.0: expected int; pass size=2
    """
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    held: Any = GenericAlias(
        dict, (str, kind)
    )  # a class with a configuration of its own takes no other by itself
    try:
        TypeAdapter(held, config=config).validate_python({name: value})
    except ValidationError:
        given = " ".join(repr(value).split())
        shown = given if len(given) < 60 else f"a {type(value).__name__}"
        wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("collections.abc.", "")
        raise UserError(f"{name}={shown}: expected {wanted}; {remedy}") from None
