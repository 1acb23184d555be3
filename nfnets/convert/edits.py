"""Modules exchanged in place, wherever a model holds them, and back again."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial
from weakref import WeakKeyDictionary

from torch import nn

from nfnets.convert.fused import like
from nfnets.convert.holders import Undo, exchange
from nfnets.convert.plan import Edit
from nfnets.structure.own_forward import keep_hooks

Became = MutableMapping[nn.Module, nn.Module]
"""New modules by the old ones they stand for, as long as anybody holds those."""


def apply_edits(model: nn.Module, edits: list[Edit], undo: list[Undo] | None) -> Became:
    """Exchange modules in place, wherever they are held; appends to `undo` what takes it back, if that is wanted.

    Also where a model keeps them besides, as in `self.pairs = [(self.conv, self.norm)]` or `partial(self.norm)`: its
    forward may call those.

    Returns:
        What became of the old modules.
    """
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    _register(model, places)
    where = like(model)
    became: Became = WeakKeyDictionary()
    for edit in edits:
        old = model.get_submodule(edit.path)
        new = _built(edit, old)
        if new is old:
            continue
        if not like(old):  # it had no tensors to tell where it is
            new.to(**where)
        keep_hooks(old, new)
        became[old] = new
        for parent, name in places.pop(old):  # at once, not at the end: what nobody holds need not be kept
            if undo is not None:
                undo.append(partial(parent._modules.__setitem__, name, old))
            parent._modules[name] = new
            places.setdefault(new, []).append((parent, name))
        _register(new, places)
    exchange_modules(model, became, undo)
    return became


def exchange_modules(model: nn.Module, became: Became, undo: list[Undo] | None) -> None:
    """Put new modules where old ones are held."""
    alive = dict(became)
    stands = {id(old): _latest(old, alive) for old in alive}
    wrappers = [new for old, new in alive.items() if any(each is old for each in new.modules())]
    exchange(
        [model], stands | {id(new): new for new in wrappers}, undo
    )  # a wrapper goes on holding the old one


def _built(edit: Edit, old: nn.Module) -> nn.Module:
    try:
        return edit.build(old)
    except Exception as error:
        error.add_note(f"while building what is to stand at {edit.path}")
        raise


def take_back(undo: list[Undo] | None) -> None:
    """Undo what was done."""
    for back in reversed(undo or []):
        back()


def _latest(old: nn.Module, became: Mapping[nn.Module, nn.Module]) -> nn.Module:
    new = became[old]
    while new in became:  # edited twice
        new = became[new]
    return new


def _register(root: nn.Module, places: dict[nn.Module, list[tuple[nn.Module, str]]]) -> None:
    """Note where every module below `root` is registered: looked up for each edit, it would be quadratic."""
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
