"""Deep copies of models that keep what they computed: a cached activation, a weight that a hook computes."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Value = TypeVar("Value")


def deep_copy(value: Value, memo: dict[int, Any] | None = None) -> Value:
    """`copy.deepcopy`, of tensors that were computed with gradients too.

    PyTorch refuses those, as their history cannot be copied. The copy keeps their values without history; what is a
    view of a parameter becomes a view of the copied one.

    Args:
        value: a model, most often; anything that can be copied otherwise.
        memo: as of `copy.deepcopy`: copies by the `id` of what they were made from.

    Returns:
        The copy, which shares no memory with the original.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.seen = layer(torch.ones(1, 2))
        >>> bool((deep_copy(layer).seen == layer.seen).all())
        True
    """
    with _WithoutHistory():
        return copy.deepcopy(value, memo)


def twin_of(module: nn.Module) -> Any:
    """A twin of a module that shares everything with it, but can be given parameters of its own.

    `copy.copy` is for modules that can be pickled, which parametrized ones cannot.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._parameters = dict(module._parameters)
    return twin


class _WithoutHistory(TorchFunctionMode):
    """Copies tensors that have a history, whatever holds them and whoever copies that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **kwargs or {})
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _copied(tensor, memo)
        return memo[id(tensor)]


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    base = tensor._base
    if base is None or not base.is_leaf:
        return tensor.detach().clone()
    whole = copy.deepcopy(base, memo)
    with torch.enable_grad():
        return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
