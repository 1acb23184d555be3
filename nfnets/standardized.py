"""Scaled-standardized weights and their biases, of one layer or of many at once, in one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Given(NamedTuple):
    """What the effective weight and bias of a layer are made of: Ŵ = scale · gain · standardized W, bias_scale · bias.

    Args:
        weight: filters, any rank from 2 up.
        gain: (units,), or None for 1.
        bias: (units,), or None.
        scale, bias_scale: 0-dim, or None for 1.
        eps, unit_dim, groups: as `nfnets.functional.scaled_weight_standardization` takes them.
    """

    weight: Tensor
    gain: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    bias_scale: Tensor | None
    eps: float
    unit_dim: int = 0
    groups: int = 1


def standardized(layers: Sequence[Given]) -> list[tuple[Tensor, Tensor | None]]:
    """Effective weight and bias of every layer; no argument is checked.

    Example:
        >>> layer = Given(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), None, torch.ones(1), None, torch.tensor(2.0), 1e-4)
        >>> standardized([layer])
        [(tensor([[-0.6708, -0.2236,  0.2236,  0.6708]]), tensor([2.]))]
    """
    if _by_formula(layers):
        return [_written_out(layer) for layer in layers]
    flat = _Standardized.apply(layers, *(t for part in zip(*(x[:3] for x in layers), strict=True) for t in part))
    return list(zip(flat[: len(layers)], flat[len(layers) :], strict=True))


def standardize_rows(rows: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula, written with PyTorch's differentiable functions: one filter a row of `rows` (units, N).

    Example:
        >>> standardize_rows(torch.tensor([[1e-3, 2e-3, 3e-3, 4e-3]]), torch.ones(1), 1e-4)
        tensor([[-0.1500, -0.0500,  0.0500,  0.1500]])
    """
    variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    factor = (variance * rows.shape[1]).clamp_min(eps).rsqrt() * gain.unsqueeze(1)
    return torch.addcmul(-mean * factor, rows, factor)


def _by_formula(layers: Sequence[Given]) -> bool:
    # A compiler fuses the formula, and a tracer can store it; functional transforms and forward-mode derivatives know
    # every step of it, and so does a scale that learns.
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(s is not None and s.requires_grad for layer in layers for s in layer[3:5])  # type: ignore[union-attr]
    )


def _written_out(layer: Given) -> tuple[Tensor, Tensor | None]:
    weight, gain, bias, scale, bias_scale, eps, unit_dim, groups = layer
    rows = _rows(weight, unit_dim, groups)
    factor = rows.new_ones(rows.shape[0]) if gain is None else gain.to(rows.dtype)
    rows = standardize_rows(rows, factor if scale is None else factor * scale, eps)
    return _as_weight(rows, weight, unit_dim, groups), (
        bias if bias is None or bias_scale is None else bias * bias_scale
    )


class _Standardized(torch.autograd.Function):
    """One fused kernel forward and one backward for every weight.

    Group normalization with a group per unit computes g · (W − μ) · r, r = 1/sqrt(v), in a sixth of the time that
    `var_mean` takes on a CPU. With g = scale · gain / √N that is the answer, but for units below the floor; those are
    looked for, which costs less than another pass over the weight, and put right. Its backward is ours but for the
    same units, which must not feel the variance.
    """

    TINY = 1e-30  # keeps r finite for constant filters; too small to be seen in any v above the floor
    FAINT = 1e-12  # their r for the backward kernel: the variance's part goes with its square

    @staticmethod
    def forward(ctx: Any, layers: Sequence[Given], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, biases, saved, ctx.how = [], [], [], []
        for layer in layers:
            weight, gain, bias, scale, bias_scale, eps, unit_dim, groups = layer
            rows = _rows(weight, unit_dim, groups).contiguous()
            units, n = rows.shape
            # A GPU is not asked: that would wait for it.
            asked = rows.is_cpu and type(rows) is Tensor and not is_in_torch_dispatch_mode()
            scale, bias_scale = _number(scale, asked), _number(bias_scale, asked)
            factor = rows.new_ones(units) if gain is None else gain.to(rows.dtype)
            factor = factor * (scale * n**-0.5)
            fused = factor if rows.is_cpu else None
            out, mean, r = torch.native_group_norm(rows, fused, None, 1, units, n, units, _Standardized.TINY)
            limit = (n / eps) ** 0.5
            below = not asked or not r.max().item() <= limit  # a NaN counts, or it would hide the others
            if fused is None:
                out.mul_((factor * (limit / r.clamp_min(limit))).view(units, 1))
            elif below:
                exact = (rows - mean.view(units, 1)) * (limit * factor).view(units, 1)
                out = torch.where(r.view(units, 1) > limit, exact, out)
            weights.append(_as_weight(out, weight, unit_dim, groups))
            biases.append(None if bias is None else bias * bias_scale)
            saved += weight, gain, factor, mean, r
            ctx.how.append((scale, bias_scale, limit if below else None, eps, unit_dim, groups))
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return *weights, *biases

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, saved, needed = len(ctx.how), ctx.saved_tensors, ctx.needs_input_grad[1:]
        found: list[Tensor | None] = [None] * (3 * count)
        # To be differentiated again: as functions of the weight, not of μ and r.
        pull_back = _pulled_back_by_formula if torch.is_grad_enabled() else _pulled_back
        for i, how in enumerate(ctx.how):
            if (grad := grads[i]) is not None:
                wanted = needed[i], needed[i + count]
                found[i], found[i + count] = pull_back(grad, *saved[5 * i : 5 * i + 5], how, wanted)
            if (grad := grads[i + count]) is not None:
                found[i + 2 * count] = grad * how[1]
        return None, *found


def _pulled_back(
    grad: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    factor: Tensor,
    mean: Tensor,
    r: Tensor,
    how: tuple[Any, ...],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight and the gain, by those of the standardized weight."""
    scale, _, limit, _, unit_dim, groups = how
    rows, grad = _rows(weight, unit_dim, groups).contiguous(), _rows(grad, unit_dim, groups).contiguous()
    units, n = rows.shape
    own: Any = scale * n**-0.5
    if limit is not None:
        below = r > limit
        r, ratio = torch.where(below, _Standardized.FAINT, r), torch.where(below, limit / _Standardized.FAINT, 1.0)
        factor, own = factor * ratio.view(units), own * ratio.view(units)
    d_rows, d_factor, _ = torch.ops.aten.native_group_norm_backward(
        grad, rows, mean, r, factor, 1, units, n, units, [*wanted, False]
    )
    return (
        _as_weight(d_rows, weight, unit_dim, groups) if wanted[0] else None,
        (d_factor * own).to(gain.dtype) if wanted[1] and gain is not None else None,
    )


def _pulled_back_by_formula(
    grad: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    factor: Tensor,
    mean: Tensor,
    r: Tensor,
    how: tuple[Any, ...],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    scale, _, _, eps, unit_dim, groups = how
    rows, grad = _rows(weight, unit_dim, groups), _rows(grad, unit_dim, groups)
    variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    spread = variance * rows.shape[1]
    r = spread.clamp_min(eps).rsqrt()
    total = grad.sum(1, keepdim=True)
    unit = r * ((grad * rows).sum(1, keepdim=True) - total * mean)
    through_variance = (rows - mean) * (unit * torch.where(spread < eps, 0.0, r.square()))
    d_rows = (r * (grad - total / rows.shape[1]) - through_variance) * scale
    if gain is not None:
        d_rows = d_rows * gain.to(rows.dtype).unsqueeze(1)
    return (
        _as_weight(d_rows, weight, unit_dim, groups),
        None if gain is None else (unit.squeeze(1) * scale).to(gain.dtype),
    )


def _number(scale: Tensor | None, asked: bool) -> Any:
    """A factor as a number where reading it costs nothing."""
    return 1.0 if scale is None else scale.item() if asked and scale.is_cpu else scale


def _rows(weight: Tensor, unit_dim: int, groups: int) -> Tensor:
    """A row for each unit, in at least fp32."""
    full = weight.float() if weight.dtype.itemsize < 4 else weight
    if unit_dim == 1:  # (in, out/groups, k…) → (out, in/groups, k…)
        full = full.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return full.reshape(full.shape[0], -1)


def _as_weight(rows: Tensor, weight: Tensor, unit_dim: int, groups: int) -> Tensor:
    """What `_rows` made of a tensor like `weight`, as that was."""
    shape = weight.shape
    if unit_dim == 1:
        rows = rows.view(groups, shape[1], shape[0] // groups, *shape[2:]).transpose(1, 2)
    return rows.reshape(shape).to(weight.dtype)
