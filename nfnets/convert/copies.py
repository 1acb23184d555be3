"""A copy that computes with itself: what `deepcopy` shares is made the copy's own, and what remains is found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from nfnets.convert.example import Example, completed, in_mode
from nfnets.convert.holders import CONTAINERS, LEAVES, attributes, exchange, globals_of, is_idle, parts
from nfnets.copying import deep_copy
from nfnets.errors import UserError, first_line
from nfnets.graph import Graph
from nfnets.nested import tensors_in
from nfnets.structure.walk import is_weighted
from nfnets.trace import beside, trace


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose code is its own, too.

    `deepcopy` shares functions and weak references: a wrapped or compiled forward would go on with the original's
    layers. Those that lead to anything that was copied are made anew, on the copy. What they read by a global name
    stays the one thing that it is, also where the model keeps it: a hook fills it, the forward reads it.

    Raises:
        UserError: something that the model keeps cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> def wrap(model):
        ...     model.forward = lambda x: model[0](x)
        >>> wrap(net)
        >>> copied = own_copy(net)
        >>> copied.forward.__closure__[0].cell_contents is copied
        True
    """
    shared = {id(thing): thing for _, thing, named in reached(model) if named and not callable(thing)}
    memo = {key: thing for key, thing in shared.items() if not isinstance(thing, LEAVES)}
    kept = set(memo)
    try:
        target = deep_copy(model, memo)
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}): expected attributes that can; change the "
            "model itself (inplace=True)"
        ) from error
    became = {key: copied for key, copied in memo.items() if key not in kept}
    made = {id(copied) for copied in became.values()}
    exchange([target], became, own=lambda thing: id(thing) in made)
    return target


_Place = tuple[str, ...]
"""A module's path, its attribute, and the global names by which code led on from there."""


def reached(model: nn.Module) -> Iterator[tuple[_Place, Any, bool]]:
    """Everything that a model's modules hold beside themselves and mere values: where, what, and whether by a global
    name.

    Of what code reads by name, code and containers are looked into, and functions of the same file followed.
    """
    modules = dict(model.named_modules())
    seen = {id(module): module for module in modules.values()}  # keeps alive what has these ids
    waiting: list[tuple[_Place, Any, Any]] = []
    for path, module in modules.items():
        held = [(name, value) for name, value, _ in attributes(module) if not is_idle(value)]
        waiting += [((path, name), value, None) for name, value in held]
    named: list[tuple[_Place, Any, Any]] = []
    while waiting or named:
        where, thing, file = waiting.pop() if waiting else named.pop()
        known = id(thing) in seen
        if not known or file is not None:
            yield where, thing, file is not None
        if known:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, LEAVES) or not (
            file is None or callable(thing) or isinstance(thing, CONTAINERS)
        ):
            continue
        if isinstance(thing, FunctionType) and (file is None or file is thing.__globals__):
            found = globals_of(thing).items()
            named += [((*where, name), value, thing.__globals__) for name, value in found]
        # Of what a global name leads to, an empty list counts: that it is one and the same.
        held = parts(thing, keys=False)
        waiting += [(where, part, file) for part in held if file is not None or not is_idle(part)]


def _said(place: _Place) -> str:
    path, name, *names = place
    where = f"a hook of {path or 'the model'}" if name.endswith("_hooks") else f"{path}.{name}".strip(".")
    return ", by the global name ".join([where, *names])


def refuse_strays(model: nn.Module, target: nn.Module, became: Mapping[nn.Module, nn.Module]) -> None:
    """Refuse a changed model that still leads to the original's layers, or to those that were replaced.

    Args:
        model: the original; `target` where it was changed in place.
        target: the changed model.
        became: new layers by those that they replaced.

    Raises:
        UserError: says where, and what to do.
    """
    old = _old(model, target, became)  # keeps alive what has the ids
    wanted = _foreign(target, old)
    for where, thing, _ in reached(target) if wanted else ():
        if id(thing) in wanted:
            raise _refusal(model, target, f"{_said(where)} still leads to {wanted[id(thing)]}")


def _old(model: nn.Module, target: nn.Module, became: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, str]:
    """Modules that must not be used any more, by their paths."""
    paths = {module: path for path, module in target.named_modules()}
    old = (
        {module: path or "a module" for path, module in model.named_modules()} if model is not target else {}
    )
    return old | {before: paths.get(new, "a replaced layer") for before, new in became.items()}


def _refusal(model: nn.Module, target: nn.Module, what: str) -> UserError:
    kind = type(model).__name__
    if model is target:
        return UserError(
            f"{kind} in place: {what} as it was before: expected layers that are held where they can be exchanged; "
            "call them as attributes (self.…)"
        )
    return UserError(
        f"the copy of {kind}: {what} of the original: expected code that can be copied; change the model itself "
        "(inplace=True), or remove what leads there"
    )


@contextlib.contextmanager
def watched(model: nn.Module, target: nn.Module, became: Mapping[nn.Module, nn.Module]) -> Iterator[set[str]]:
    """Notes which modules that are none of the changed model's own are called, or read in recorded passes, meanwhile.

    Args:
        model: the original; `target` where it is changed in place.
        target: the changed model.
        became: new layers by those that they replaced.

    Yields:
        Their paths, so far.
    """
    old = _old(model, target, became)
    wanted = _foreign(target, old)
    called: set[str] = set()

    def note(module: nn.Module, given: Any) -> None:
        if id(module) in wanted:
            called.add(wanted[id(module)])

    # A layer that replaced another may share the dictionary of its hooks: `note` looks who was called.
    takes = [
        module for module in old if id(module) in wanted and not isinstance(module, torch.jit.ScriptModule)
    ]
    handles = [module.register_forward_pre_hook(note) for module in takes]
    try:
        with beside(_Watch(wanted, called)):
            yield called
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Notes which of some tensors anything is computed from: a forward that is called by itself passes hooks by."""

    def __init__(self, wanted: Mapping[int, str], read: set[str]):
        super().__init__()
        self.wanted, self.read = wanted, read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {self.wanted[id(each)] for each in tensors_in(args, kwargs) if id(each) in self.wanted}
        output = func(*args, **kwargs or {})
        if read and tensors_in(output):
            self.read |= read
        return output


def _foreign(model: nn.Module, old: Mapping[nn.Module, str]) -> dict[int, str]:
    own = {id(each) for each in [*model.modules(), *model.parameters(), *model.buffers()]}
    found: dict[int, str] = {}
    for module, path in old.items():
        held = (*module._parameters.values(), *module._buffers.values())
        found |= {id(each): path for each in (module, *held) if each is not None and id(each) not in own}
    return found


def _on_few(model: nn.Module, given: Example) -> Graph:
    """The graph on the first two samples, where the example seems to be a batch and the model takes them."""
    tensors = tensors_in(given)
    sizes = {len(each) if each.ndim > 2 else 0 for each in tensors}
    seen = [each for each in tree_leaves(tuple(given)) if isinstance(each, Tensor)]
    if len(sizes) == 1 and max(sizes) > 2 and len(seen) == len(tensors):
        few = Example(*tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) else leaf, tuple(given)))
        with contextlib.suppress(UserError):
            return _traced(model, few)
    return _traced(model, given)


def _traced(model: nn.Module, given: Example) -> Graph:
    with completed(model, given):
        return trace(model, *given.listed)


def needs(graph: Graph) -> set[str]:
    """Paths of the convolutions and linears that the outputs depend on, and "" for an input."""
    nodes = {index for output in graph.outputs for index in (output, *graph.ancestors(output))}
    used = [graph.nodes[index] for index in nodes]
    return {node.path for node in used if is_weighted(node.module) or node.kind == "input"}


def check_copy(
    model: nn.Module,
    target: nn.Module,
    graph: Graph,
    became: Mapping[nn.Module, nn.Module],
    given: Example,
    mode: bool | None,
    seen: tuple[Graph | None, set[str]],
) -> None:
    """Refuse a converted model that would compute with the original's layers, with replaced ones or with what it
    remembers of the original's.

    Args:
        model: the original; `target` where it was converted in place.
        target: the converted model.
        graph: the original's.
        became: new layers by those that they replaced.
        given: what both are run on.
        mode: of the graph.
        seen: the graph of a pass of the converted model that was `watched`, if there was one, and whom that noted.

    Raises:
        UserError: says where, and what to do.
    """
    refuse_strays(model, target, became)
    after, called = seen
    if after is None:
        with in_mode(target, mode), watched(model, target, became) as called:
            after = _on_few(target, given)
    if called:
        raise _refusal(model, target, f"its forward still computes with {min(called)}")
    if model is target or needs(graph) <= needs(after):
        return
    # What other values steer elsewhere (no box found, no expert chosen) is no fault: an unchanged copy tells.
    again = own_copy(model)
    found = []
    for each in (model, again):
        with in_mode(each, mode):
            found.append(needs(_on_few(each, given)))
    if missing := found[0] - found[1]:
        lost = min(missing) or "its inputs"
        raise _refusal(model, target, f"its outputs do not depend on {lost}, but on what it remembers")
