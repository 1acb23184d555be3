"""Pure functions: scaled weight standardization, TensorFlow's padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from nfnets.errors import UserError
from nfnets.given import check_tensor
from nfnets.standardized import standardize_rows, standardized_rows

__all__ = ["pad_same", "scaled_weight_standardization", "standardize_rows"]

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
        >>> import torch
        >>> scaled_weight_standardization(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[-0.6708, -0.2236,  0.2236,  0.6708]])

    Paper: arXiv 2101.08692 §4.1, 2102.06171. Checked against deepmind-research `nfnets/base.py`.
    """
    _check(weight, gain, eps, unit_dim, groups)
    return standardized_weight(weight, gain, eps, unit_dim, groups, scale)


def standardized_weight(
    weight: Tensor, gain: Tensor | None, eps: float, unit_dim: int, groups: int, scale: Tensor | None
) -> Tensor:
    """`scaled_weight_standardization` of what is known to be right, as a layer's weight and gain are."""
    rows = weight if weight.dtype.itemsize >= 4 else weight.float()
    if unit_dim == 1:
        rows = _units_first(rows, groups)
    rows = rows.reshape(rows.shape[0], -1).contiguous()
    if gain is not None and gain.dtype is not rows.dtype:
        gain = gain.to(rows.dtype)
    rows = standardized_rows(rows, gain, scale, eps)
    if unit_dim == 1:
        rows = rows.view(groups, weight.shape[1], weight.shape[0] // groups, *weight.shape[2:]).transpose(
            1, 2
        )
    rows = rows.reshape(weight.shape)
    return rows if rows.dtype is weight.dtype else rows.to(weight.dtype)


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
        >>> import torch
        >>> pad_same(torch.ones(1, 1, 4), [3], [2], [1])
        tensor([[[1., 1., 1., 1., 0.]]])

    Checked against timm `layers/padding.py`; DeepMind's networks use it throughout.
    """
    pads: list[int] = []
    for n, k, s, d in zip(input.shape[-len(kernel_size) :], kernel_size, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad counts from the last dimension
    return F.pad(input, pads, mode="constant" if mode == "zeros" else mode) if any(pads) else input


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
