"""Per-channel moments and similarity of one tensor: one read of memory, fp32 accumulation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nfnets.errors import UserError

# Elements of a chunk: 4 MB in fp32, which the cores' shared cache holds between reductions.
_CHUNK = 1 << 20
# Below this fraction of the squared mean a variance from two plain sums would keep fewer than four digits in fp32.
_SHAKY = 1e-2
# The Gram matrix costs samples² · features; 16 samples estimate a mean cosine to a few percent.
_GRAM_SAMPLES = 16
_RUN = 16
# Maps of fewer values fill too few of a processor's registers to be reduced one by one.
_SHORT = 64


@dataclass(frozen=True)
class Moments:
    """Count, mean and centered sum of squares per channel.

    Attributes:
        count: elements per channel.
        mean: `(C,)`, in fp32 or fp64.
        m2: `(C,)`, the sum of squared deviations from `mean`.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance per channel, `m2 / count`."""
        return self.m2 / self.count


@dataclass(frozen=True)
class Lent:
    """What a BatchNorm has kept of its input."""

    count: int
    mean: Tensor
    scale: Tensor
    """1/√(var + eps)."""
    eps: float

    def settled(self) -> Moments:
        """Computed when the pass is over: a dozen operations on a few hundred numbers are slow between convolutions."""
        mean, scale = (t.detach().numpy().astype(np.float64) for t in (self.mean, self.scale))
        with np.errstate(all="ignore"):
            m2 = (1 / np.square(scale) - self.eps) * self.count
        return Moments(self.count, torch.from_numpy(mean), torch.from_numpy(m2))


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
    found = scan(x.detach(), dim)[0]
    assert found is not None
    return found


def scan(
    x: Tensor, dim: int, extremes: bool = False, channelwise: bool = False, moments: bool = True
) -> tuple[Moments | None, Tensor, Tensor]:
    """Moments, and if wanted the smallest and largest value, by the cheapest way for device, type and layout.

    Args:
        x: as `channel_moments`, detached and checked.
        dim: the channel dimension.
        extremes: whether the other two results are asked for.
        channelwise: extremes of every channel, if they cost no second read.
        moments: whether the first result is asked for.

    Returns:
        Moments, smallest and largest value: of every channel or 0-dim (meaningless when not asked for).
    """
    channels = x.shape[dim]
    count = x.numel() // channels
    last = x.movedim(dim, -1)
    if last.is_contiguous():
        x, dim = last.reshape(-1, channels), 1
    if x.device.type == "cpu" and x.dtype.itemsize >= 4:
        x, dim = x if dim == 1 else x.movedim(dim, 1), 1
        channelwise = channelwise and count // len(x) >= _SHORT  # else all at once is several times cheaper
        if moments or channelwise:
            return _sums(x, count, moments, extremes, channelwise)
    low, high = x.aminmax() if extremes else (x, x)
    if not moments:
        return None, low, high
    if x.device.type in ("cpu", "cuda"):
        mean, var = _native(x if dim == 1 else x.movedim(dim, 1))
        return Moments(count, mean, var * count), low, high
    wide = x if x.dtype.itemsize >= 4 else x.float()
    dims = [d for d in range(x.dim()) if d != dim % x.dim()]
    var, mean = torch.var_mean(wide, dims, correction=0)
    return Moments(count, mean, var * count), low, high


def _native(x: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of a BatchNorm forward: centered, fp32 accumulation for half, one pass over memory."""
    if x.dtype.itemsize >= 4:
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    # fp32 buffers make the CPU kernel return fp32 for half data; a momentum of 0 leaves them alone.
    zeros = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    return torch.batch_norm_update_stats(x, zeros, torch.ones_like(zeros), 0.0)


def _rows(x: Tensor, length: int) -> Iterable[Tensor]:
    """`(N, C, …)` as rows of a length, in chunks that a core's cache holds; only what is strided oddly is copied."""
    rows = max(1, _CHUNK // length)
    if x.is_contiguous():
        flat = x.view(-1, length)
        return (flat,) if len(flat) <= rows else flat.split(rows)
    parts = x.split(max(1, _CHUNK // x[0].numel()))
    return (chunk for part in parts for chunk in part.reshape(-1, length).split(rows))


def _sums(
    x: Tensor, count: int, moments: bool, extremes: bool, channelwise: bool
) -> tuple[Moments | None, Tensor, Tensor]:
    """Sums, squares and extremes of every map, by reductions that torch vectorizes; one read of memory.

    On a CPU thirty times faster than `var_mean` on NCHW. Of samples whose maps are too short for that, the samples are
    added first. What is left after the read is small, and there numpy costs a fraction of what a call of torch does.
    (Looking at a value is no synchronization on a CPU.)
    """
    channels, length = x.shape[1], count // x.shape[0]
    short = length < _SHORT
    sums, squares, ends = [], [], []
    for part in _rows(x, channels * length if short else length):
        if channelwise:
            ends.append((part.amin(1), part.amax(1)))
        elif extremes:  # one reduction for both is slow row by row, but not over all
            ends.append(part.aminmax())
        if moments and short:
            sums.append(_over_maps(part.sum(0), channels))
            squares.append(_over_maps((part * part).sum(0), channels))
        elif moments:
            sums.append(part.sum(1))
            squares.append(torch.linalg.vector_norm(part, dim=1))
    found = None
    if moments:
        total, square = (_joined(parts).reshape(-1, channels) for parts in (sums, squares))
        square = square.astype(np.float64) if short else np.square(square, dtype=np.float64)
        found = _centered(x, count, total.sum(0, dtype=np.float64), square.sum(0))
    if not extremes:
        return found, x, x
    lows, highs = zip(*ends, strict=True)
    if not channelwise:
        one = len(ends) == 1
        return (
            found,
            lows[0] if one else torch.stack(lows).amin(),
            highs[0] if one else torch.stack(highs).amax(),
        )
    low, high = (_joined(parts).reshape(-1, channels) for parts in (lows, highs))
    return found, torch.from_numpy(low.min(0)), torch.from_numpy(high.max(0))


def _over_maps(sums: Tensor, channels: int) -> Tensor:
    return sums if len(sums) == channels else sums.view(channels, -1).sum(1)


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return (parts[0] if len(parts) == 1 else torch.cat([*parts])).numpy()


def _centered(x: Tensor, count: int, total: np.ndarray, square: np.ndarray) -> Moments:
    """Moments of two sums, centered afterwards, which loses digits where the mean is large: there it is read again."""
    mean = total / count
    with np.errstate(invalid="ignore"):
        m2 = square - mean * total
        shaky = np.flatnonzero(m2 < _SHAKY * mean * total)
    if shaky.size:
        m2[shaky] = _again(x, mean[shaky], shaky)
    return Moments(count, torch.from_numpy(mean), torch.from_numpy(m2))


def _again(x: Tensor, mean: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Centered sums of squares of the channels at `index`."""
    chosen, center = torch.from_numpy(index), torch.from_numpy(mean).to(x.dtype)
    total = np.zeros(len(index))
    for part in x.split(max(1, _CHUNK // x[0].numel())):
        apart = part.reshape(len(part), x.shape[1], -1)[:, chosen] - center[:, None]
        total += apart.square_().sum((0, 2)).numpy()
    return total


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
        >>> round(merge(channel_moments(x[:2]), channel_moments(x[2:])).var.item(), 4)
        2.9167
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
        features: use about this many, in evenly spaced runs; all when omitted.

    Returns:
        Two 0-dim tensors; NaN where a batch of one or an all-zero sample leaves them undefined.

    Example:
        >>> cosine, rank = similarity(torch.eye(4))
        >>> cosine.item(), rank.item()
        (0.0, 4.0)
    """
    cosine, rank = alike(gram(x, features))
    return cosine, rank


def gram(x: Tensor, features: int | None = None) -> Tensor:
    """Scalar products of the first 16 samples with each other, `(n, n)`: all that `similarity` reads of a tensor."""
    part = x.detach()[:_GRAM_SAMPLES]
    if part.dim() == 4 and part.movedim(1, -1).is_contiguous():
        part = part.movedim(1, -1)  # the order of features does not matter, a copy would
    flat = part.flatten(1)
    if features is not None and flat.shape[1] > features:
        # Runs as long as a cache line, which is what reading one value costs anyway. An odd stride: an even one
        # would meet the same few positions of maps whose size is a power of two.
        runs = max(1, features // _RUN)
        flat = flat.unfold(1, min(_RUN, features), flat.shape[1] // runs | 1).flatten(1)
    flat = flat if flat.dtype.itemsize >= 4 else flat.float()
    return flat @ flat.mT


def alike(grams: Tensor) -> Tensor:
    """Mean cosine and effective rank of one or more batches of samples: `(2,)` of `(n, n)`, `(2, …)` of `(…, n, n)`."""
    n = grams.shape[-1]
    if n < 2:
        return grams.new_full((2, *grams.shape[:-2]), math.nan)  # made on the device, not copied there
    scale = grams.diagonal(dim1=-2, dim2=-1).rsqrt()
    cosines = grams * scale[..., :, None] * scale[..., None, :]
    mean = (cosines.sum((-2, -1)) - n) / (n * (n - 1))
    return torch.stack((mean, n * n / cosines.square().sum((-2, -1))))
