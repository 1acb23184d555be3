"""What could not be measured or estimated, and why: one line each, the same from a profile and from a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from nfnets.signal.measured import Point
from nfnets.signal.rules import sick_gradients

# Below so many values a variance is off by a quarter, and a unit seems dead by chance.
_FEW = 32


def empty_input(inputs: Any) -> str | None:
    """Why nothing can be measured, where an input holds no value at all.

    Args:
        inputs: what the model is called with.

    Returns:
        A line, or `None`.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            return f"input of shape {tuple(leaf.shape)}: expected at least one sample; pass a batch"
    return None


def of_output(output: Any) -> list[str]:
    """What a model returns that has no statistics.

    Args:
        output: what it returned.

    Returns:
        Lines.
    """
    if any(isinstance(t, Tensor) and not t.is_floating_point() for t in tree_leaves(output)):
        return ["an output is not floating point and was not measured"]
    return []


def of_patterns(patterns: Sequence[str]) -> list[str]:
    """Patterns of `include` and `exclude` that choose nothing.

    Args:
        patterns: those.

    Returns:
        Lines.
    """
    return [f"no point's name matches the pattern {pattern!r}" for pattern in patterns]


def of_points(points: Sequence[Point]) -> list[str]:
    """What the points of one model do not tell, or tell coarsely, and where values are not finite.

    Args:
        points: in execution order, step by step.

    Returns:
        Lines.
    """
    notes = []
    if any(p.shape and p.shape[0] == 1 for p in points):
        notes.append("a batch of one: cosine and rank between samples cannot be estimated")
    few = list(dict.fromkeys(p.name for p in points if p.count < _FEW))
    if few:
        shown = ", ".join(few[:3]) + (", …" if len(few) > 3 else "")
        notes.append(
            f"fewer than {_FEW} values a channel at {len(few)} points ({shown}): variance and dead are coarse"
        )
    bad = [p for p in points if p.nonfinite]
    if bad:
        notes.append(f"NaN or inf first at {_first(bad)}")
    steps = {p.step for p in bad}
    # Backwards the last layer comes first; of a step whose outputs are not finite its gradients cannot be.
    wrong = [p for p in points if p.step not in steps and sick_gradients(p)]
    if wrong:
        earliest = [p for p in wrong if p.step == wrong[0].step]
        notes.append(f"NaN or inf in the gradient, backwards first at {_first(earliest[::-1], len(wrong))}")
    return notes


def _first(points: Sequence[Point], count: int | None = None) -> str:
    first = points[0]
    when = f" at step {first.step}" if first.step else ""
    return f"{first.name}{when} ({count or len(points)} points in all)"
