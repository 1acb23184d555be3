"""Per-channel moments and per-tensor summaries: one read where it can be, fp32 accumulation, no synchronization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nfnets.errors import UserError

# One chunk and its centered copy stay in a core's cache: about 1 MB each in fp32.
_CHUNK = 1 << 18
# The Gram matrix costs samples² · features; 16 samples estimate a mean cosine to a few percent.
_GRAM_SAMPLES = 16
# A unit whose standard deviation is below 1e-4 of its magnitude is constant: fp32 sums over a batch round to ~1e-5.
_CONSTANT = 1e-8

SUMMARY = ("mean_sq", "var", "total_mean", "total_var", "dead", "min", "max", "norm", "cosine", "rank")


@dataclass(frozen=True)
class Moments:
    """Count, mean and centered sum of squares per channel.

    Attributes:
        count: elements per channel.
        mean: `(C,)`, in fp32 (fp64 for fp64 data).
        m2: `(C,)`, the sum of squared deviations from `mean`.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance per channel, `m2 / count`."""
        return self.m2 / self.count


def channel_moments(x: Tensor, dim: int = 1) -> Moments:
    """Mean and biased variance of every channel over all other dimensions.

        mean_c = E[x_c]        var_c = E[(x_c − mean_c)²]

    Centered before squaring: two plain sums lose the variance when the mean is large beside it.

    Args:
        x: floating-point tensor of two or more dimensions, `(N, C, …)` for the default `dim`.
        dim: the channel dimension.

    Returns:
        `Moments` on the tensor's device; nothing is synchronized.

    Raises:
        UserError: the tensor is empty, not floating-point, or has fewer than two dimensions.

    Example:
        >>> m = channel_moments(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        >>> m.mean.tolist(), m.var.tolist()
        ([2.0, 10.0], [1.0, 0.0])

    Definitions as in arXiv 2101.08692 §3 (biased variance, checked against deepmind-research/nfnets).
    """
    if not x.is_floating_point():
        raise UserError(f"moments of a {x.dtype} tensor: expected floating point; convert it with .float()")
    if x.dim() < 2 or x.numel() == 0:
        raise UserError(f"moments of shape {tuple(x.shape)}: expected at least (1, 1); pass a batch")
    x = x.detach()
    channels = x.shape[dim]
    count = x.numel() // channels
    last = x.movedim(dim, -1)
    if last.is_contiguous():
        x, dim, last = last.reshape(-1, channels), 1, None
    if x.device.type == "cuda" or (x.device.type == "cpu" and (last is None or x.dtype.itemsize < 4)):
        mean, var = _native(x if dim == 1 else x.movedim(dim, 1))
        return Moments(count, mean, var * count)
    if x.device.type == "cpu":
        return _chunked(x.movedim(dim, 1), count)
    wide = x if x.dtype.itemsize >= 4 else x.float()
    dims = [d for d in range(x.dim()) if d != dim % x.dim()]
    var, mean = torch.var_mean(wide, dims, correction=0)
    return Moments(count, mean, var * count)


def _native(x: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of a BatchNorm forward: centered, fp32 accumulation for half, one pass over memory."""
    if x.dtype.itemsize >= 4:
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    # fp32 buffers make the CPU kernel return fp32 for half data; a momentum of 0 leaves them alone.
    zeros = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    return torch.batch_norm_update_stats(x, zeros, torch.ones_like(zeros), 0.0)


def _chunked(x: Tensor, count: int) -> Moments:
    """Two passes over cache-sized chunks: on a CPU ten times `var_mean` on NCHW."""
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    mean = flat.sum(2).sum(0) / count
    step = max(1, _CHUNK // max(1, flat.shape[1] * flat.shape[2]))
    m2 = torch.zeros_like(mean)
    for part in flat.split(step):
        centered = part - mean[:, None]
        m2 += (centered * centered).sum((0, 2) if step > 1 else 2).reshape(mean.shape)
    return Moments(count, mean, m2)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two samples, by the formula of Chan, Golub and LeVeque (1979).

        m2 = m2_a + m2_b + (mean_b − mean_a)² · n_a n_b / (n_a + n_b)

    Args:
        a: moments of one batch or rank.
        b: moments of another, over the same channels.

    Returns:
        The moments of both together.

    Example:
        >>> x = torch.arange(6.0).reshape(6, 1)
        >>> merge(channel_moments(x[:2]), channel_moments(x[2:])).var.item() == x.var(correction=0).item()
        True
    """
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.m2 + b.m2 + delta.square() * (a.count * b.count / count))


def similarity(x: Tensor, features: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean cosine between distinct samples and the effective rank of the batch.

        cosine = mean_{i≠j} cos(x_i, x_j)        rank = N² / Σ_ij cos²(x_i, x_j)

    The rank is the participation ratio of the Gram matrix of the normalized samples: 1 when all samples point
    the same way, N when they are orthogonal. The first 16 samples are used.

    Args:
        x: `(N, …)`.
        features: use about this many, evenly spaced; all when omitted.

    Returns:
        Two 0-dim tensors; NaN where a batch of one or an all-zero sample leaves them undefined.

    Example:
        >>> cosine, rank = similarity(torch.eye(4))
        >>> cosine.item(), rank.item()
        (0.0, 4.0)
    """
    part = x.detach()[:_GRAM_SAMPLES]
    if part.dim() == 4 and part.movedim(1, -1).is_contiguous():
        part = part.movedim(1, -1)  # the order of features does not matter, a copy would
    flat = part.flatten(1)
    if features is not None and flat.shape[1] > features:
        # An odd stride: an even one would meet the same few positions of maps whose size is a power of two.
        flat = flat[:, :: flat.shape[1] // features | 1]
    flat = flat if flat.dtype.itemsize >= 4 else flat.float()
    gram = flat @ flat.mT
    n = gram.shape[0]
    if n < 2:
        return gram.new_tensor(math.nan), gram.new_tensor(math.nan)
    scale = gram.diagonal().rsqrt()
    cosines = gram * scale[:, None] * scale
    off = (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))
    return off, n * n / cosines.square().sum()


def summarize(
    x: Tensor, dim: int = 1, similar: bool = True, features: int | None = None
) -> tuple[Tensor, Moments]:
    """All statistics of one tensor as one vector on its device, in the order of `SUMMARY`.

    Args:
        x: floating-point tensor, batch first.
        dim: the channel dimension.
        similar: also the similarity between samples.
        features: as `similarity`.

    Returns:
        The vector (fp32) and the channel moments it was made from (mergeable across batches and ranks).

    Raises:
        UserError: as `channel_moments`.

    Example:
        >>> v, _ = summarize(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> dict(zip(SUMMARY, v.tolist()))["dead"]
        0.5
    """
    moments = channel_moments(x, dim)
    mean, var = moments.mean, moments.var
    square = mean.square()
    low, high = x.detach().aminmax()
    mean_sq, avg_var = square.mean(), var.mean()
    total_mean = mean.mean()
    dead = (var <= _CONSTANT * square).to(mean.dtype).mean()
    norm = ((mean_sq + avg_var) * x.numel()).sqrt()
    cosine, rank = similarity(x, features) if similar else (mean.new_tensor(math.nan),) * 2
    total_var = avg_var + (mean - total_mean).square().mean()
    row = (mean_sq, avg_var, total_mean, total_var, dead, low, high, norm, cosine, rank)
    return torch.stack([value.float() for value in row]), moments
