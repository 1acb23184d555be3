"""Proof by test: batch independence, and that two models compute the same function."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nfnets.errors import UserError, first_line
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
    """The largest deviation that was seen; NaN if something was not finite."""
    detail: str

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.check}: {self.detail}"


def batch_independence(
    model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None, rtol: float = 1e-4
) -> Verdict:
    """Whether a sample's output and gradient do not depend on the samples beside it, in training mode.

    The first sample's output must stay when every other sample changes, and ∂ output_0 / ∂ input_j must be zero for
    j ≠ 0. Dropout and stochastic depth draw the same masks both times, RReLU takes its mean slope, and both passes
    start from the same buffers. An output or gradient that is not finite fails.

    Args:
        model: left as it was, buffers and modes included.
        *inputs: tensors with samples in dimension 0; at least two samples.
        kwargs: inputs that the forward takes by keyword, of the same kind.
        rtol: tolerance of the output comparison, relative to the output's largest magnitude.

    Returns:
        A `Verdict`.

    Raises:
        UserError: fewer than two samples, no floating-point or complex tensor among inputs or outputs, or inputs that
            the model rejects.

    Example:
        >>> bool(batch_independence(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)))
        True
        >>> bool(batch_independence(nn.BatchNorm2d(3), torch.randn(2, 3, 8, 8)))
        False
    """
    given = (inputs, dict(kwargs or {}))
    batched = [t for t in tree_leaves(given) if _varies(t)]
    if not batched or min(len(t) for t in batched) < 2:
        sizes = [tuple(t.shape) for t in batched]
        raise UserError(
            f"inputs of shapes {sizes}: expected float tensors with 2 samples or more in dimension 0"
        )
    with _training(model), torch.enable_grad():
        watched = tree_map_only(Tensor, _watched, given)
        first = _first(_run(model, fresh(watched)))
        # No model need be differentiable. `backward` and not `grad`, which reentrant checkpoints refuse.
        differentiable = [_weighed(out) for out in first if out.requires_grad]
        if differentiable:
            torch.autograd.backward(differentiable)
        gradients = [t.grad for t in tree_leaves(watched) if isinstance(t, Tensor) and t.grad is not None]
        leak = _largest(g[1:] for g in gradients)
        first = [t.detach() for t in first]
    with _training(model), torch.enable_grad():  # as before, for whoever looks
        others = tree_map_only(Tensor, lambda t: _watched(_with_other_neighbors(t)), given)
        second = [t.detach() for t in _first(_run(model, fresh(others)))]
    moved = _largest(a - b for a, b in zip(first, second, strict=True)) / (_largest(first) or 1.0)
    detail = (
        f"other samples move an output by {moved:.1e} (relative), its gradient reaches them with {leak:.1e}"
    )
    worst = _worst([moved, leak])
    if not math.isfinite(worst):
        detail = f"not finite: {detail}"
    return Verdict("batch independence", moved <= rtol and leak == 0.0, worst, detail)


def same_function(
    a: nn.Module,
    b: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    rtol: float = 1e-4,
) -> Verdict:
    """Whether two models give the same outputs in evaluation mode.

    ‖a(x) − b(x)‖ ≤ rtol · ‖a(x)‖ over every output tensor. An output that is not finite fails, even if both are not.

    Args:
        a: a model, left as it was.
        b: another one that takes the same inputs.
        *inputs: what both forwards take.
        kwargs: inputs that both forwards take by keyword.
        rtol: allowed relative difference in the 2-norm.

    Returns:
        A `Verdict`.

    Raises:
        UserError: the outputs differ in number or shape, or a model rejects the inputs.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> bool(same_function(layer, layer, torch.randn(4, 3)))
        True
    """
    results = []
    for model in (a, b):
        with preserved(model), torch.no_grad():
            model.eval()
            outputs = tree_leaves(_run(model, fresh((inputs, dict(kwargs or {})))))
            results.append([_wide(t) for t in outputs if isinstance(t, Tensor)])
    shapes = [[tuple(t.shape) for t in result] for result in results]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise UserError(
            f"outputs of shapes {shapes[0]} and {shapes[1]}: expected two models with the same outputs"
        )
    worst = _worst(float((x - y).norm()) / (float(x.norm()) or 1.0) for x, y in zip(*results, strict=True))
    detail = f"outputs differ by {worst:.1e} (relative, 2-norm)"
    odd = [sum(int((~t.isfinite()).sum()) for t in result) for result in results]
    if any(odd):
        detail = f"not finite: {odd[0]} values that the first model puts out, {odd[1]} of the second's"
    return Verdict("same function", worst <= rtol, worst, detail)


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode from a fixed seed, its parameters constants; everything is put back."""
    trained = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
    with preserved(model):
        model.train()
        for module in model.modules():
            # How many slopes it draws depends on signs, so that no seed gives a sample the same ones again.
            if isinstance(module, nn.RReLU):
                module.training = False
        torch.manual_seed(0)
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def _run(model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = given
    try:
        return model(*args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(given) if isinstance(t, Tensor))
        mode = "training" if model.training else "evaluation"
        raise UserError(
            f"the model's forward fails in {mode} mode on inputs {shapes or 'of no tensor'}: {first_line(error)}; "
            "pass inputs that model(*inputs, **kwargs) accepts"
        ) from error


def _varies(value: Any) -> bool:
    """Whether it holds real or complex numbers of samples: no indices, no single number for all."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.ndim > 0


def _watched(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(_varies(tensor))


def _with_other_neighbors(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    if _varies(tensor):
        changed[1:] = 1.7 * tensor[1:].flip(-1) + 0.5
    return changed


def _first(outputs: Any) -> list[Tensor]:
    found = [t for t in tree_leaves(outputs) if _varies(t)]
    if not found:
        raise UserError("the model's output holds no float tensor with a batch dimension: nothing to compare")
    return [torch.view_as_real(t.resolve_conj())[0] if t.is_complex() else t[0] for t in found]


def _weighed(output: Tensor) -> Tensor:
    return (output * torch.linspace(1, 2, output.numel()).to(output).view_as(output)).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _largest(tensors: Iterable[Tensor]) -> float:
    return _worst(t.abs().max().item() for t in tensors if t.numel())


def _worst(deviations: Iterable[float]) -> float:
    """The largest, and NaN if there is one: `max` would pass over it."""
    return torch.tensor([0.0, *deviations], dtype=torch.float64).max().item()
