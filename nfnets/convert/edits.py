"""Modules exchanged in place, wherever a model holds them, and back again."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from nfnets.convert.own_forward import keep_hooks
from nfnets.convert.plan import Edit

Place = tuple[Any, Any]
"""A dictionary or list, and the key or position in it."""
Undo = tuple[Any, Any, Any]
"""A place and what stood there."""


def apply_edits(model: nn.Module, edits: list[Edit], undo: list[Undo] | None) -> None:
    """Exchange modules in place, wherever they are registered; appends to `undo` what to set to take it back, if that
    is wanted.

    Also where a module keeps them besides, as in `self.pairs = [(self.conv, self.norm)]`: its forward may call those.
    """
    places: dict[nn.Module, list[Place]] = {}
    _register(model, places)
    became: MutableMapping[nn.Module, nn.Module] = WeakKeyDictionary()  # what nobody holds is not to be kept
    for edit in edits:
        old = model.get_submodule(edit.path)
        new = edit.build(old)
        if new is old:
            continue
        keep_hooks(old, new)
        became[old] = new
        for container, key in places.pop(old):
            if undo is not None:
                undo.append((container, key, old))
            container[key] = new
            places.setdefault(new, []).append((container, key))
        _register(new, places)
    for module in model.modules() if became else ():
        for container, key, value in _held(module):
            if type(value) is tuple and (new := _exchanged(value, became)) is not value:
                if undo is not None:
                    undo.append((container, key, value))
                container[key] = new


def take_back(undo: list[Undo] | None) -> None:
    """Undo what `apply_edits` did."""
    for container, key, old in reversed(undo or []):
        container[key] = old


def _register(root: nn.Module, places: dict[nn.Module, list[Place]]) -> None:
    """Note where every module below `root` is held: looked up for each edit, it would be quadratic."""
    for parent in root.modules():
        for container, key, value in _held(parent):
            if isinstance(value, nn.Module):
                places.setdefault(value, []).append((container, key))


def _held(module: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """Everything in a module's attributes, and in dictionaries and lists there: submodules are in one of those."""
    waiting: list[Any] = [vars(module)]
    seen = {id(waiting[0])}
    while waiting:
        container = waiting.pop()
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if isinstance(value, dict | list) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
            yield container, key, value


def _exchanged(value: Any, became: MutableMapping[nn.Module, nn.Module]) -> Any:
    """A tuple with the modules that stand there now; the same one if none changed."""
    if isinstance(value, nn.Module):
        while value in became:  # edited twice
            value = became[value]
        return value
    if type(value) is not tuple:
        return value
    new = tuple(_exchanged(each, became) for each in value)
    return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
