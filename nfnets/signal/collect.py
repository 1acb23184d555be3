"""One measured pass: statistics when each node runs, rows when the pass is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.predict import Moments as Predicted
from nfnets.predict import predict
from nfnets.signal.moments import SUMMARY, summarize
from nfnets.signal.points import Place, channel_dim, measurable, places, residual_end
from nfnets.signal.report import Point
from nfnets.trace import Graph, Node

Theory = Mapping[int, Predicted]
_FP16_MAX = torch.finfo(torch.float16).max
_BF16_MAX = torch.finfo(torch.bfloat16).max


class Pass:
    """The statistics of one forward (and backward) pass, on the device until `rows` fetches them.

    Args:
        backward: also hook the gradients of every measured output.
        features: how many features of a sample its similarity to others is estimated from; all when omitted.
        only: indices of the nodes to measure, where an earlier pass has shown which become points.
    """

    def __init__(
        self, backward: bool = False, only: Collection[int] | None = None, features: int | None = None
    ):
        self.features = features
        self.backward = backward
        self.only = only
        self.vectors: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self.gradients: dict[int, Tensor] = {}
        self.channels: dict[int, tuple[int, int]] = {}
        self.shapes: dict[int, tuple[tuple[int, ...], str]] = {}

    def visit(self, node: Node, output: Tensor) -> None:
        """Measures one output right after it was made; the tracer calls it."""
        made = bool(node.inputs) or node.kind != "function"  # else an expanded parameter: it says nothing
        if output.dim() and made:
            dim = channel_dim(node, tuple(output.shape), self.channels)
            self.channels[node.index] = (dim, output.shape[dim])
        if (
            not made
            or (self.only is not None and node.index not in self.only)
            or not measurable(node, output)
        ):
            return
        index, dim = node.index, self.channels[node.index][0]
        self.vectors[index] = _measure(output, dim, features=self.features)
        self.counts[index] = output.numel() // output.shape[dim]
        self.shapes[index] = (tuple(output.shape), str(output.dtype).removeprefix("torch."))
        if self.backward and output.requires_grad:
            output.register_hook(self._gradient_hook(index, dim))

    def _gradient_hook(self, index: int, dim: int) -> Callable[[Tensor], None]:
        # A tensor hook, not a module hook: module backward hooks fail behind in-place activations.
        def hook(gradient: Tensor) -> None:
            self.gradients[index] = _measure(gradient, dim, similar=False)

        return hook


def _measure(x: Tensor, dim: int, similar: bool = True, features: int | None = None) -> Tensor:
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return summarize(x, dim, similar, features)[0]


def fetch(vectors: Mapping[int, Tensor]) -> dict[int, dict[str, float]]:
    """All vectors by one transfer."""
    if not vectors:
        return {}
    device = next(iter(vectors.values())).device
    table = torch.stack([v.to(device, non_blocking=True) for v in vectors.values()]).tolist()
    return {index: dict(zip(SUMMARY, row, strict=True)) for index, row in zip(vectors, table, strict=True)}


def theory(measured: Pass, graph: Graph) -> dict[int, Predicted]:
    """What theory expects of every node, given the moments that the input really has."""
    first = fetch(
        {
            n.index: measured.vectors[n.index]
            for n in graph.nodes
            if n.kind == "input" and n.index in measured.vectors
        }
    )
    if not first:
        return predict(graph)
    stats = next(iter(first.values()))
    given = Predicted(stats["total_mean"], stats["mean_sq"], stats["var"])
    return predict(graph, given) if all(map(math.isfinite, given)) else {}


def weights(graph: Graph, found: Sequence[Place]) -> dict[int, nn.Parameter]:
    """The weight of every point that is a module with one."""
    out: dict[int, nn.Parameter] = {}
    for place in found:
        weight = getattr(graph.nodes[place.node].module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.is_floating_point():
            out[place.node] = weight
    return out


def norms(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """L2 norms in fp32, on the device."""
    with torch.no_grad():
        return {i: torch.linalg.vector_norm(t.detach(), dtype=_wide(t)) for i, t in tensors.items()}


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scalars(values: Mapping[int, Tensor]) -> dict[int, float]:
    """0-dim tensors as floats, by one transfer."""
    if not values:
        return {}
    device = next(iter(values.values())).device
    listed = torch.stack([v.to(device).double() for v in values.values()]).tolist()
    return dict(zip(values, listed, strict=True))


def branch_alphas(graph: Graph) -> dict[int, float]:
    """Branch ends whose layer holds the branch multiplier α folded into its weight."""
    found: dict[int, Tensor] = {}
    for join in graph.joins:
        alpha = getattr(graph.nodes[join.branch_end].module, "alpha", None)
        if isinstance(alpha, Tensor) and alpha.numel() == 1:
            found[join.branch_end] = alpha.detach().reshape(())
    return scalars(found)


def rows(
    measured: Pass,
    graph: Graph,
    model: str,
    step: int = 0,
    theory: Theory | None = None,
    found: Sequence[Place] | None = None,
    weight_norms: Mapping[int, float] | None = None,
    weight_gradients: Mapping[int, float] | None = None,
    updates: Mapping[int, float] | None = None,
) -> list[Point]:
    """The report's rows of one pass.

    Args:
        measured: the pass.
        graph: the graph that was recorded with it.
        model: the model's name.
        step: the sampled step.
        theory: predicted moments by node.
        found: the points; all of `places` when omitted.
        weight_norms: by node.
        weight_gradients: by node.
        updates: ‖ΔW‖ / ‖W‖ by node.

    Returns:
        One `Point` per place, in execution order.
    """
    found = places(graph, measured.vectors) if found is None else found
    stats = fetch({p.node: measured.vectors[p.node] for p in found if p.node in measured.vectors})
    ends = {residual_end(graph, j) for j in graph.joins} - stats.keys()
    stats |= fetch({i: measured.vectors[i] for i in ends if i in measured.vectors})
    gradients = fetch({p.node: measured.gradients[p.node] for p in found if p.node in measured.gradients})
    residual, expected = _residuals(graph, stats, theory or {})
    out = []
    for p in found:
        if p.node not in stats:
            continue
        shape, dtype = measured.shapes[p.node]
        predicted = (theory or {}).get(p.node)
        out.append(
            Point(
                model=model,
                name=p.name,
                kind=p.kind,
                role=p.role,
                feeds=p.feeds,
                depth=p.depth,
                block=p.block,
                call=p.call,
                step=step,
                shape=shape,
                dtype=dtype,
                count=measured.counts[p.node],
                residual_var=residual.get(p.node),
                predicted_mean_sq=predicted.mean_sq if predicted else None,
                predicted_var=predicted.var if predicted else None,
                predicted_residual_var=expected.get(p.node),
                weight_norm=(weight_norms or {}).get(p.node),
                weight_grad_norm=(weight_gradients or {}).get(p.node),
                update_ratio=(updates or {}).get(p.node),
                **_forward(stats[p.node]),
                **_backward(gradients.get(p.node)),
            )
        )
    return out


def _residuals(
    graph: Graph, stats: Mapping[int, Mapping[str, float]], theory: Theory
) -> tuple[dict[int, float], dict[int, float]]:
    """Per join, measured and expected variance at the branch end, before SkipInit and α."""
    alphas = branch_alphas(graph)
    measured: dict[int, float] = {}
    expected: dict[int, float] = {}
    for join in graph.joins:
        scale = alphas.get(join.branch_end, 1.0) ** 2
        if scale == 0:
            continue  # a branch multiplied by zero inside its last layer leaves nothing to divide by
        end = residual_end(graph, join)
        if end in stats:
            measured[join.node] = stats[end]["var"] / scale
        if end in theory:
            expected[join.node] = theory[end].var / scale
    return measured, expected


def _forward(s: Mapping[str, float]) -> dict[str, Any]:
    low, high = s["min"], s["max"]
    nonfinite = not (math.isfinite(low) and math.isfinite(high))
    largest = math.nan if nonfinite else max(abs(low), abs(high))

    def defined(name: str) -> float | None:
        # NaN in a finite tensor: undefined there (a batch of one, an all-zero sample), not a sick signal.
        return s[name] if nonfinite or math.isfinite(s[name]) else None

    return {
        "mean_sq": s["mean_sq"],
        "var": s["var"],
        "total_mean": s["total_mean"],
        "total_var": s["total_var"],
        "dead": defined("dead"),
        "min": low,
        "max": high,
        "nonfinite": nonfinite,
        "headroom_fp16": math.log2(_FP16_MAX / largest) if largest > 0 else None,
        "headroom_bf16": math.log2(_BF16_MAX / largest) if largest > 0 else None,
        "cosine": defined("cosine"),
        "rank": defined("rank"),
    }


def _backward(s: Mapping[str, float] | None) -> dict[str, Any]:
    if s is None:
        return {}
    return {
        "grad_mean_sq": s["mean_sq"],
        "grad_var": s["var"],
        "grad_norm": s["norm"],
        "grad_min": s["min"],
        "grad_max": s["max"],
    }
