"""Pure functions: scaled weight standardization."""

from __future__ import annotations

import torch
from torch import Tensor

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
    N weights of unit i, so that Σ Ŵ_i = 0 and ‖Ŵ_i‖ = |gain_i| wherever N · v_i ≥ eps.

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
        ValueError: `unit_dim` is neither 0 nor 1, or `weight` has fewer than two dimensions.

    Example:
        >>> scaled_weight_standardization(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[-0.6708, -0.2236,  0.2236,  0.6708]])

    Paper: arXiv 2101.08692 §4.1, 2102.06171. Checked against deepmind-research `nfnets/base.py`.
    """
    if weight.ndim < 2 or unit_dim not in (0, 1):
        raise ValueError(f"weight of shape {tuple(weight.shape)}, unit_dim={unit_dim}: expected 2+ dims, 0 or 1")
    w = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    if unit_dim == 0:
        dims, shape = tuple(range(1, w.ndim)), (-1,) + (1,) * (w.ndim - 1)
    else:
        w = w.unflatten(0, (groups, -1))  # (groups, in/groups, out/groups, *kernel)
        dims, shape = (1, *range(3, w.ndim)), (groups, 1, -1) + (1,) * (w.ndim - 3)
    fan_in = w.numel() // max(1, (w.shape[0] if unit_dim == 0 else w.shape[0] * w.shape[2]))
    variance, mean = torch.var_mean(w, dim=dims, correction=0, keepdim=True)
    factor = (variance * fan_in).clamp_min(eps).rsqrt()
    if gain is not None:
        factor = factor * gain.to(w.dtype).reshape(shape)
    standardized = torch.addcmul(-mean * factor, w, factor)
    return standardized.reshape(weight.shape).to(weight.dtype)
