"""What the tracer returns: a forward pass as a graph of calls, and the residual joins in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

REARRANGING = frozenset(
    [
        "chunk",
        "clone",
        "contiguous",
        "detach",
        "double",
        "dropout",
        "flatten",
        "flip",
        "float",
        "getitem",
        "half",
        "movedim",
        "narrow",
        "permute",
        "pixel_shuffle",
        "reshape",
        "roll",
        "select",
        "split",
        "squeeze",
        "swapaxes",
        "to",
        "transpose",
        "type",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    ]
)
"""Functions whose values are those that they were given, or some of them."""


@dataclass(frozen=True, slots=True)
class Node:
    """One call: a model input, an atomic module, or a function that ran between them."""

    index: int
    kind: str
    """`"input"`, `"module"` or `"function"`."""
    name: str
    """Module path, or the function's name without underscores and in-place marks (`"add"` for `+=`)."""
    path: str
    """Path of the module, or of the module that ran the function; `""` for the root."""
    inputs: tuple[int, ...]
    """Nodes whose outputs it read, in argument order."""
    params: tuple[str, ...]
    """Parameters it read, by name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: nn.Module | None = field(default=None, repr=False)
    constants: tuple[float, ...] = ()
    """Numbers among the arguments, such as the 0.2 in `0.2 * x`; one-element factors of a rescaling too."""
    rescales: bool = False
    """Only multiplies its one traced input by a number a sample: SkipInit, α, a stochastic-depth mask."""
    call: int = 0
    """How many calls of the same module came before."""
    inplace: bool = False
    """Wrote its output over its first input."""
    arguments: int = 1
    """How many arguments a module's call was given."""
    norm: bool = False
    """Whether it is a call of a norm layer: of BatchNorm, or of what the tracer was told to take for one."""


@dataclass(frozen=True, slots=True)
class Join:
    """A residual join: a same-shape add of two traced tensors that share a traced ancestor."""

    node: int
    split: int
    """The nearest common ancestor: where the branch leaves the stream."""
    shortcut: int
    branch: int
    """The operand with more parametric calls since the split; norm layers count without parameters, too."""
    branch_end: int
    """The branch's last node before scalings (SkipInit, α), stochastic depth and dropout."""
    branch_nodes: tuple[int, ...]
    """Parametric nodes on the branch, in execution order."""
    shortcut_nodes: tuple[int, ...]
    """Parametric nodes on the shortcut; empty for an identity."""


class Graph:
    """The calls of one forward pass in execution order, and the residual joins among them."""

    def __init__(self, nodes: list[Node], outputs: tuple[int, ...], read: frozenset[str] = frozenset()):
        self.nodes = tuple(nodes)
        self.outputs = outputs
        self.read = read
        """Parameters and buffers of norm layers that something else than the layer itself read, by name."""

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def _consumers(self) -> list[tuple[int, ...]]:
        found: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in dict.fromkeys(node.inputs):
                found[source].append(node.index)
        return [tuple(consumers) for consumers in found]

    @cached_property
    def _masks(self) -> list[int]:
        """For each node the set of it and its ancestors, as bits of an integer."""
        masks: list[int] = []
        for node in self.nodes:
            mask = 1 << node.index
            for source in node.inputs:
                mask |= masks[source]
            masks.append(mask)
        return masks

    @cached_property
    def _calls(self) -> dict[str, tuple[Node, ...]]:
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            if node.kind == "module":
                found.setdefault(node.path, []).append(node)
        return {path: tuple(calls) for path, calls in found.items()}

    def consumers(self, index: int) -> tuple[int, ...]:
        """Nodes that read this node's output."""
        return self._consumers[index]

    @cached_property
    def _readers(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for node in self.nodes:
            for name in node.params:
                found.setdefault(name, []).append(node.index)
        return found

    def other_readers(self, node: Node) -> list[Node]:
        """What reads a module's parameters beside it: functions, and modules that share one.

        Modules around it are none: where the tracer cannot see what made their output, all parameters below are theirs.
        """
        found = [self.nodes[i] for i in sorted({i for name in node.params for i in self._readers[name]})]
        return [
            other
            for other in found
            if other.kind == "function" or not f"{node.path}.".startswith(other.path and f"{other.path}.")
        ]

    def calls(self, path: str) -> tuple[Node, ...]:
        """Every call of the module at `path`, in execution order."""
        return self._calls.get(path, ())

    def ancestors(self, index: int) -> set[int]:
        """All nodes that this one's output depends on."""
        return set(_bits(self._masks[index] & ~(1 << index)))

    def depends(self, index: int, ancestor: int) -> bool:
        """Whether `index` is `ancestor` or depends on it."""
        return bool(self._masks[index] >> ancestor & 1)

    def followed(self, index: int, by: Iterable[int]) -> bool:
        """Whether any of the nodes in `by` depends on `index`, itself aside."""
        return any(other > index and self.depends(other, index) for other in by)

    @cached_property
    def joins(self) -> tuple[Join, ...]:
        """Residual joins in execution order."""
        found = []
        for node in self.nodes:
            join = self._join(node) if node.name == "add" and len(node.inputs) == 2 else None
            if join is not None:
                found.append(join)
        return tuple(found)

    def _join(self, node: Node) -> Join | None:
        first, second = node.inputs
        if first == second or any(self.nodes[i].shape != node.shape for i in node.inputs):
            return None
        common = self._masks[first] & self._masks[second]
        if not common:
            return None
        split = common.bit_length() - 1
        since = {i: self._parametric(i, split) for i in (first, second)}
        # On a tie the operand that is itself a sum is the stream: x + f(x) + g(x).
        weight = {i: (len(since[i]), self.nodes[i].name != "add") for i in (first, second)}
        if weight[first] == weight[second]:
            return None
        shortcut, branch = sorted((first, second), key=lambda i: weight[i])
        end = branch
        while self._passes(self.nodes[end]) and end != split:
            end = self.nodes[end].inputs[0]
        return Join(node.index, split, shortcut, branch, end, since[branch], since[shortcut])

    def _parametric(self, index: int, split: int) -> tuple[int, ...]:
        """Parametric nodes on the paths from `split` to `index`."""
        between = _bits(self._masks[index] & ~self._masks[split])
        return tuple(i for i in between if _is_layer(self.nodes[i]) and self.depends(i, split))

    @staticmethod
    def _passes(node: Node) -> bool:
        dropout = (
            isinstance(node.module, nn.Identity | nn.modules.dropout._DropoutNd) or "dropout" in node.name
        )
        return bool(node.inputs) and (node.rescales or dropout)


def _is_layer(node: Node) -> bool:
    """Whether a node has parameters, or is a norm layer without them (`affine=False`, frozen)."""
    module = node.module
    return bool(node.params) or isinstance(module, _NORMS) or hasattr(module, "running_var")


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
