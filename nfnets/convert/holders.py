"""What Python things hold, and how to put something else there: containers, objects, methods, partials, functions."""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import gc
import inspect
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinMethodType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

Undo = Callable[[], None]
"""Sets back what one exchange changed."""

LEAVES = (Tensor, type, type(None), ModuleType, str, bytes, int, float, complex, torch.dtype, torch.device)
LEAVES += (torch.jit.ScriptModule, torch.jit.ScriptFunction)  # type: ignore[assignment]
_BOUND = (MethodType, BuiltinMethodType, type([].__len__))
_FIXED = (tuple, frozenset, FunctionType, functools.partial, weakref.ref, *_BOUND)
"""What is made anew to hold something else. A function, since its variables are those of whoever wrote it, too."""
_CACHED = type(functools.lru_cache(len))
"""Holds a function and results where only the garbage collector looks: what it holds is seen, and stays."""
CONTAINERS = (dict, list, tuple, set, frozenset, deque, weakref.ref)
_VALUES = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
_BARE = {dict, list, tuple, set, frozenset, deque, OrderedDict}


def is_idle(thing: Any) -> bool:
    """Whether it is a mere value or holds nothing, as most of what a module keeps: told by its type, without a search.

    Example:
        >>> [is_idle(each) for each in (True, (), (1, 2), torch.ones(2))]
        [True, True, False, False]
    """
    kind = type(thing)
    if kind in _BARE:
        return not thing and not (kind is OrderedDict and thing.__dict__)
    return kind in _VALUES


def exchange(
    roots: Iterable[Any],
    became: Mapping[int, Any],
    undo: list[Undo] | None = None,
    own: Callable[[Any], bool] = lambda _: True,
) -> None:
    """Put new things where old ones are held, as far as Python can be looked into.

    Args:
        roots: where to begin.
        became: what stands for a thing, by the thing's `id`; the old things must be alive.
        undo: takes what sets everything back.
        own: what may be written to. Code and containers that are not, are made anew where they lead to an old thing;
            other objects are left, and not looked into.

    Example:
        >>> held = {"steps": [1.5, 2.5], "next": functools.partial(max, 2.5)}
        >>> old = held["steps"][1]
        >>> exchange([held], {id(old): "new"}), held["steps"]
        (None, [1.5, 'new'])
    """
    writable = lambda thing: not isinstance(thing, _FIXED) and own(thing)  # noqa: E731
    seen = {id(root): root for root in roots}  # keeps alive what is found, so that an id stays one thing's
    holders: dict[int, list[Any]] = {}
    waiting = list(seen.values())
    while waiting:
        thing = waiting.pop()
        if not (own(thing) or callable(thing) or isinstance(thing, CONTAINERS)):
            continue
        for part in parts(thing, keys=writable(thing)):
            if id(part) in became or not (is_idle(part) or isinstance(part, LEAVES)):
                holders.setdefault(id(part), []).append(thing)
                if id(part) not in seen and id(part) not in became:
                    seen[id(part)] = part
                    waiting.append(part)
    leads: dict[int, Any] = {}
    changed = [key for key in became if key in holders]
    while changed:
        for holder in holders.get(changed.pop(), ()):
            if id(holder) not in leads:
                leads[id(holder)] = holder
                if not writable(holder):
                    changed.append(id(holder))
    made: dict[int, Any] = {}
    cells: dict[int, CellType] = {}

    def new(value: Any) -> Any:
        key = id(value)
        if key in became:
            return became[key]
        if key not in leads or writable(value):
            return value
        if key not in made:
            if isinstance(value, _FIXED) and not isinstance(value, FunctionType):
                made[key] = _rebuilt(value, new)
            else:  # known before it is filled: it may hold itself
                made[key] = _twin(value, lambda each: id(each) in became or id(each) in leads, cells)
                if made[key] is not value:
                    _fill(made[key], new, None)
        return made[key]

    for thing in leads.values():
        if writable(thing):
            _fill(thing, new, undo)
    became = {}  # `new` holds itself, and would hold what stands for anything until the collector runs
    leads.clear()
    made.clear()


def parts(thing: Any, keys: bool = True) -> list[Any]:
    """What a thing holds itself.

    Args:
        thing: anything.
        keys: of dictionaries, too. They name things more often than that they are called.

    Example:
        >>> parts(functools.partial(max, 1, key=len))[:3] == [max, 1, len]
        True
    """
    if isinstance(thing, LEAVES):
        return []
    found: list[Any] = []
    if isinstance(thing, dict):
        found += [*dict.values(thing), *(dict.keys(thing) if keys else ())]
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        found += thing
    elif isinstance(thing, FunctionType):
        found += [value for cell in thing.__closure__ or () for value in _content(cell)]
        found += [thing.__defaults__, thing.__kwdefaults__]
    elif isinstance(thing, _BOUND):
        found += [thing.__self__, getattr(thing, "__func__", None)]
    elif isinstance(thing, functools.partial):
        found += [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, weakref.ref):
        found.append(thing())
    elif isinstance(thing, _CACHED):
        found += gc.get_referents(thing)
    if type(own := _dictionary(thing)) is dict:
        found += own.values()
    for slot in _slots(type(thing)):
        with contextlib.suppress(AttributeError):
            found.append(slot.__get__(thing))
    return found


def globals_of(function: FunctionType) -> dict[str, Any]:
    """What a function reads by a global name, functions inside it too.

    Example:
        >>> list(globals_of(globals_of))
        ['_codes', 'dis']
    """
    names = [
        step.argval
        for code in _codes(function.__code__)
        for step in dis.get_instructions(code)
        if step.opname == "LOAD_GLOBAL"
    ]
    known = function.__globals__
    return {name: known[name] for name in dict.fromkeys(names) if name in known}


def _codes(code: Any) -> Iterator[Any]:
    yield code
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _codes(constant)


def _content(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a variable that has no value yet
        return []


def attributes(thing: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Name, value and setter of what an object keeps, past properties and `__setattr__`."""
    own = _dictionary(thing)
    if type(own) is dict:
        for name, value in list(own.items()):
            yield name, value, functools.partial(own.__setitem__, name)
    for slot in _slots(type(thing)):
        with contextlib.suppress(AttributeError):  # one that was never set
            yield slot.__name__, slot.__get__(thing), functools.partial(slot.__set__, thing)


def _dictionary(thing: Any) -> Any:
    return None if isinstance(thing, _BOUND) else getattr(thing, "__dict__", None)


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    owners = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]
    return tuple(each for own in owners for each in own.values() if isinstance(each, MemberDescriptorType))


def _fill(thing: Any, new: Callable[[Any], Any], undo: list[Undo] | None) -> None:
    """Put `new(value)` where a thing holds `value`."""
    if isinstance(thing, dict | set):
        before: list[Any] = list(dict.items(thing)) if isinstance(thing, dict) else list(thing)
        after = [tuple(map(new, each)) if isinstance(thing, dict) else new(each) for each in before]
        pairs = zip(_flat(before), _flat(after), strict=True)
        if any(a is not b for a, b in pairs):
            _keep(undo, functools.partial(_put, thing, before))
            _put(thing, after)
    places: list[tuple[Any, Callable[[Any], None]]] = []
    if isinstance(thing, list | deque):
        places += [(value, functools.partial(thing.__setitem__, i)) for i, value in enumerate(thing)]
    if isinstance(thing, FunctionType):
        for cell in thing.__closure__ or ():
            places += [(v, functools.partial(setattr, cell, "cell_contents")) for v in _content(cell)]
        for name in ("__defaults__", "__kwdefaults__"):
            places.append((getattr(thing, name), functools.partial(setattr, thing, name)))
    for value, put in [*places, *((value, put) for _, value, put in attributes(thing))]:
        changed = new(value)
        if changed is not value:
            _keep(undo, functools.partial(put, value))
            put(changed)


def _flat(contents: list[Any]) -> list[Any]:
    """The things in a list, and in the pairs in it."""
    return [part for each in contents for part in (each if type(each) is tuple else (each,))]


def _put(thing: Any, contents: list[Any]) -> None:
    kind: Any = dict if isinstance(thing, dict) else set
    kind.clear(thing)
    kind.update(thing, contents)


def _keep(undo: list[Undo] | None, back: Undo) -> None:
    if undo is not None:
        undo.append(back)


def _twin(thing: Any, changes: Callable[[Any], bool], cells: dict[int, CellType]) -> Any:
    """A copy that holds the same; the thing itself where it has none."""
    if not isinstance(thing, FunctionType):
        try:
            return copy.copy(thing)
        except Exception:  # a handle of something outside Python, perhaps
            return thing
    closure = [
        cells.setdefault(id(cell), CellType(*_content(cell))) if any(map(changes, _content(cell))) else cell
        for cell in thing.__closure__ or ()
    ]
    twin = FunctionType(thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, tuple(closure))
    twin.__kwdefaults__ = thing.__kwdefaults__
    twin.__dict__.update(thing.__dict__)
    for name in functools.WRAPPER_ASSIGNMENTS:
        if hasattr(thing, name):
            setattr(twin, name, getattr(thing, name))
    return twin


def _rebuilt(thing: Any, new: Callable[[Any], Any]) -> Any:
    if isinstance(thing, _BOUND):
        return _bound(thing, new)
    if isinstance(thing, weakref.KeyedRef):
        return weakref.KeyedRef(new(thing()), thing.__callback__, thing.key)  # type: ignore[arg-type, attr-defined]
    if isinstance(thing, weakref.ref):
        return type(thing)(new(thing()), thing.__callback__)
    if isinstance(thing, functools.partial):
        named = {name: new(value) for name, value in thing.keywords.items()}
        partial = type(thing)(new(thing.func), *map(new, thing.args), **named)
        partial.__dict__.update({name: new(value) for name, value in thing.__dict__.items()})
        return partial
    values = list(map(new, thing))
    return thing._make(values) if hasattr(thing, "_make") else type(thing)(values)


def _bound(method: Any, new: Callable[[Any], Any]) -> Any:
    """The method of the new object: its own of that name, if it is of another class."""
    old, function = method.__self__, getattr(method, "__func__", None)
    owner = new(old)
    inherited = function is None or getattr(type(old), method.__name__, None) is function
    if inherited and (function is None or type(owner) is not type(old)):
        kept = getattr(type(owner), method.__name__, None)
        return method if kept is None else kept.__get__(owner)
    return MethodType(new(function), owner)
