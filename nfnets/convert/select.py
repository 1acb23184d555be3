"""Conversion of a part of a model: which norm layers the user's patterns choose."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from nfnets.convert.plan import Row
from nfnets.convert.sites import Site
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


def chosen_sites(
    sites: list[Site], include: Patterns = None, exclude: Patterns = None
) -> tuple[list[Site], list[Row]]:
    """Sites to convert, and a row for each one that is left.

    Args:
        sites: all norm layers.
        include: patterns; None for all.
        exclude: patterns; None for none. It wins over `include`.

    Raises:
        UserError: a pattern that fits no norm layer.
    """
    wanted, unwanted = _checked(sites, include), _checked(sites, exclude)
    chosen, left = [], []
    for site in sites:
        reason = ""
        if wanted is not None and not any(matches(site.path, pattern) for pattern in wanted):
            reason = f"not among include={list(wanted)}"
        against = next((p for p in unwanted or () if matches(site.path, p)), None)
        reason = reason if against is None else f"exclude={against!r}"
        if reason:
            norm = type(site.norm).__name__
            left.append(Row(site.path, site.role, "leave", "", reason, norm=norm, reads=site.reads))
        else:
            chosen.append(site)
    return chosen, left


def _checked(sites: list[Site], patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if sites and not any(matches(site.path, pattern) for site in sites):
            raise unknown("pattern of norm layers", pattern, [site.path for site in sites])
    return listed
