"""Know in a microsecond that tensors still hold what they held, whoever could have written to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

Key = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class Snapshot(NamedTuple):
    """What some tensors held, without a copy: PyTorch's copy-on-write storage.

    A lazy clone shares the memory until someone writes through either of the two; then the writer moves to memory
    of its own, and the tensor's address is no longer the clone's. The address therefore answers what a version
    counter cannot: a write through `.data` and a step of a fused optimizer leave `_version` as it was, and a
    tensor made in inference mode has none. Reading every weight again would answer too, but costs 4 to 12 % of
    a ResNet-50's forward at batch 1.

    Two kinds of writer do not come through PyTorch's storage, so where they could be at work nothing is
    remembered: a NumPy array made earlier (it keeps the storage alive, which the reference count tells) and other
    processes (shared memory is not taken). Kernels replayed in a CUDA graph are a third: CPU only.

    Example:
        >>> weight = nn.Parameter(torch.ones(3))
        >>> snapshot = Snapshot.take([weight])
        >>> snapshot.holds([weight])
        True
        >>> weight.data.add_(1), snapshot.holds([weight])
        (tensor([2., 2., 2.]), False)
    """

    tensors: tuple[Tensor | None, ...]
    keys: tuple[Key | None, ...]
    clones: tuple[
        Tensor | None, ...
    ]  # keep the memory alive, so that an address cannot come to mean another tensor

    @classmethod
    def take(cls, tensors: Sequence[Tensor | None]) -> Self | None:
        """A snapshot, or None where a later change could not be told."""
        clones: list[Tensor | None] = []
        for tensor in tensors:
            clone = lazy_clone(tensor) if tensor is not None and tensor.is_cpu else None
            if clone is None and tensor is not None:
                return None
            clones.append(clone)
        return cls(tuple(tensors), tuple(None if t is None else key(t) for t in tensors), tuple(clones))

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether `tensors` are the same objects, with the values, shapes and types they had."""
        for tensor, kept, before in zip(tensors, self.tensors, self.keys, strict=True):
            # Another object may share the memory and still mean something else: a dual number, a batched tensor.
            if tensor is not kept:
                return False
            if (
                tensor is not None
                and (_address(tensor), tensor.shape, tensor.stride(), tensor.dtype) != before
            ):
                return False
        return True


_PLAIN = (Tensor, nn.Parameter)
# None of the four is public; without them nothing is remembered and everything stays right.
_address: Any = getattr(torch._C, "_data_address", None)
_references: Any = getattr(torch._C, "_storage_Use_Count", None)
_clone: Any = getattr(torch, "_lazy_clone", None)
_shared: Any = getattr(torch._C, "_is_cow_tensor", None)
_available = None not in (_address, _references, _clone, _shared)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor or parameter of no class of its own, each value at an address."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested


def lazy_clone(tensor: Tensor) -> Tensor | None:
    """A copy that takes memory only when one of both is written to; None where a writer could go unseen."""
    if not _available or not is_plain(tensor) or tensor.is_meta:
        return None
    try:
        storage = tensor.untyped_storage()
        # The tensor and its Python storage hold one reference each. A lazy clone made by another layer that shares
        # the tensor has a storage of its own.
        if storage.is_shared() or _references(storage._cdata) > 2:
            return None
        with torch.no_grad():
            return _clone(tensor.detach())
    except (
        NotImplementedError,
        RuntimeError,
    ):  # a functorch wrapper, or memory that PyTorch did not allocate
        return None


def is_lazily_shared(tensor: Tensor) -> bool:
    """Whether it shares its memory with a lazy clone, or did: until someone asks to write to it."""
    return _available and _shared(tensor)


def key(tensor: Tensor) -> Key:
    """Where its values are, and how they are to be read."""
    return _address(tensor) if _available else tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
