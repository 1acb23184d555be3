"""What layers really put out, beside what an initializer promised of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.graph import Node
from nfnets.scale.knob import channel_dim
from nfnets.scale.report import Report
from nfnets.scale.target import channel_moments
from nfnets.trace import trace

SAMPLES = 32
"""So many samples are compared with each other."""


def measured(report: Report, model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    """The same report with what a forward pass measured at the first call of every layer in it.

    Args:
        report: of an initializer; rows of tensors that are no module's (scalars) stay as they are.
        model: as the initializer left it.
        inputs, kwargs: what its forward takes.

    Returns:
        A report with `std`, `channel_var`, `channel_mean_sq`, `rms` and `cosine` filled where they can be.
    """
    wanted = {row.path for row in report.rows}
    found: dict[str, dict[str, float]] = {}

    def visit(node: Node, output: Tensor) -> None:
        if node.kind == "module" and node.path in wanted and node.path not in found:
            found[node.path] = _numbers(node.module, output)

    trace(model, *inputs, visit=visit, **kwargs)
    rows = []
    for row in report.rows:  # what the initializer measured itself stays
        new = {
            name: value for name, value in found.get(row.path, {}).items() if math.isnan(getattr(row, name))
        }
        rows.append(replace(row, **new))
    return Report(report.title, rows, report.assumed, report.constants)


def _numbers(module: nn.Module | None, output: Tensor) -> dict[str, float]:
    if not output.is_floating_point() or output.numel() < 2 or output.ndim < 2:
        return {}
    dim = channel_dim(module) if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) else 1 - output.ndim
    mean, var = channel_moments(output, dim)
    total = float(var.mean()) + float(mean.square().mean())
    spread = total - float(mean.mean()) ** 2
    return {
        "std": math.sqrt(max(0.0, spread)) if math.isfinite(spread) else math.nan,
        "channel_var": float(var.mean()),
        "channel_mean_sq": float(mean.square().mean()),
        "rms": math.sqrt(total) if math.isfinite(total) else math.nan,
        "cosine": mean_cosine(output),
    }


def mean_cosine(output: Tensor) -> float:
    """Mean cosine between two different samples, of the first 32; NaN for one sample, or one that is all zeros.

    Example:
        >>> round(mean_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]])) ** 2, 6)
        0.5
    """
    rows = output[:SAMPLES].flatten(1).double()
    norms = rows.norm(dim=1)
    if len(rows) < 2 or not bool((norms > 0).all()) or not bool(torch.isfinite(norms).all()):
        return math.nan
    rows = rows / norms[:, None]
    count = len(rows)
    return float((rows @ rows.T).sum() - count) / (count * (count - 1))
