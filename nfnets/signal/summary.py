"""The statistics of one tensor: measured on its device, averaged on the host, merged across ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nfnets.signal.moments import Lent, Moments, merge, scan, similarity

Key = TypeVar("Key", bound=Hashable)
Other = TypeVar("Other", bound=Hashable)

# A unit that varies a thousand times less than the average one says nothing: GELU at −6 is not exactly constant.
QUIET = 1e-6
# A unit whose standard deviation is below 1e-4 of its magnitude is constant: fp32 sums over a batch round to ~1e-5.
CONSTANT = 1e-8

SUMMARY = (
    "mean_sq",
    "var",
    "total_mean",
    "total_var",
    "dead",
    "min",
    "max",
    "norm",
    "quiet",
    "cosine",
    "rank",
)


class Raw(NamedTuple):
    """What one tensor's measurement leaves on its device; averages are taken after the transfer."""

    moments: Moments | Lent
    low: Tensor
    """Smallest value: of every channel, or 0-dim."""
    high: Tensor
    cosine: Tensor | None = None
    rank: Tensor | None = None


class Stats(NamedTuple):
    """The same on the host; those of several ranks can be merged."""

    moments: Moments
    low: float
    high: float
    cosine: float | None = None
    rank: float | None = None


def measure(x: Tensor, dim: int = 1, similar: bool = True, features: int | None = None) -> Raw:
    """Measures one tensor without a synchronization (on a GPU) and with as few operations as will do.

    Args:
        x: floating-point tensor of two or more dimensions and not empty, batch first.
        dim: the channel dimension.
        similar: also the similarity between samples.
        features: as `similarity`.

    Returns:
        Tensors on the device, for `fetch`.
    """
    moments, extremes, alike = parts(x, dim, similar, features)
    assert moments is not None
    assert extremes is not None
    return Raw(moments, *extremes, *alike)


Extremes = tuple[Tensor, Tensor]
Parts = tuple[Moments | Lent | None, Extremes | None, tuple[()] | tuple[Tensor, Tensor]]


def parts(
    x: Tensor,
    dim: int,
    similar: bool,
    features: int | None,
    moments: bool = True,
    extremes: bool = True,
    channelwise: bool = False,
) -> Parts:
    """The same in parts, of which some may be left out.

    Args:
        x, dim, similar, features: as `measure`.
        moments: whether to measure them.
        extremes: whether to measure the smallest and largest value.
        channelwise: of every channel, where that can be had.

    Returns:
        Moments, extremes, cosine and rank.
    """
    x = x.detach()
    alike = similarity(x, features) if similar else ()
    if not moments and not extremes:
        return None, None, alike
    found, low, high = scan(x, dim, extremes, channelwise and extremes, moments)
    return found, (low, high) if extremes else None, alike


def fetch(
    raws: Mapping[Key, Raw], scalars: Mapping[Other, Tensor] | None = None
) -> tuple[dict[Key, Stats], dict[Other, float]]:
    """Brings everything to the host in one transfer.

    Args:
        raws: measurements, by whatever the caller names them.
        scalars: 0-dim tensors to bring along.

    Returns:
        The statistics and the numbers under the same names.
    """
    sent: list[Tensor] = [] if scalars is None else [v.detach().reshape(1) for v in scalars.values()]
    extra = len(sent)
    for raw in raws.values():
        assert isinstance(raw.moments, Moments)
        sent += (raw.moments.mean, raw.moments.m2)
        sent += (v.reshape(-1) for v in raw[1:] if v is not None)
    if not sent:
        return {}, {}
    device = sent[-1].device
    if any(part.device != device for part in sent):
        sent = [part.to(device, non_blocking=True) for part in sent]
    came = sent if device.type == "cpu" else torch.cat(sent).cpu().split([part.numel() for part in sent])
    pieces = iter(came[extra:])
    out: dict[Key, Stats] = {}
    for key, raw in raws.items():
        moments = Moments(raw.moments.count, next(pieces), next(pieces))
        low, high = _flat(next(pieces)).min().item(), _flat(next(pieces)).max().item()
        out[key] = Stats(moments, low, high, *(next(pieces).item() for v in raw[3:] if v is not None))
    return out, dict(zip(scalars or {}, (piece.item() for piece in came[:extra]), strict=True))


def _flat(piece: Tensor) -> Any:
    """In numpy, which takes a fraction of what a call of torch does; it knows no bfloat16."""
    return piece if piece.dtype is torch.bfloat16 else piece.numpy()


def finish(stats: Sequence[Stats]) -> list[dict[str, float]]:
    """The averages of `SUMMARY`, in fp64.

    Args:
        stats: of several tensors.

    Returns:
        One dict each, in that order; without cosine and rank where they were not measured.
    """
    if not stats:
        return []
    sizes = np.array([s.moments.mean.numel() for s in stats])
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))

    def average(channels: np.ndarray) -> np.ndarray:
        return np.add.reduceat(channels, starts, dtype=np.float64) / sizes

    mean = torch.cat([s.moments.mean.double() for s in stats]).numpy()
    counts = np.array([s.moments.count for s in stats], dtype=np.float64)
    with np.errstate(all="ignore"):  # what is not finite stays so
        var = torch.cat([s.moments.m2.double() for s in stats]).numpy() / np.repeat(counts, sizes)
        square = np.square(mean)
        mean_sq, avg_var, total_mean = average(square), average(var), average(mean)
        dead = average(var <= CONSTANT * square)
        quiet = average(var <= QUIET * np.repeat(avg_var, sizes))
        norm = np.sqrt((mean_sq + avg_var) * counts * sizes)
        total_var = avg_var + average(np.square(mean - np.repeat(total_mean, sizes)))
    columns = np.stack((mean_sq, avg_var, total_mean, total_var, dead, norm, quiet), 1).tolist()
    rows = (
        (*row[:5], s.low, s.high, *row[5:], s.cosine, s.rank) for row, s in zip(columns, stats, strict=True)
    )
    return [{k: v for k, v in zip(SUMMARY, row, strict=True) if v is not None} for row in rows]


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of a batch from those of its parts, such as the ranks of a distributed run.

    Moments merge exactly, by Chan's formula (`merge`). Similarity between samples of different parts is not known:
    cosine and rank are averaged over those that have them.

    Args:
        parts: over the same channels.

    Returns:
        The statistics of all.

    Example:
        >>> x = torch.arange(6.0).reshape(6, 1)
        >>> parts = [fetch({0: measure(part)})[0][0] for part in x.split(2)]
        >>> round(finish([merge_stats(parts)])[0]["var"], 4) == round(x.var(correction=0).item(), 4)
        True
    """

    def mean(values: Sequence[float | None]) -> float | None:
        measured = [v for v in values if v is not None]
        known = [v for v in measured if not math.isnan(v)]
        return sum(known) / len(known) if known else (math.nan if measured else None)

    # min() and max() would drop a NaN that is not the first.
    lows, highs = ([getattr(p, name) for p in parts] for name in ("low", "high"))
    broken = any(map(math.isnan, (*lows, *highs)))
    return Stats(
        functools.reduce(merge, [p.moments for p in parts]),
        math.nan if broken else min(lows),
        math.nan if broken else max(highs),
        mean([p.cosine for p in parts]),
        mean([p.rank for p in parts]),
    )
