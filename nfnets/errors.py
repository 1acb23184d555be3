"""The one error class a user can cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was given, what was expected and what to do, in one line.

    The commands print it without a traceback and exit with 2.

    Example:
        >>> raise UserError("clipping=-1: expected a number above 0; pass clipping=0.01")
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: clipping=-1: expected a number above 0; pass clipping=0.01
    """


class ForwardError(UserError):
    """A model's forward fails on what it was given; `reason` is what it said."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none: for a message of one line.

    Example:
        >>> first_line(ValueError("no such axis\\nand a long explanation")), first_line(KeyError())
        ('no such axis', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among the known ones, with the nearest matches.

    Example:
        >>> str(unknown("method", "nff", ["nf", "fold"]))
        "unknown method 'nff': did you mean nf? Known: fold, nf"
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    return UserError(f"unknown {kind} {given!r}: {hint}Known: {shown}")
