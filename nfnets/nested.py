"""Tensors in what calls take and return: nested containers, data classes, any object that holds some."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device}  # leaves that are no tensors


def leaves(value: Any) -> list[Any]:
    """As pytree's, several times faster on what calls are mostly made of."""
    kind = type(value)
    if isinstance(value, Tensor) or kind in _PLAIN:
        return [value]
    if kind in (tuple, list, dict):
        return [leaf for each in (value.values() if kind is dict else value) for leaf in leaves(each)]
    return tree_leaves(value)


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in nested containers, and in the attributes of objects that are no containers to pytree.

    Example:
        >>> from types import SimpleNamespace
        >>> [len(t) for t in tensors_in({"a": torch.ones(2)}, [SimpleNamespace(images=torch.ones(3))])]
        [2, 3]
    """
    found: list[Tensor] = []
    _gather(values, found)
    return found


def _gather(values: Iterable[Any], found: list[Tensor], seen: set[int] | None = None) -> None:
    """As `leaves`, for tensors: a pass asks several times for every call it makes."""
    for value in values:
        kind = type(value)
        if isinstance(value, Tensor):
            found.append(value)
        elif kind is tuple or kind is list:
            _gather(value, found, seen)
        elif kind is dict:
            _gather(value.values(), found, seen)
        elif kind not in _PLAIN:
            seen = set() if seen is None else seen
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor):
                    found.append(leaf)
                elif id(leaf) not in seen:
                    seen.add(id(leaf))
                    _gather(_attributes(leaf), found, seen)


def _attributes(thing: Any) -> list[Any]:
    """What an object holds: a data class, an image list, a distribution. Code holds no data of a call."""
    if isinstance(thing, nn.Module | type | ModuleType):
        return []
    held = (
        [*thing.values()] if isinstance(thing, dict) else [*thing] if isinstance(thing, list | tuple) else []
    )
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*held, *getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]


def no_sample(values: Any) -> str:
    """Why nothing can be measured on inputs whose first tensor holds no value; empty if it does.

    A later one may: boxes of an image that shows nothing.
    """
    first = next(iter(tensors_in(values)), None)
    if first is None or first.numel():
        return ""
    return f"input of shape {tuple(first.shape)}: expected at least one sample; pass a batch"


def fresh(values: Any) -> Any:
    """Copies of the tensors in nested containers and objects: a model may overwrite its inputs, and they are the
    caller's."""
    copies: dict[int, Tensor] = {}

    def renewed(leaf: Any) -> Any:
        for tensor in (held := tensors_in(leaf)):
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.clone()
        if isinstance(leaf, Tensor):
            return copies[id(leaf)]
        return copy.deepcopy(leaf, {id(t): copies[id(t)] for t in held}) if held else leaf

    return tree_map(renewed, values)
