"""A model left as it was, whatever its forward does to it."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.snapshot import is_lazily_shared, is_plain, lazy_clone
from nfnets.snapshot import key as _place


@contextlib.contextmanager
def preserved(model: nn.Module, parameters: bool = True) -> Iterator[None]:
    """Leave a model as it was, also after an exception: attributes, values, modes and random state.

    Attributes are those of its modules and of what they hold: containers and objects, with what a forward keeps there.
    Values are those of parameters, buffers and other tensors; what autograd saved of them before can still be
    differentiated. A parameter costs no copy unless the forward writes to it.

    Args:
        model: any module.
        parameters: False where the block is to change them.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with preserved(model):
        ...     _ = model(torch.randn(4, 2))
        >>> model.running_mean
        tensor([0., 0.])
    """
    tensors, containers, generators = _held(model)
    trained = set() if parameters else set(map(id, model.parameters()))
    kept = [_Kept(tensor) for tensor in tensors if id(tensor) not in trained]
    versions = tuple(each.tensor for each in kept if not each.tensor.is_inference())
    states = [(generator, generator.get_state()) for generator in generators]
    modes = [(m, m.training) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    devices = {t.device.index or 0 for t in tensors if t.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            # Autograd refuses what has another version than when it was saved, and it has the same value again.
            with _same_versions(versions):
                try:
                    yield
                finally:
                    for container, before in containers:
                        _put_back(container, before)
                    for each in kept:
                        each.put_back()
        finally:
            random.setstate(drawn[0])
            if numpy:
                numpy.random.set_state(drawn[1])
            for generator, state in states:
                generator.set_state(state)
            for module, mode in modes:
                module.training = mode


def check_ordinary(model: nn.Module) -> None:
    """Refuse a model whose values nothing may write to.

    Raises:
        UserError: a parameter or buffer was made under `torch.inference_mode`.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not nn.parameter.is_lazy(tensor) and tensor.is_inference():
            raise UserError(
                f"{name} was made under torch.inference_mode: expected a tensor that can be changed; pass "
                "copy.deepcopy(model), which is an ordinary model"
            )


_same_versions: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[reportPrivateImportUsage]
_CODE = (FunctionType, MethodType, BuiltinFunctionType, ModuleType, type)
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
_NO_PLACE = (Tensor, *_CODE, *_WEAK, torch.jit.ScriptModule)
"""Whose attributes a forward writes nothing to."""
_BARE = {dict, list, tuple, set, frozenset, deque}
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_THREADS = {"threading", "queue", "multiprocessing", "concurrent", "asyncio", "logging"}
_VALUES = {
    int,
    float,
    bool,
    str,
    bytes,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    FunctionType,
}

Container = tuple[Any, Any]
"""A dictionary, list, set or deque, and a copy of it."""


def _held(model: nn.Module) -> tuple[list[Tensor], list[Container], list[torch.Generator]]:
    """What a model holds: every tensor and every container, those of objects that it holds too."""
    containers: list[Container] = []
    generators: list[torch.Generator] = []
    found: list[Any] = [*model.parameters(), *model.buffers()]  # of scripted modules, too
    tensors: list[Tensor] = []
    waiting: list[Any] = [*found, model]
    seen: set[int] = set()
    while waiting:
        thing = waiting.pop()
        if type(thing) in _VALUES or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            tensors += [] if nn.parameter.is_lazy(thing) else [thing]
            continue
        if isinstance(thing, dict):
            containers.append((thing, dict(_base(thing).items(thing))))
            waiting += containers[-1][1].values()
        elif isinstance(thing, (tuple, frozenset)):
            waiting += thing
        elif isinstance(thing, (list, set, deque)):
            containers.append((thing, list(thing)))
            waiting += thing
        elif isinstance(thing, torch.Generator):
            generators.append(thing)
        if (attributes := _attributes(thing)) is not None:
            containers.append((attributes, dict(attributes)))
            waiting += [
                value
                for name, value in attributes.items()
                if type(value) not in _VALUES and not _is_hooks(name)
            ]
    return tensors, containers, generators


def _attributes(thing: Any) -> dict[str, Any] | None:
    """An object's dictionary, if a forward may leave something there."""
    if type(thing) in _BARE or isinstance(thing, _NO_PLACE):
        return None
    module = isinstance(thing, nn.Module)
    if not module and type(thing).__module__.startswith("torch."):
        return None  # a compiler's graph, an autograd function: no place of the model's own
    attributes = getattr(thing, "__dict__", None)
    if type(attributes) is not dict:
        return None
    if module:
        own: list[Any] = [*thing._parameters.values(), *thing._buffers.values()]
        lazy = any(map(nn.parameter.is_lazy, own))
        return None if lazy else attributes  # its first pass makes another class of it
    # A queue or a logger: other threads may be at work on it.
    shared = any(isinstance(value, _LOCKS) or _of_threads(value) for value in (thing, *attributes.values()))
    return None if shared else attributes


def _of_threads(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] in _THREADS


def _is_hooks(name: str) -> bool:
    """Hooks are taken away by their handles, and by other threads that trace the same model."""
    return name.endswith("_hooks") or "_hooks_" in name


def _put_back(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        base = _base(container)
        if _same(base.keys(container), before) and _same(base.values(container), before.values()):
            return
        for key in base.keys(container) - before.keys():
            base.__delitem__(container, key)
        for key, value in before.items():
            base.__setitem__(container, key, value)
        if not _same(base.keys(container), before):  # the order, too
            for key, value in before.items():
                base.__delitem__(container, key)
                base.__setitem__(container, key, value)
    elif not isinstance(container, list | deque):
        if len(container) != len(before) or any(each not in container for each in before):
            set.clear(container)
            set.update(container, before)
    elif not _same(container, before):
        if isinstance(container, list):
            list.__setitem__(container, slice(None), before)
        else:
            deque.clear(container)
            deque.extend(container, before)


def _base(container: Any) -> Any:
    """Whose methods to use: a class of somebody else's may forbid them, or do more."""
    return OrderedDict if isinstance(container, OrderedDict) else dict


def _same(now: Any, before: Any) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


class _Kept:
    """A tensor with its value, its memory and its shape in it, and whether gradients reach it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.leaf, self.learns = tensor.is_leaf, tensor.requires_grad
        self.place = _place(tensor) if is_plain(tensor) else None
        self.storage = tensor.untyped_storage() if self.place else None
        self.offset = tensor.storage_offset() if self.place else 0
        self.was_shared = self.place is not None and is_lazily_shared(tensor)
        # Elsewhere than on the CPU, graphs of kernels may know where a buffer is, which moves when it is written to.
        lazily = self.place is not None and (tensor.is_cpu or isinstance(tensor, nn.Parameter))
        with torch.inference_mode(False), torch.no_grad():
            self.lazy = lazy_clone(tensor) if lazily else None
            self.copy = _clone(tensor) if self.lazy is None else self.lazy

    def put_back(self) -> None:
        tensor = self.tensor
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if self.leaf and not tensor.is_leaf and not tensor._is_view():
                tensor.detach_()
            if tensor.is_leaf and tensor.requires_grad != self.learns:
                tensor.requires_grad_(self.learns)
            if self.place is None:
                if self.copy is not None:
                    tensor.copy_(self.copy)
            elif self.lazy is None or _place(tensor) != self.place:
                self._put_back_value()
        self.copy = self.lazy = None
        if self.place is not None and not self.was_shared and is_lazily_shared(tensor):
            tensor.data_ptr()  # nobody shares it any more: memory like any other

    def _put_back_value(self) -> None:
        assert self.place is not None
        assert self.storage is not None
        address, shape, stride, dtype = self.place
        # Through a tensor of its own: what is written there does not count as a version of `tensor`.
        before = torch.empty(0, dtype=dtype, device=self.tensor.device)
        before.set_(self.storage, self.offset, shape, stride)
        if _place(self.tensor) != _place(before):
            self.tensor.data = before
        if self.copy is not None and (self.lazy is None or _place(before)[0] != address):
            before.copy_(self.copy)


def _clone(tensor: Tensor) -> Tensor | None:
    """Its values; None if it has none, or none that could be written to."""
    overlaps = is_plain(tensor) and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if tensor.is_meta or overlaps:
        return None
    try:
        return tensor.detach().clone()
    except (NotImplementedError, RuntimeError):  # a kind of tensor that cannot be copied
        return None
