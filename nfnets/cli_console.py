"""The terminal: the user's own words stay as they are in it, whatever it can show and whatever they look like."""

from __future__ import annotations

import codecs
import os
import re
import sys
import sysconfig
import traceback
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console

# Words and signs of ours that an ASCII terminal can say otherwise.
_SAID = {
    "−": "-",
    "–": "-",
    "—": "-",
    "±": "+/-",
    "×": "x",
    "…": "...",
    "·": "-",
    "√": "sqrt",
    "‖": "||",
    "Δ": "d",
}
_SAID |= {
    "λ": "lambda",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "ε": "epsilon",
    "✓": "ok",
    "✗": "broken",
    "∂": "d",
}
_WIDEST = 1000
_INPUT = "pass the shapes that its forward takes by --input"
_LITERALS = {"True": "true", "False": "false", "None": "null"}


def _say(error: UnicodeError) -> tuple[str | bytes, int]:
    """For an encoder that lacks a character: ours in other words, the user's as an escape; none is lost."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = []
    for char in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
        found.append(_SAID.get(char) or plain or char.encode("ascii", "backslashreplace").decode())
    return "".join(found), error.end


codecs.register_error("nfnets", _say)


def speak_its_encoding(*streams: TextIO) -> None:
    """Let nothing that is printed fail for a terminal that is not UTF-8."""
    for stream in streams:
        with suppress(AttributeError, ValueError):  # a stream of somebody else's
            stream.reconfigure(errors="nfnets")  # pyright: ignore[reportAttributeAccessIssue]


def one_line(error: object) -> str:
    """An error's message in one line; what is longer than a line of paths and names is cut in its middle.

    Example:
        >>> one_line("arm " + 500 * "x" + ": expected less")
        'arm xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…xxxxxxxxxxxxxxxxxxxx: expected less'
    """
    text = re.sub(
        r"\S{300,}", lambda found: f"{found[0][:36]}…{found[0][-21:]}", " ".join(str(error).split())
    )
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST // 2]} … {text[-_WIDEST // 2 :]}"


# How the library's remedies are said in a shell; whatever is name=True in Python is name=true here.
_REMEDIES = {
    "pass example inputs that model(*inputs) accepts": _INPUT,
    "pass inputs (and a batch of two or more, for batch statistics) that model(*inputs) accepts": _INPUT,
    "pass what model(*inputs) takes": _INPUT,
    "pass backward=True": "pass --backward",
    "strict=False": "-o strict=false",
    "pass norms='all'": "pass --norms all",
    "set data_dir": "pass --data-dir",
    "pass data_dir": "pass --data-dir",
    "pass batch_size=": "pass --batch-size ",
}


def told(error: BaseException) -> str:
    """A user's error as the shell says it: its remedy in options, and where in the user's own code it came from.

    Example:
        >>> told(ValueError("momentum=0: expected nesterov=False; pass backward=True"))
        'momentum=0: expected nesterov=false; pass --backward'
    """
    text = str(error)
    for python, shell in _REMEDIES.items():
        text = text.replace(python, shell)
    text = re.sub(r"\b(\w+=)(True|False|None)\b", lambda found: found[1] + _LITERALS[found[2]], text)
    place = "" if error.__cause__ is None else where(error.__cause__)
    return one_line(f"{text} ({place})" if place and place not in text else text)


def where(error: BaseException) -> str:
    """The file and the line of the user's own code that an error comes from; "" where none of it is theirs.

    Example:
        >>> where(KeyError("never raised"))
        ''
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_near(error.filename)}, line {error.lineno}"
    ours = Path(__file__).parent
    # In a clone two of our three folders stand beside this one.
    foreign = [ours, ours.parent / "init", ours.parent / "train", Path(sysconfig.get_path("stdlib"))]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        installed = {"site-packages", "dist-packages"} & set(file.parts)
        if file.is_file() and not installed and not any(file.is_relative_to(folder) for folder in foreign):
            return f"{_near(frame.filename)}, line {frame.lineno}"
    return ""


def _near(filename: str) -> str:
    """A path as it is seen from where the user is."""
    file = Path(filename)
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else filename


# No markup, no emoji: a path or an arm's name in brackets is text. Piped or logged, nothing is 80 columns wide.
console = Console(
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120, markup=False, emoji=False
)
