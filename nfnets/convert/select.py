"""Conversion of a part of a model: which norm layers the user's patterns choose."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from nfnets.errors import unknown

Patterns = str | Sequence[str] | None


def matches(path: str, pattern: str) -> bool:
    """Whether a shell pattern fits a path or one of the modules that it lies in.

    Example:
        >>> matches("layer4.0.bn1", "layer4"), matches("layer4.0.bn1", "*.bn1"), matches("layer4.0.bn1", "layer")
        (True, True, False)
    """
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


def reasons_left(paths: Sequence[str], include: Patterns = None, exclude: Patterns = None) -> dict[str, str]:
    """Why paths are left, for those that are.

    Args:
        paths: of all norm layers.
        include: patterns; None for all.
        exclude: patterns; None for none. It wins over `include`.

    Raises:
        UserError: a pattern that fits no norm layer.

    Example:
        >>> reasons_left(["stem.bn", "head.bn"], exclude="head")
        {'head.bn': "exclude='head'"}
    """
    wanted, unwanted = _checked(paths, include), _checked(paths, exclude)
    left = {}
    for path in paths:
        if wanted is not None and not any(matches(path, pattern) for pattern in wanted):
            left[path] = f"not among include={list(wanted)}"
        against = next((p for p in unwanted or () if matches(path, p)), None)
        if against is not None:
            left[path] = f"exclude={against!r}"
    return left


def _checked(paths: Sequence[str], patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if paths and not any(matches(path, pattern) for path in paths):
            raise unknown("pattern of norm layers", pattern, paths)
    return listed
