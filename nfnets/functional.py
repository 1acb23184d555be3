"""Pure functions: scaled weight standardization, TensorFlow's padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

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
    scale: Tensor | None = None,
) -> Tensor:
    """Give every filter zero mean and norm `gain`.

    Ŵ_i = scale · gain_i · (W_i − μ_i) / sqrt(max(N · v_i, eps)), with μ_i the mean and v_i the biased variance of the
    N weights of unit i, so that Σ Ŵ_i = 0 and ‖Ŵ_i‖ = |scale · gain_i| wherever N · v_i ≥ eps. Below the floor the
    denominator is a constant, and no gradient flows through the variance.

    Args:
        weight: filters, any rank from 2 up. A half-precision weight is standardized in fp32 and cast back.
        gain: shape `(units,)`, or None for 1.
        eps: floor on N · v_i. DeepMind's `max` form: unlike `v + eps`, it does not shrink filters as N grows.
        unit_dim: dimension of the output units: 0 for Linear and Conv, 1 for ConvTranspose.
        groups: groups of a transposed convolution, whose dimension 0 holds all groups' inputs; statistics are
            per group. A plain convolution's groups are already separate filters.
        scale: a factor for all units, 0-dim, or None for 1.

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
    if not _written_out(scale):
        return _Standardize.apply(weight, gain, scale, eps, unit_dim, groups)  # type: ignore[no-any-return]
    rows = _rows(weight, unit_dim, groups)
    factor = rows.new_ones(rows.shape[0]) if gain is None else gain.to(rows.dtype)
    factor = factor if scale is None else factor * scale
    return _as_weight(standardize_rows(rows, factor, eps), weight, unit_dim, groups)


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


def _written_out(scale: Tensor | None) -> bool:
    """Whether to compute by the formula as written: for a compiler, which fuses it; a tracer, which stores it;
    functional transforms and forward-mode derivatives, which know every step of it; a scale that learns."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (scale is not None and scale.requires_grad)
    )


class _Standardize(torch.autograd.Function):
    """`scaled_weight_standardization` in one fused kernel forward and one backward.

    Group normalization with a group per unit computes g · (W − μ) · r, r = 1/sqrt(v), in a sixth of the time that
    `var_mean` takes on a CPU. With g = scale · gain / √N that is the answer, but for units below the floor; those are
    looked for, which costs less than another pass over the weight, and put right. Its backward is ours but for the
    same units, which must not feel the variance.
    """

    TINY = 1e-30  # keeps r finite for constant filters; too small to be seen in any v above the floor
    FAINT = (
        1e-12  # group normalization's r for units below the floor: the variance's part goes with its square
    )

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        gain: Tensor | None,
        scale: Tensor | None,
        eps: float,
        unit_dim: int,
        groups: int,
    ) -> Tensor:
        rows = _rows(weight, unit_dim, groups).contiguous()
        units, n = rows.shape
        factor = rows.new_full((), n**-0.5) if scale is None else scale.to(rows.dtype) * n**-0.5
        factor = factor.expand(units) if gain is None else gain.to(rows.dtype) * factor
        fused = rows.is_cpu
        out, mean, r = torch.native_group_norm(
            rows, factor if fused else None, None, 1, units, n, units, _Standardize.TINY
        )
        limit = (n / eps) ** 0.5
        # A NaN counts as below, or it would hide the others. A GPU is not asked: that would wait for it.
        ctx.floored = not _can_be_asked(rows) or not r.max().item() <= limit
        if not fused:
            out.mul_((factor * (limit / r.clamp_min(limit))).view(units, 1))
        elif ctx.floored:
            mean, r = mean.view(units, 1), r.view(units, 1)
            out = torch.where(r > limit, (rows - mean) * (limit * factor.view(units, 1)), out)
        ctx.save_for_backward(weight, gain, scale, factor, mean, r)
        ctx.constants = eps, unit_dim, groups
        ctx.set_materialize_grads(False)
        return _as_weight(out, weight, unit_dim, groups)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        grad: Tensor | None = grad_outputs[0]
        if grad is None:
            return (None,) * 6
        weight, gain, scale, factor, mean, r = ctx.saved_tensors
        eps, unit_dim, groups = ctx.constants
        rows, grad = (_rows(t, unit_dim, groups) for t in (weight, grad))
        units, n = rows.shape
        for_weight, for_gain = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # to be differentiated again: as functions of the weight, not of μ and r
            multiplier = rows.new_ones(()) if scale is None else scale
            own = rows.new_ones(units) if gain is None else gain.to(rows.dtype)
            variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
            spread = variance * n
            r = spread.clamp_min(eps).rsqrt()
            total = grad.sum(1, keepdim=True)
            unit = r * ((grad * rows).sum(1, keepdim=True) - total * mean)
            pull = torch.where(spread < eps, 0.0, r.square())
            d_rows = r * (grad - total / n) - (rows - mean) * (pull * unit)
            d_rows, d_gain = d_rows * (own * multiplier).unsqueeze(1), unit.squeeze(1) * multiplier
        else:
            ratio = None
            if ctx.floored:
                limit = (n / eps) ** 0.5
                below = r > limit
                ratio = torch.where(below, limit / _Standardize.FAINT, 1.0).view(units)
                r = torch.where(below, _Standardize.FAINT, r)
                factor = factor * ratio
            d_rows, d_gain, _ = torch.ops.aten.native_group_norm_backward(
                grad.contiguous(), rows.contiguous(), mean, r, factor, 1, units, n, units, [for_weight, for_gain, False]
            )
            if for_gain:
                d_gain = d_gain * n**-0.5 if scale is None else d_gain * (scale * n**-0.5)
                d_gain = d_gain if ratio is None else d_gain * ratio
        return (
            _as_weight(d_rows, weight, unit_dim, groups) if for_weight else None,
            d_gain.to(gain.dtype) if for_gain else None,
            None,
            None,
            None,
            None,
        )


def _can_be_asked(tensor: Tensor) -> bool:
    """Whether reading a number of it costs nothing and is seen by nobody."""
    return tensor.is_cpu and type(tensor) is Tensor and not is_in_torch_dispatch_mode()


def _rows(weight: Tensor, unit_dim: int, groups: int) -> Tensor:
    """A row for each unit, in at least fp32."""
    full = weight.float() if weight.dtype.itemsize < 4 else weight
    full = full if unit_dim == 0 else _units_first(full, groups)
    return full.reshape(full.shape[0], -1)


def _as_weight(rows: Tensor, weight: Tensor, unit_dim: int, groups: int) -> Tensor:
    """What `_rows` made of a tensor like `weight`, as that was."""
    shape = weight.shape
    if unit_dim == 1:
        rows = rows.view(groups, shape[1], shape[0] // groups, *shape[2:]).transpose(1, 2)
    return rows.reshape(shape).to(weight.dtype)


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
