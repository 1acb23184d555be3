"""Orthogonal convolution weights: delta-orthogonal and scaled orthogonal."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.given import check_tensor


def delta_orthogonal_(
    weight: Tensor, gain: float = 1.0, groups: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a convolution weight with an isometry: zeros, and an orthogonal matrix at the spatial center.

    W[:, :, center] = gain · Q with QᵀQ = I, and 0 elsewhere, so that with stride 1 and circular padding
    ‖W∗x‖ = gain · ‖x‖ for every x.

    Args:
        weight: `(out, in/groups, *kernel)`, rank 3 to 5, odd kernel sizes, in ≤ out. Changed in place.
        gain: factor on the norm.
        groups: each group of a grouped convolution gets an orthogonal block of its own.
        generator: source of randomness; torch's global one by default.

    Returns:
        `weight`.

    Raises:
        UserError: rank, kernel, channels, gain or groups are not as above; nothing is changed.

    Example:
        >>> weight = delta_orthogonal_(torch.empty(8, 8, 3, 3))
        >>> center = weight[:, :, 1, 1]
        >>> torch.allclose(center @ center.T, torch.eye(8), atol=1e-5), int(weight.count_nonzero())
        (True, 64)

    Paper: arXiv 1806.05393 (§3). Checked against the tests of JAX's and TensorFlow's initializers.
    """
    shape = _checked(weight, gain, groups, delta=True)
    if shape[1] > shape[0] // groups:
        raise UserError(
            f"weight of shape {tuple(shape)}: {shape[1]} inputs into {shape[0] // groups} outputs cannot keep the "
            "norm; expected in ≤ out, or use scaled_orthogonal_(weight, delta=True)"
        )
    return _fill(weight, gain, groups, delta=True, generator=generator)


def scaled_orthogonal_(
    weight: Tensor,
    gain: float = 1.0,
    delta: bool = False,
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with an orthogonal matrix that keeps the mean square per element, wide or narrow.

    W = gain · max(1, √(out/in)) · Q, Q of shape (out, in) with orthonormal columns or rows, so that the mean of
    (W·x)² over outputs is that of x² over inputs: exactly for out ≥ in, on average for out < in.

    Args:
        weight: `(out, in/groups, *kernel)`, rank 2 up, or `(out, in)` of a linear. Changed in place.
        gain: factor on the root mean square.
        delta: put Q at the spatial center and zeros elsewhere; otherwise Q fills out × (in · kernel), and `in`
            above means in · kernel.
        groups: each group of a grouped convolution gets an orthogonal block of its own.
        generator: source of randomness; torch's global one by default.

    Returns:
        `weight`.

    Raises:
        UserError: rank, kernel, gain or groups are not as above; nothing is changed.

    Example:
        >>> weight = scaled_orthogonal_(torch.empty(256, 64, 1, 1), delta=True)
        >>> x = torch.randn(64)
        >>> torch.allclose((weight[:, :, 0, 0] @ x).square().mean(), x.square().mean(), rtol=1e-4)
        True

    Paper: arXiv 2110.01765 (DKS, appendix on scaled uniform orthogonal weights). Its PyTorch code takes the
    dimensions the other way round, which scales the mean square by in/out (0.25 for 64 → 256).
    """
    shape = _checked(weight, gain, groups, delta)
    inputs = shape[1] if delta else weight[0].numel()
    return _fill(weight, gain * max(1.0, math.sqrt(shape[0] / groups / inputs)), groups, delta, generator)


def orthonormal_rows(
    rows: int, columns: int, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """A random matrix with orthonormal rows (columns if there are more rows), uniform over all of them.

    Q of A = L·Q for a normal A. By QR; where A is large and twice as long as wide, hence well conditioned, from
    Cholesky's L·Lᵀ = A·Aᵀ, which takes half the time and is as exact as torch's matmul precision lets A·Aᵀ be. In at
    least fp32: there is no half-precision kernel.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    matrix = torch.empty(rows, columns, dtype=dtype, device=like.device)
    short, long = sorted((rows, columns))
    if short < 32 or long < 2 * short:
        return nn.init.orthogonal_(matrix, generator=generator)
    normal = matrix.normal_(generator=generator)
    wide = normal.T if rows > columns else normal
    wide = torch.linalg.solve_triangular(torch.linalg.cholesky(wide @ wide.T), wide, upper=False)
    return wide.T if rows > columns else wide


def _checked(weight: Tensor, gain: float, groups: int, delta: bool) -> torch.Size:
    check_tensor(weight)
    shape = weight.shape
    if not weight.is_floating_point() or weight.numel() == 0:
        raise UserError(
            f"weight of shape {tuple(shape)} and {weight.dtype}: expected non-empty floating point"
        )
    lowest = 3 if delta else 2
    if not lowest <= weight.ndim <= 5:
        raise UserError(
            f"weight of shape {tuple(shape)}: expected {lowest} to 5 dimensions, (out, in, *kernel); "
            "use torch.nn.init.orthogonal_ for another matrix"
        )
    if delta and any(size % 2 == 0 for size in shape[2:]):
        raise UserError(
            f"weight of shape {tuple(shape)}: an even kernel has no center; expected odd sizes, "
            "or use scaled_orthogonal_(weight)"
        )
    if not math.isfinite(gain):
        raise UserError(f"gain={gain}: expected a finite number; pass gain=1.0")
    if groups < 1 or shape[0] % groups:
        raise UserError(f"groups={groups}: expected a divisor of the {shape[0]} output channels")
    return shape


def _fill(weight: Tensor, gain: float, groups: int, delta: bool, generator: torch.Generator | None) -> Tensor:
    outputs = weight.shape[0] // groups
    inputs = weight.shape[1] if delta else weight[0].numel()
    blocks = [orthonormal_rows(outputs, inputs, weight, generator) * gain for _ in range(groups)]
    matrix = torch.cat(blocks)
    with torch.no_grad():
        if delta:
            center = tuple(size // 2 for size in weight.shape[2:])
            weight.zero_()
            weight[(slice(None), slice(None), *center)] = matrix.to(weight.dtype)
        else:
            weight.copy_(matrix.reshape(weight.shape))
    return weight
