"""What a finished run left in result.json, read back from a file that may be cut short or another run's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nfnets.errors import UserError
from nfnets.plain import read_json, shown


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# What reports rely on.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "status": lambda value: value in ("done", "diverged"),
    "steps": _whole,
    "train_seconds": _number,
    "images_per_second": _number,
    "config": lambda value: isinstance(value, dict),
    "hardware": lambda value: isinstance(value, dict),
    "unreadable": lambda value: isinstance(value, dict) and _whole(value.get("count")),
}
_OR_NONE = ("val_accuracy", "val_loss", "test_accuracy", "test_loss", "ece", "peak_memory_mb")


def read_result(path: Path) -> dict[str, Any]:
    """A run's result.

    Args:
        path: of its result.json.

    Returns:
        The content.

    Raises:
        UserError: it is damaged, or no run's.
    """
    result = read_json(path, "a run's result; delete it, and the same command writes it again")
    wrong = [name for name, fits in _FIELDS.items() if not fits(result.get(name))]
    wrong += [name for name in _OR_NONE if not (result.get(name) is None or _number(result[name]))]
    if result.get("status") == "done" and result.get("val_accuracy") is None:
        wrong.append("val_accuracy")
    if wrong:
        given = f"{wrong[0]}={shown(result.get(wrong[0]))}"
        raise UserError(
            f"{path}: not a run's result ({given}); delete it, and the same command writes it again"
        )
    return result
