"""Initializers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from nfnets.errors import UserError, unknown
from nfnets.scale.report import Report

Function = Callable[..., Report]
_GENERAL = ("generator", "layers")


class Initializer(NamedTuple):
    """One way to start a network."""

    name: str
    function: Function
    """Called as `function(model, *inputs, **options, **kwargs)`; changes the model and says what it did."""
    says: str
    """One line: what it does."""
    reads: str
    """What of the inputs it reads: `"nothing"`, `"shapes"` or `"values"`."""
    fixed: tuple[str, ...] = ()
    """Options of the function that the name settles."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that it takes, beside the forward's keyword arguments."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.fixed)

    def check(self, options: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Refuse options that it does not know, and keyword inputs that it would take for options."""
        for name in options:
            if name not in self.options:
                raise unknown(f"option of initializer {self.name!r}", name, self.options)
        if clash := sorted({*self.options, *self.fixed} & {*kwargs}):
            raise UserError(
                f"kwargs holds {clash[0]}, an option of initializer {self.name!r}: pass the forward's {clash[0]} by "
                "position among the inputs"
            )


_KNOWN: dict[str, Initializer] = {}


def register(
    name: str, function: Function, says: str, reads: str = "values", fixed: tuple[str, ...] = ()
) -> None:
    """Make an initializer available by a name; one that is registered anew takes its predecessor's place.

    Args:
        name: what it is called by.
        function: called as `function(model, *inputs, **options)`; changes the model in place and returns a `Report`.
        says: one line for lists of initializers.
        reads: what of the inputs it reads: `"nothing"`, `"shapes"` or `"values"`.
        fixed: options of the function that the name settles.

    Raises:
        UserError: a name that is no text, or something that cannot be called.
    """
    if not isinstance(name, str) or not name or not callable(function):
        raise UserError(
            f"initializer {name!r}: expected a name and a function; pass register('mine', function, says)"
        )
    if reads not in ("nothing", "shapes", "values"):
        raise UserError(
            f"initializer {name!r} with reads={reads!r}: expected 'nothing', 'shapes' or 'values'"
        )
    _KNOWN[name] = Initializer(name, function, says, reads, fixed)


def find(name: Any) -> Initializer:
    """The initializer of a name; UserError with the nearest ones if there is none."""
    if not isinstance(name, str):
        raise UserError(
            f"method={name!r}: expected an initializer's name; pass one of {', '.join(sorted(_KNOWN))}"
        )
    if name not in _KNOWN:
        raise unknown("initializer", name, _KNOWN)
    return _KNOWN[name]


def list_initializers() -> dict[str, str]:
    """What every initializer does, by its name."""
    return {name: each.says for name, each in _KNOWN.items()}
