"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate(
    step: int,
    *,
    peak: float,
    total: int,
    warmup: int = 0,
    floor: float = 0.0,
    falls: Sequence[int] | None = None,
    factor: float = 0.1,
) -> float:
    """Linear warm-up from 0, then a half cosine to the floor, or falls by a factor.

    lr(t) = peak · (t + 1) / (W + 1) for t < W, else floor + ½ (peak − floor)(1 + cos(π (t − W) / (T − W))).

    With `falls`, lr(t) = peak · factor^(number of falls at most t) instead of the cosine.

    Args:
        step: t, optimizer steps done so far (the first step has t = 0).
        peak: the highest learning rate.
        total: T, steps of the whole run; from T on the rate is the floor.
        warmup: W, steps of warm-up, at most T. It starts at peak / (W + 1), not 0: a step at rate 0 is
            wasted.
        floor: the rate at the end of the cosine.
        falls: steps from which on the rate is a factor lower; none of them is a constant rate. None is the cosine.
        factor: of each fall.

    Returns:
        The learning rate of that step.

    Raises:
        ValueError: for a negative step, or a warm-up longer than the run.

    Example:
        >>> [round(learning_rate(t, peak=1.0, total=4), 3) for t in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
        >>> [learning_rate(t, peak=1.0, total=7, warmup=3) for t in range(4)]
        [0.25, 0.5, 0.75, 1.0]
        >>> [learning_rate(t, peak=1.0, total=4, falls=[1, 3], factor=0.5) for t in range(4)]
        [1.0, 0.5, 0.5, 0.25]

    Reference:
        Loshchilov and Hutter, arXiv 1608.03983; timm's `CosineLRScheduler` with `warmup_prefix=True`.
    """
    if step < 0 or not 0 <= warmup <= total:
        raise ValueError(
            f"step={step}, warmup={warmup}, total={total}: expected step ≥ 0, 0 ≤ warmup ≤ total"
        )
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if falls is not None:
        return peak * factor ** sum(step >= fall for fall in falls)
    if step >= total:
        return floor
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
