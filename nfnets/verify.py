"""Proof by test: batch independence, and that two models compute the same function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nfnets.errors import UserError
from nfnets.trace import fresh, preserved


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found; true if it passed.

    Example:
        >>> bool(Verdict("batch independence", True, 0.0, "…"))
        True
    """

    check: str
    passed: bool
    worst: float
    """The largest deviation that was seen."""
    detail: str

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.check}: {self.detail}"


def batch_independence(model: nn.Module, *inputs: Any, rtol: float = 1e-4) -> Verdict:
    """Whether a sample's output and gradient do not depend on the samples beside it, in training mode.

    The first sample's output must stay when every other sample changes, and ∂ output_0 / ∂ input_j must be zero for
    j ≠ 0. Dropout and stochastic depth draw the same masks both times.

    Args:
        model: left as it was, buffers and modes included.
        *inputs: tensors with samples in dimension 0; at least two samples.
        rtol: tolerance of the output comparison, relative to the output's largest magnitude.

    Returns:
        A `Verdict`.

    Raises:
        UserError: fewer than two samples, or no floating-point tensor among inputs or outputs.

    Example:
        >>> bool(batch_independence(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)))
        True
        >>> bool(batch_independence(nn.BatchNorm2d(3), torch.randn(2, 3, 8, 8)))
        False
    """
    floats = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.is_floating_point()]
    if not floats or min(len(t) for t in floats) < 2:
        sizes = [tuple(t.shape) for t in floats]
        raise UserError(
            f"inputs of shapes {sizes}: expected float tensors with 2 samples or more in dimension 0"
        )
    check = "batch independence"
    with preserved(model), torch.enable_grad():
        model.train()
        watched = tree_map_only(Tensor, _watched, inputs)
        torch.manual_seed(0)
        first = _first(model(*fresh(watched)))
        total = sum((out * torch.linspace(1, 2, out.numel()).to(out).view_as(out)).sum() for out in first)
        leaves = [t for t in tree_leaves(watched) if isinstance(t, Tensor) and t.requires_grad]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
        leak = max([0.0, *(float(g[1:].abs().max()) for g in gradients if g is not None)])
        others = tree_map_only(Tensor, _with_other_neighbors, inputs)
        torch.manual_seed(0)
        with torch.no_grad():
            second = _first(model(*others))
    first = [t.detach() for t in first]
    scale = max(float(a.abs().max()) for a in first) or 1.0
    moved = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / scale
    detail = (
        f"other samples move an output by {moved:.1e} (relative), its gradient reaches them with {leak:.1e}"
    )
    return Verdict(check, moved <= rtol and leak == 0.0, max(moved, leak), detail)


def same_function(a: nn.Module, b: nn.Module, *inputs: Any, rtol: float = 1e-4) -> Verdict:
    """Whether two models give the same outputs in evaluation mode.

    ‖a(x) − b(x)‖ ≤ rtol · ‖a(x)‖ over every output tensor.

    Args:
        a: a model, left as it was.
        b: another one that takes the same inputs.
        *inputs: what both forwards take.
        rtol: allowed relative difference in the 2-norm.

    Returns:
        A `Verdict`.

    Raises:
        UserError: the outputs differ in number or shape.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> bool(same_function(layer, layer, torch.randn(4, 3)))
        True
    """
    results = []
    for model in (a, b):
        with preserved(model), torch.no_grad():
            model.eval()
            results.append([t for t in tree_leaves(model(*fresh(inputs))) if isinstance(t, Tensor)])
    shapes = [[tuple(t.shape) for t in result] for result in results]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise UserError(
            f"outputs of shapes {shapes[0]} and {shapes[1]}: expected two models with the same outputs"
        )
    worst = 0.0
    for x, y in zip(*results, strict=True):
        norm = float(x.double().norm())
        difference = float((x.double() - y.double()).norm())
        worst = max(worst, difference / norm if norm else difference)
    return Verdict("same function", worst <= rtol, worst, f"outputs differ by {worst:.1e} (relative, 2-norm)")


def _watched(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _with_other_neighbors(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    if tensor.is_floating_point():
        changed[1:] = 1.7 * tensor[1:].flip(-1) + 0.5
    return changed


def _first(outputs: Any) -> list[Tensor]:
    found = [
        t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 0
    ]
    if not found:
        raise UserError("the model's output holds no float tensor with a batch dimension: nothing to compare")
    return [t[0] for t in found]
