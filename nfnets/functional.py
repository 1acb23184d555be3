"""Pure functions: scaled weight standardization, TensorFlow's padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nfnets.errors import UserError
from nfnets.given import check_tensor

EPS = 1e-4
"""DeepMind's floor on N·v (arXiv 2102.06171, `nfnets/base.py`: `eps=1e-4` inside `max(N·v, eps)`)."""


def scaled_weight_standardization(
    weight: Tensor,
    gain: Tensor | None = None,
    eps: float = EPS,
    unit_dim: int = 0,
    groups: int = 1,
) -> Tensor:
    """Give every filter zero mean and norm `gain`.

    Ŵ_i = gain_i · (W_i − μ_i) / sqrt(max(N · v_i, eps)), with μ_i the mean and v_i the biased variance of the
    N weights of unit i, so that Σ Ŵ_i = 0 and ‖Ŵ_i‖ = |gain_i| wherever N · v_i ≥ eps. Below the floor the
    denominator is a constant, and no gradient flows through the variance.

    Args:
        weight: filters, any rank from 2 up. A half-precision weight is standardized in fp32 and cast back.
        gain: shape `(units,)`, or None for 1.
        eps: floor on N · v_i. DeepMind's `max` form: unlike `v + eps`, it does not shrink filters as N grows.
        unit_dim: dimension of the output units: 0 for Linear and Conv, 1 for ConvTranspose.
        groups: groups of a transposed convolution, whose dimension 0 holds all groups' inputs; statistics are
            per group. A plain convolution's groups are already separate filters.

    Returns:
        The standardized weight, with the shape and dtype of `weight`.

    Raises:
        UserError: fewer than two dimensions, no weights per unit (fan-in 0), not floating point, `unit_dim`
            neither 0 nor 1, `groups` that do not divide the inputs, `eps` not above 0, or a gain of another shape.

    Example:
        >>> scaled_weight_standardization(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[-0.6708, -0.2236,  0.2236,  0.6708]])

    Paper: arXiv 2101.08692 §4.1, 2102.06171. Checked against deepmind-research `nfnets/base.py`.
    """
    _check(weight, gain, eps, unit_dim, groups)
    full = weight.float() if weight.dtype.itemsize < 4 else weight
    rows = full.flatten(1) if unit_dim == 0 else _units_first(full, groups).flatten(1)
    scale = rows.new_ones(rows.shape[0]) if gain is None else gain.to(rows.dtype)
    # A compiler fuses the formula as written, and a tracer can store it; eager PyTorch runs the fused kernels.
    written_out = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    rows = (standardize_rows if written_out else _standardize)(rows, scale, eps)
    if unit_dim == 1:
        rows = rows.view(groups, weight.shape[1], weight.shape[0] // groups, *weight.shape[2:]).transpose(
            1, 2
        )
    return rows.reshape(weight.shape).to(weight.dtype)


def standardize_rows(rows: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula, written with PyTorch's differentiable functions: one filter a row of `rows` (units, N).

    Example:
        >>> standardize_rows(torch.tensor([[1e-3, 2e-3, 3e-3, 4e-3]]), torch.ones(1), 1e-4)
        tensor([[-0.1500, -0.0500,  0.0500,  0.1500]])
    """
    variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    factor = (variance * rows.shape[1]).clamp_min(eps).rsqrt() * gain.unsqueeze(1)
    return torch.addcmul(-mean * factor, rows, factor)


def pad_same(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    mode: str = "zeros",
) -> Tensor:
    """Pad as TensorFlow's 'SAME': ceil(n / stride) outputs, an odd row or column going to the bottom or right.

    total = max((ceil(n / stride) − 1) · stride + (kernel − 1) · dilation + 1 − n, 0), ⌊total / 2⌋ of it in front.

    Args:
        input: shape (N, C, *space) or (C, *space).
        kernel_size, stride, dilation: one number per spatial dimension.
        mode: a convolution's `padding_mode`.

    Returns:
        The padded input.

    Example:
        >>> pad_same(torch.ones(1, 1, 4), [3], [2], [1])
        tensor([[[1., 1., 1., 1., 0.]]])

    Checked against timm `layers/padding.py`; DeepMind's networks use it throughout.
    """
    pads: list[int] = []
    for n, k, s, d in zip(input.shape[-len(kernel_size) :], kernel_size, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad counts from the last dimension
    return F.pad(input, pads, mode="constant" if mode == "zeros" else mode) if any(pads) else input


def _standardize(rows: Tensor, gain: Tensor, eps: float) -> Tensor:
    return _Standardize.apply(rows, gain, eps)[0]  # type: ignore[no-any-return]


class _Standardize(torch.autograd.Function):
    """`standardize_rows` with one fused kernel and a multiplication forward, and one fused kernel backward.

    Group normalization with a group per unit computes (W − μ) · r, r = 1/sqrt(v), a sixth of the time that `var_mean`
    takes on a CPU; the answer is that, times gain / max(√N, r · √eps). Its backward is ours but for units below the
    floor, which must not feel the variance.
    """

    generate_vmap_rule = True
    TINY = 1e-30  # keeps r finite for constant filters; too small to be seen in any v above the floor
    FAINT = (
        1e-12  # group normalization's r for units below the floor: the variance's part goes with its square
    )

    @staticmethod
    def forward(rows: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        units, n = rows.shape
        normal, mean, r = torch.native_group_norm(
            rows.unsqueeze(0), None, None, 1, units, n, units, _Standardize.TINY
        )
        mean, r = mean.reshape(units, 1), r.reshape(units, 1)
        return normal.squeeze(0).mul_(gain.unsqueeze(1) / (r * eps**0.5).clamp_min(n**0.5)), mean, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, ...]) -> None:
        rows, gain, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, gain, mean, r)
        ctx.save_for_forward(rows, gain, mean, r)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None]:
        grad: Tensor | None = grad_outputs[0]
        if grad is None:
            return None, None, None
        if torch.is_grad_enabled():  # to be differentiated again: as functions of the weights, not of μ and r
            rows, gain, mean, factor, pull = _Standardize._written_out(ctx)
            total = grad.sum(1, keepdim=True)
            unit = factor * ((grad * rows).sum(1, keepdim=True) - total * mean)
            centered = (rows - mean) * (pull * unit)
            return (
                gain.unsqueeze(1) * (factor * (grad - total / rows.shape[1]) - centered),
                unit.squeeze(1),
                None,
            )
        rows, gain, mean, r = ctx.saved_tensors
        units, n = rows.shape
        floor = r * ctx.eps**0.5
        factor = r / floor.clamp_min(n**0.5)
        r = torch.where(floor > n**0.5, _Standardize.FAINT, r)
        weight = gain.unsqueeze(1) * factor / r
        d_rows, d_weight, _ = torch.ops.aten.native_group_norm_backward(
            *(t.unsqueeze(0) for t in (grad.contiguous(), rows)),
            *(t.reshape(1, units) for t in (mean, r)),
            weight.reshape(units),
            *(1, units, n, units),
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        d_gain = d_weight * (factor / r).squeeze(1) if ctx.needs_input_grad[1] else None
        return d_rows.squeeze(0) if ctx.needs_input_grad[0] else None, d_gain, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, None, None]:
        d_rows, d_gain, _ = grad_inputs
        rows, gain, mean, factor, pull = _Standardize._written_out(ctx)
        centered = rows - mean
        out = torch.zeros_like(rows)
        if d_rows is not None:
            shift = d_rows - d_rows.mean(1, keepdim=True)
            along = (centered * shift).sum(1, keepdim=True)
            out = (shift - centered * along * pull) * factor * gain.unsqueeze(1)
        if d_gain is not None:
            out = out + centered * factor * d_gain.unsqueeze(1)
        return out, None, None

    @staticmethod
    def _written_out(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """rows, gain, μ, 1/sqrt(max(N·v, eps)), and 1/(N·v) or 0 below the floor."""
        rows, gain, _, _ = ctx.saved_tensors
        variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
        spread = variance * rows.shape[1]
        factor = spread.clamp_min(ctx.eps).rsqrt()
        return rows, gain, mean, factor, torch.where(spread < ctx.eps, 0.0, factor.square())


def _units_first(weight: Tensor, groups: int) -> Tensor:
    """(in, out/groups, k…) → (out, in/groups, k…)."""
    split = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return split.flatten(0, 1)


def _check(weight: Tensor, gain: Tensor | None, eps: float, unit_dim: int, groups: int) -> None:
    check_tensor(weight)
    if gain is not None:
        check_tensor(gain, "gain")
    shape = tuple(weight.shape)
    if not weight.is_floating_point():
        raise UserError(f"weight of {weight.dtype}: expected floating point; cast it with .float()")
    if len(shape) < 2 or unit_dim not in (0, 1):
        raise UserError(
            f"weight of shape {shape}, unit_dim={unit_dim}: expected 2+ dimensions and a unit_dim of 0 or 1"
        )
    if groups < 1 or (unit_dim == 1 and shape[0] % groups):
        raise UserError(f"groups={groups} for a weight of shape {shape}: expected a divisor of dimension 0")
    units = shape[0] if unit_dim == 0 else shape[1] * groups
    if units and not weight.numel():
        raise UserError(f"weight of shape {shape}: fan-in 0; expected at least one weight per unit")
    if not eps > 0:
        raise UserError(f"eps={eps}: expected a number above 0; pass {EPS}")
    if gain is not None and tuple(gain.shape) != (units,):
        raise UserError(f"gain of shape {tuple(gain.shape)}: expected ({units},), one per unit of {shape}")
