"""Gradient checkpointing of any model: blocks run again in the backward pass instead of keeping activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from nfnets.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def recompute_(model: nn.Module) -> list[str]:
    """Make a model keep only its blocks' inputs in training, and run each block again for its gradients.

    Blocks are the composite children (residual blocks, dense layers, …) of `Sequential`, `ModuleList` and
    `ModuleDict`, stages aside; a `Sequential` of plain layers is cut into √n segments; a model with neither has its
    own composite children taken. The same numbers come out: random draws are repeated, and the second run does
    not update BatchNorm's statistics again. (timm's `set_grad_checkpointing` lets it.)

    Args:
        model: changed in place: the blocks' classes, not their parameters, their names or what they compute.

    Returns:
        The blocks' paths.

    Raises:
        UserError: for a model with nothing to recompute.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
        >>> recompute_(net)
        ['0', '1', '2']

    Paper: arXiv 1604.06174.
    """
    found = list(_blocks(model, ""))
    if not found:
        found = [(name, child) for name, child in model.named_children() if _composite(child)]
    if not found:
        raise UserError(
            f"grad_checkpointing: {type(model).__name__} has no blocks to recompute; expected a Sequential or "
            "children with layers of their own; set grad_checkpointing=false"
        )
    for module in {id(module): module for _, module in found}.values():
        kind = _Segments if isinstance(module, nn.Sequential) and not _composite_children(module) else _Block
        # A class of its own, not a wrapper: names, parameters and isinstance stay, and copies are recomputed, too.
        module.__class__ = type(type(module).__name__, (kind, type(module)), {})  # pyright: ignore[reportAttributeAccessIssue]
    return [path for path, _ in found]


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The blocks, in the order of registration."""
    for name, child in module.named_children():
        here = f"{path}.{name}".lstrip(".")
        if isinstance(module, _CONTAINERS) and _composite(child) and not _holds_blocks(child):
            yield here, child
        elif _composite(child):
            yield from _blocks(child, here)
    # Plain layers one after the other, as in VGG.
    if type(module) is nn.Sequential and not _composite_children(module) and _layers(module) >= 4:
        yield path, module


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is a stage: somewhere in it stand two blocks side by side that are more than lists of layers."""

    def is_block(child: nn.Module) -> bool:
        return _composite(child) and not isinstance(child, _CONTAINERS)

    inside = (inner for inner in module.modules() if isinstance(inner, _CONTAINERS))
    return any(sum(map(is_block, container.children())) > 1 for container in inside)


def _composite_children(module: nn.Module) -> int:
    return sum(map(_composite, module.children()))


def _composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _layers(module: nn.Module) -> int:
    return sum(next(child.parameters(), None) is not None for child in module.children())


class _Block(nn.Module):
    """Mixed into a block's class: its forward pass is recomputed in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return _recomputed(self, 0, [self], super().forward, *args, **kwargs)


class _Segments(nn.Sequential):
    """Mixed into a plain `Sequential`: √n segments of its layers are recomputed one by one."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        layers = list(self)
        size = round(len(layers) ** 0.5)
        for start in range(0, len(layers), size):
            segment = layers[start : start + size]
            input = _recomputed(self, start, segment, lambda x, run=segment: reduce(_call, run, x), input)
        return input


def _call(value: Tensor, layer: nn.Module) -> Tensor:
    return layer(value)


def _recomputed(
    owner: nn.Module, at: int, modules: list[nn.Module], forward: Any, *args: Any, **kwargs: Any
) -> Any:
    """`forward(*args, **kwargs)`, computed a second time in the backward pass.

    A forward pass that overwrites its inputs (a ReLU in place comes first) is run on the inputs themselves, so that
    whoever reads them next sees what the plain model shows, and is repeated from copies. That it does not is known
    after the first time, and no copies are made then.
    """
    known: dict[int, bool] = owner.__dict__.setdefault("_overwrites", {})
    copies = known.get(at, True)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    versions = [tensor._version for tensor in tensors]
    again = False

    def run(given: Any, named: Any) -> Any:
        nonlocal again, args, kwargs
        if not again:
            output = forward(*args, **kwargs)
            again, args, kwargs = True, (), {}  # or they would be kept beside their copies
            known[at] = [tensor._version for tensor in tensors] != versions
            return output
        given, named = tree_map_only(Tensor, Tensor.clone, (given, named)) if copies else (given, named)
        return forward(*given, **named)

    # Lists are copied in any case: a dense block goes on appending to the one that it gives its layers.
    kept = tree_map_only(Tensor, Tensor.clone if copies else lambda tensor: tensor, (args, kwargs))
    return checkpoint(
        run, *kept, use_reentrant=False, context_fn=lambda: (nullcontext(), _other_buffers(modules))
    )


@contextmanager
def _other_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, the modules' buffers are copies, so that statistics are not updated a second time."""
    inside = [inner for module in modules for inner in module.modules()]
    owned = [(m, name, b) for m in inside for name, b in m._buffers.items() if b is not None]
    for owner, name, buffer in owned:
        owner._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for owner, name, buffer in owned:
            owner._buffers[name] = buffer
