"""How scaled weight standardization is computed: by the formula, or by the kernels of group normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_TINY = 1e-30  # keeps 1/sqrt(v) finite for constant filters; too small to be seen in any v above the floor


def standardize_rows(rows: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula, written with PyTorch's differentiable functions: one filter a row of `rows` (units, N).

    Example:
        >>> standardize_rows(torch.tensor([[1e-3, 2e-3, 3e-3, 4e-3]]), torch.ones(1), 1e-4)
        tensor([[-0.1500, -0.0500,  0.0500,  0.1500]])
    """
    variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    factor = (variance * rows.shape[1]).clamp_min(eps).rsqrt() * gain.unsqueeze(1)
    return torch.addcmul(-mean * factor, rows, factor)


def standardized_rows(rows: Tensor, gain: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    """`standardize_rows` by scale · gain, each 1 if None, in the fastest way that there is here.

    Group normalization with a group per unit computes g · (W − μ) · r, r = 1/sqrt(v), in a sixth of the time that
    `var_mean` takes on a CPU. With g = scale · gain / √N that is the answer, and PyTorch's own derivatives of it are
    ours, unless a unit is below the floor. To look for one costs less than another pass over the weight.

    Example:
        >>> standardized_rows(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), None, torch.tensor(2.0), 1e-4)
        tensor([[-1.3416, -0.4472,  0.4472,  1.3416]])
    """
    units, n = rows.shape
    by_formula = _by_formula()
    if not by_formula and _can_be_asked(rows, scale):
        factor = n**-0.5 if scale is None else scale.item() * n**-0.5
        factors = rows.new_full((units,), factor) if gain is None else gain * factor
        out, _, r = torch.native_group_norm(rows, factors, None, 1, units, n, units, _TINY)
        if r.detach().max().item() <= (n / eps) ** 0.5:
            return out
    gain = rows.new_ones(units) if gain is None else gain
    gain = gain if scale is None else gain * scale
    return standardize_rows(rows, gain, eps) if by_formula else _Floored.apply(rows, gain, eps)  # type: ignore[no-any-return]


def _by_formula() -> bool:
    # A compiler fuses the formula, and a tracer can store it; functional transforms and forward-mode derivatives know
    # every step of it.
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _can_be_asked(rows: Tensor, scale: Tensor | None) -> bool:
    """Whether reading a number costs nothing, and nobody wants it to be computed instead."""
    if not rows.is_cpu or type(rows) is not Tensor or is_in_torch_dispatch_mode():
        return False
    return scale is None or (scale.is_cpu and not scale.requires_grad)


class _Floored(torch.autograd.Function):
    """`standardize_rows` where units may be below the floor, without asking: for those, and for GPUs.

    Group normalization's (W − μ) · r, times gain / max(√N, r · √eps). Its backward is ours but for units below the
    floor, which must not feel the variance.
    """

    FAINT = 1e-12  # their r for the backward kernel: the variance's part goes with its square

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gain: Tensor, eps: float) -> Tensor:
        units, n = rows.shape
        normal, mean, r = torch.native_group_norm(rows, None, None, 1, units, n, units, _TINY)
        ctx.save_for_backward(rows, gain, mean, r)
        ctx.eps = eps
        return normal.mul_((gain / (r.view(units) * eps**0.5).clamp_min(n**0.5)).unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None]:
        grad: Tensor = grad_outputs[0]
        rows, gain, mean, r = ctx.saved_tensors
        units, n = rows.shape
        if torch.is_grad_enabled():  # to be differentiated again: as functions of the weights, not of μ and r
            variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
            spread = variance * n
            factor = spread.clamp_min(ctx.eps).rsqrt()
            total = grad.sum(1, keepdim=True)
            unit = factor * ((grad * rows).sum(1, keepdim=True) - total * mean)
            pull = torch.where(spread < ctx.eps, 0.0, factor.square())
            centered = (rows - mean) * (pull * unit)
            return gain.unsqueeze(1) * (factor * (grad - total / n) - centered), unit.squeeze(1), None
        floor = r * ctx.eps**0.5
        factor = r / floor.clamp_min(n**0.5)
        r = torch.where(floor > n**0.5, _Floored.FAINT, r)
        ratio = (factor / r).view(units)
        d_rows, d_weight, _ = torch.ops.aten.native_group_norm_backward(
            *(grad.contiguous(), rows, mean, r, gain * ratio, 1, units, n, units),
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        return d_rows, d_weight * ratio if ctx.needs_input_grad[1] else None, None
