"""One recorded training-mode forward and backward pass: signals, gradients, and what sample 0 saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nfnets.trace import Graph, Node, is_batch_norm_like, recording, silenced

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the first sample of a batch got out of a pass."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    """Of the loss in the sample's inputs; the loss is a sum over samples, so these show dependence both ways."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One pass."""

    graph: Graph
    powers: dict[int, float]
    """Mean square of a node's output, by index."""
    sample: Sample
    gradients: dict[str, float]
    """Norm of the gradient of every parameter that got one."""
    finite: bool
    """Whether every output and every gradient is."""


def measure(model: nn.Module, inputs: tuple[Any, ...]) -> Measured:
    """Run forward and backward once in training mode, dropout and stochastic depth off.

    Args:
        model: its batch norm buffers move on as in any training step; no gradient stays.
        inputs: what its forward takes.

    Returns:
        Signals, gradients and sample 0.
    """
    powers: dict[int, float] = {}
    pending: dict[int, Tensor] = {}

    def visit(node: Node, output: Tensor) -> None:
        if output.is_floating_point() and output.numel():
            norm = torch.linalg.vector_norm(output.detach(), dtype=torch.float32)
            pending[node.index] = norm / math.sqrt(output.numel())

    leaves, given = _watched(inputs)
    norms: dict[str, Tensor] = {}
    handles = [
        p.register_post_accumulate_grad_hook(_taking(name, norms))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    try:
        model.train()
        with torch.enable_grad(), silenced(model):
            with recording(model, visit) as recorder:
                for tensor in _tensors(given):
                    recorder.record("input", "input", (), (), tensor, path="")
                torch.manual_seed(1)
                output = model(*given)
                graph = Graph(recorder.nodes, tuple(dict.fromkeys(recorder.sources(output))))
            outputs = _floats(output)
            _loss(outputs).backward()
    finally:
        for handle in handles:
            handle.remove()
    powers = {index: float(rms) ** 2 for index, rms in pending.items()}
    gradients = {name: float(norm) for name, norm in norms.items()}
    sample = _sample_zero(outputs, leaves)
    numbers = [*gradients.values(), *(float(t.detach().abs().sum()) for t in outputs)]
    return Measured(graph, powers, sample, gradients, all(map(math.isfinite, numbers)))


def sample_of(model: Callable[..., Any], inputs: tuple[Any, ...], buffers_of: nn.Module) -> Sample:
    """Outputs and input gradients of sample 0, as `measure` finds them, and nothing else.

    Args:
        model: what is called.
        inputs: what it takes.
        buffers_of: the module whose parameters must not collect gradients and whose noise is silenced.
    """
    leaves, given = _watched(inputs)
    trained = [p for p in buffers_of.parameters() if p.requires_grad]
    try:
        buffers_of.train()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), silenced(buffers_of):
            torch.manual_seed(1)
            outputs = _floats(model(*given))
            if (loss := _loss(outputs)).requires_grad:  # not where all inputs are indices
                loss.backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return _sample_zero(outputs, leaves)


def other_neighbors(inputs: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """The same first sample beside different ones, `batch` in all."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor[:batch].clone()
        others = tensor[1:batch].flip(-1)
        changed[1:] = 1.7 * others + 0.5 if tensor.is_floating_point() else others
        return changed

    return tree_map_only(Tensor, change, inputs)


def deviation(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest relative difference in the 2-norm between two lists of tensors; infinite where shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        norm, difference = float(x.double().norm()), float((x.double() - y.double()).norm())
        relative = difference / norm if norm else difference
        worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def joins_of(graph: Graph) -> dict[str, int]:
    """The residual joins of a graph by the path that adds, numbered within it."""
    joins = {join.node for join in graph.joins}
    return {name: index for name, index in sums_of(graph).items() if index in joins}


def sums_of(graph: Graph) -> dict[str, int]:
    """Every sum of two traced tensors by the path that adds, numbered within it: `layer1.0#0`."""
    counts: dict[str, int] = {}
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.name == "add" and node.kind == "function" and len(node.inputs) == 2:
            count = counts[node.path] = counts.get(node.path, -1) + 1
            found[f"{node.path}#{count}"] = node.index
    return found


def inside_branch(graph: Graph, index: int) -> bool:
    """Whether a node lies on a residual branch."""
    return any(
        join.split < index < join.node
        and graph.depends(join.branch, index)
        and graph.depends(index, join.split)
        for join in graph.joins
    )


def heads_of(graph: Graph) -> dict[str, int]:
    """The last weight or norm layers before the outputs, by path."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    waiting = list(graph.outputs)
    while waiting:
        index = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        node = graph.nodes[index]
        if node.module is not None and (
            isinstance(node.module, _WEIGHTED) or is_batch_norm_like(node.module)
        ):
            found[node.path] = max(index, found.get(node.path, 0))  # of several calls the last
        elif not (node.name == "add" and len(node.inputs) == 2):
            waiting += node.inputs
    return found


def last_at(graph: Graph, path: str) -> int | None:
    """The last node at a path or below it."""
    inside = [n.index for n in graph.nodes if n.path == path or n.path.startswith(path + ".")]
    return inside[-1] if inside else None


def reaching(graph: Graph) -> set[str]:
    """Parameters that some output depends on."""
    useful: set[int] = set()
    for output in graph.outputs:
        useful |= {output, *graph.ancestors(output)}
    return {name for index in useful for name in graph.nodes[index].params}


def _watched(inputs: tuple[Any, ...]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Leaves that collect gradients, and copies to be given to the model, which may write to its inputs."""
    leaves: list[Tensor] = []

    def watch(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaf = tensor.detach().clone().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()

    return leaves, tree_map_only(Tensor, watch, inputs)


def _taking(name: str, norms: dict[str, Tensor]) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        norms[name] = torch.linalg.vector_norm(parameter.grad)
        parameter.grad = None  # never all gradients at once

    return take


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _floats(output: Any) -> list[Tensor]:
    return [t for t in _tensors(output) if t.is_floating_point() and t.numel()]


def _loss(outputs: list[Tensor]) -> Tensor:
    """Every output weighted by the same numbers for every sample; losses as they are."""
    total = torch.zeros(())
    generator = torch.Generator().manual_seed(2)
    for out in outputs:
        if not out.requires_grad:
            continue
        if out.ndim:
            weights = torch.randn(out.shape[1:], generator=generator).to(out.dtype)
            out = (out * weights).flatten(1).mean(1).sum() if out.ndim > 1 else out.sum()
        total = total + out
    return total


def _sample_zero(outputs: list[Tensor], leaves: list[Tensor]) -> Sample:
    first = [t.detach()[0].clone() for t in outputs if t.ndim]
    return Sample(first, [t.grad[0].clone() for t in leaves if t.grad is not None and t.ndim > 1])
