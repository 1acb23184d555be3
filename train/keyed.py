"""Keyed randomness: a number depends on what it is for, never on what was drawn before it.

A draw is a pure function of (seed, stream, epoch or step, sample index). So two arms of a seed see the same
order and the same augmentation, a resumed run needs no generator state, and neither the batch a sample lands
in nor the device changes its draw.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# SplitMix64's increment and finalizer (Steele, Lea, Flood 2014), as signed 64-bit integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def key(seed: int, stream: str, *counters: int) -> int:
    """A signed 64-bit key of a stream: the first 8 bytes of BLAKE2b over seed, stream and counters.

    Args:
        seed: the run's seed.
        stream: what the numbers are for ("order", "crop", …).
        counters: epoch, step, rank, … in the order that the stream's user chose.

    Returns:
        An integer in [−2^63, 2^63).

    Example:
        >>> key(0, "order", 1) == key(0, "order", 1), key(0, "order", 1) == key(0, "order", 2)
        (True, False)
    """
    text = "\x1f".join([str(seed), stream, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def bits(stream_key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits for every index: SplitMix64's output function at key + (index + 1) · increment.

    Integer arithmetic modulo 2^64 only, so CPU and GPU give the same bits.

    Args:
        stream_key: from `key`; or a key for each index, int64 of a shape that broadcasts with it.
        index: int64 of any shape (sample indices, say).

    Returns:
        int64 of the same shape, all 64 bits random.

    Example:
        >>> one = bits(7, torch.tensor([3])); many = bits(7, torch.arange(5))
        >>> bool(one[0] == many[3])
        True

    Reference:
        https://prng.di.unimi.it/splitmix64.c
    """
    z = (index.to(torch.int64) + 1) * _INCREMENT + stream_key
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's own on int64 copies the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def uniform(stream_key: int | Tensor, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1): the top 24 bits (53 for float64) over 2^24 (2^53).

    Example:
        >>> u = uniform(key(0, "doc"), torch.arange(1000))
        >>> bool((u >= 0).all() and (u < 1).all())
        True
    """
    if dtype == torch.float64:
        return _shift(bits(stream_key, index), 11).to(torch.float64) * 2.0**-53
    return (_shift(bits(stream_key, index), 40).to(torch.float32) * 2.0**-24).to(dtype)


def integers(stream_key: int, index: Tensor, count: int) -> Tensor:
    """Uniform integers in [0, count), as int64: the top 31 bits times count, over 2^31.

    The bias is at most count · 2^−31: nothing for crop offsets.

    Example:
        >>> sorted(set(integers(key(0, "doc"), torch.arange(100), 3).tolist()))
        [0, 1, 2]
    """
    if not 0 < count <= 2**31:
        raise ValueError(f"count={count}: expected between 1 and 2^31")
    return (_shift(bits(stream_key, index), 33) * count) >> 31


def bernoulli(stream_key: int, index: Tensor, probability: float) -> Tensor:
    """True with the given probability, for every index.

    Example:
        >>> bool(bernoulli(1, torch.arange(9), 0.0).any()), bool(bernoulli(1, torch.arange(9), 1.0).all())
        (False, True)
    """
    return uniform(stream_key, index) < probability


def normal(stream_key: int, index: Tensor) -> Tensor:
    """Standard normal numbers, float32: Box-Muller in float64, sqrt(−2 ln(1 − u)) · cos(2πv).

    The bits agree on every device; the logarithm and cosine may differ in float64's last place.

    Example:
        >>> bool(normal(1, torch.arange(10_000)).std().sub(1).abs() < 0.03)
        True
    """
    u = uniform(stream_key, 2 * index.to(torch.int64), torch.float64)
    v = uniform(stream_key, 2 * index.to(torch.int64) + 1, torch.float64)
    return (torch.sqrt(-2.0 * torch.log1p(-u)) * torch.cos(2.0 * math.pi * v)).float()


def permutation(stream_key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of 0 … count − 1: the indices in the order of their bits.

    Example:
        >>> sorted(permutation(5, 4).tolist())
        [0, 1, 2, 3]
    """
    index = torch.arange(count, dtype=torch.int64, device=device)
    return torch.argsort(bits(stream_key, index), stable=True)


@contextmanager
def seeded(seed: int, stream: str, *counters: int) -> Iterator[None]:
    """Torch's, NumPy's and Python's global generators seeded by a key, and restored afterwards.

    For code that draws from global generators, such as a model's own initialization.

    Example:
        >>> with seeded(0, "init"): a = torch.rand(1)
        >>> with seeded(0, "init"): b = torch.rand(1)
        >>> bool(a == b)
        True
    """
    value = key(seed, stream, *counters) & (2**63 - 1)
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=cuda):
        seed_torch(value)
        random.seed(value)
        np.random.seed(value % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def seed_torch(value: int) -> None:
    """Seed torch's generators for this process.

    Unlike `torch.manual_seed` it queues nothing for a CUDA that never started: cheap enough for each step.
    """
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
