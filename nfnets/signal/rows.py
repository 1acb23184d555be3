"""What one sampled step leaves on the host, point by point: merged across ranks, then made into the report's rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nfnets.predict import Predicted
from nfnets.signal.measured import Point
from nfnets.signal.points import Place
from nfnets.signal.summary import Stats, finish, merge_stats

_FP16_MAX = torch.finfo(torch.float16).max
_BF16_MAX = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class RawPoint:
    """One point of one step, before averages are taken.

    Attributes:
        place: which point.
        shape: of the output (on one rank).
        dtype: of the output.
        output: its statistics.
        gradient: those of the loss's gradient by it.
        residual: at a join, those of the branch end.
        scale: α², where the branch end's layer holds α.
        predicted: what theory expects of the output.
        predicted_residual_var: what theory expects at the branch end, before α.
        weight_norm: L2 norm of the layer's weight.
        weight_grad_norm: that of its gradient.
        update_ratio: ‖ΔW‖ / ‖W‖.
        clipped: fraction of the weight's units that AGC clips.
        layer: further columns, of what the layer is.
    """

    place: Place
    shape: tuple[int, ...]
    dtype: str
    output: Stats
    gradient: Stats | None = None
    residual: Stats | None = None
    scale: float = 1.0
    predicted: Predicted | None = None
    predicted_residual_var: float | None = None
    weight_norm: float | None = None
    weight_grad_norm: float | None = None
    update_ratio: float | None = None
    clipped: float | None = None
    layer: Mapping[str, Any] = field(default_factory=dict)


def merge_rows(ranks: Sequence[Sequence[RawPoint]]) -> list[RawPoint]:
    """One step's rows over all ranks: what each rank measured on its part of the batch, as if measured on the whole.

    Args:
        ranks: the rows of every rank. Where control flow differs, a point is merged over the ranks that have it.

    Returns:
        Rows in the order of the first rank, then those only later ranks have.
    """
    groups: dict[str, list[RawPoint]] = {}
    for rows in ranks:
        for row in rows:
            groups.setdefault(row.place.name, []).append(row)
    return [_merged(group) for group in groups.values()]


def _merged(group: list[RawPoint]) -> RawPoint:
    first = group[0]
    same = [row for row in group if row.output.moments.mean.shape == first.output.moments.mean.shape]

    def over(name: str) -> Stats | None:
        known = [value for row in same if (value := getattr(row, name)) is not None]
        return merge_stats(known) if known else None

    return replace(
        first,
        output=merge_stats([r.output for r in same]),
        gradient=over("gradient"),
        residual=over("residual"),
    )


def points(rows: Sequence[RawPoint], model: str, step: int = 0) -> list[Point]:
    """The report's rows.

    Args:
        rows: of one step.
        model: the model's name.
        step: the sampled step.

    Returns:
        One `Point` per row.
    """
    kept = [s for r in rows for s in (r.output, r.gradient, r.residual) if s is not None]
    finished = iter(finish(kept))
    out = []
    for row in rows:
        output, gradient, residual = (
            next(finished) if s is not None else None for s in (row.output, row.gradient, row.residual)
        )
        assert output is not None
        place, predicted = row.place, row.predicted
        out.append(
            Point(
                model=model,
                name=place.name,
                kind=place.kind,
                role=place.role,
                feeds=place.feeds,
                depth=place.depth,
                block=place.block,
                call=place.call,
                batch_norm=place.batch_norm,
                step=step,
                shape=row.shape,
                dtype=row.dtype,
                count=row.output.moments.count,
                residual_var=residual["var"] / row.scale if residual else None,
                predicted_mean_sq=predicted.mean_sq if predicted else None,
                predicted_var=predicted.var if predicted else None,
                predicted_residual_var=row.predicted_residual_var,
                weight_norm=row.weight_norm,
                weight_grad_norm=row.weight_grad_norm,
                update_ratio=row.update_ratio,
                clipped=row.clipped,
                **row.layer,
                **_forward(output),
                **_backward(gradient),
            )
        )
    return out


def _forward(s: Mapping[str, float]) -> dict[str, Any]:
    low, high = s["min"], s["max"]
    nonfinite = not (math.isfinite(low) and math.isfinite(high))
    largest = math.nan if nonfinite else max(abs(low), abs(high))

    def defined(name: str) -> float | None:
        # NaN in a finite tensor: undefined there (a batch of one, an all-zero sample), not a sick signal.
        value = s.get(name)
        return value if value is not None and (nonfinite or math.isfinite(value)) else None

    return {
        "mean_sq": s["mean_sq"],
        "var": s["var"],
        "total_mean": s["total_mean"],
        "total_var": s["total_var"],
        "dead": defined("dead"),
        "quiet": defined("quiet"),
        "min": low,
        "max": high,
        "nonfinite": nonfinite,
        "headroom_fp16": math.log2(_FP16_MAX / largest) if largest > 0 else None,
        "headroom_bf16": math.log2(_BF16_MAX / largest) if largest > 0 else None,
        "cosine": defined("cosine"),
        "rank": defined("rank"),
    }


def _backward(s: Mapping[str, float] | None) -> dict[str, Any]:
    if s is None:
        return {}
    return {
        "grad_mean_sq": s["mean_sq"],
        "grad_var": s["var"],
        "grad_norm": s["norm"],
        "grad_min": s["min"],
        "grad_max": s["max"],
    }
