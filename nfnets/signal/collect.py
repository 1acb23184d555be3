"""One measured pass: statistics when each node runs, rows when the pass is over."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.predict import INPUT, Predicted, pools, predict
from nfnets.signal.attention import Look, look, values_of
from nfnets.signal.borrowed import Beside
from nfnets.signal.derive import NOTHING, Derived, derivable, derived
from nfnets.signal.facts import Facts
from nfnets.signal.moments import Lent, alike, gram
from nfnets.signal.points import Place, channel_dim, kind, measurable, residual_end
from nfnets.signal.rows import RawPoint
from nfnets.signal.summary import Parts, Raw, fetch, finish, measure, parts
from nfnets.trace import Graph, Node, recording

Theory = Mapping[int, Predicted]
Weights = Mapping[int, Sequence[nn.Parameter]]


class Pass:
    """The statistics of one forward (and backward) pass, on the device until `gather` fetches them.

    What follows from other statistics is left until `settle`, which the caller calls when the forward pass is over.

    Args:
        backward: also hook the gradients of every measured output.
        only: indices of the nodes to measure, where an earlier pass has shown which become points.
        compared: indices of the nodes whose samples are compared with each other; all when omitted.
        features: how many features of a sample its similarity to others is estimated from; all when omitted.
    """

    def __init__(
        self,
        backward: bool = False,
        only: Collection[int] | None = None,
        compared: Collection[int] | None = None,
        features: int | None = None,
    ):
        self.backward = backward
        self.only = only
        self.compared = compared
        self.features = features
        self.outputs: dict[int, Raw] = {}
        self.gradients: dict[int, Raw] = {}
        self.attention: dict[int, Look] = {}
        self._beside = Beside()
        self.channels: dict[int, tuple[int, int, int]] = {}
        self.shapes: dict[int, tuple[tuple[int, ...], str]] = {}
        self._nodes: list[Node] = []
        self._pending: dict[int, tuple[Node, Parts]] = {}
        self._grams: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def recording(self, model: nn.Module) -> Iterator[Any]:
        """As `nfnets.trace.recording`: passes that run inside are measured."""
        with recording(model, self.visit, entered=self._beside.entered) as recorder, self._beside:
            yield recorder

    def visit(self, node: Node, output: Tensor) -> None:
        """Measures one output right after it was made; the tracer calls it."""
        self._beside.release()
        made = bool(node.inputs) or node.kind != "function"  # else an expanded parameter: it says nothing
        index, shape = node.index, node.shape
        if shape and made:
            dim = channel_dim(node, shape, self.channels)
            self.channels[index] = (dim, shape[dim], math.prod(shape[:dim]))
        self._nodes.append(node)
        if (seen := look(self._nodes, output, self._beside.fused)) is not None:
            self.attention[index] = seen
        if not made or (self.only is not None and index not in self.only) or not measurable(node, output):
            return
        dim, similar = self.channels[index][0], self.compared is None or index in self.compared
        self.shapes[index] = (shape, str(output.dtype).removeprefix("torch."))
        known = self._derivable(node, output)
        if self.backward and output.requires_grad:
            output.register_hook(self._gradient_hook(index, dim))
        read = partial(self._read, node, output, dim, known, similar)
        if known.moments:
            read(None)
        else:
            self._beside.hold(output, dim, read)

    def _read(
        self, node: Node, output: Tensor, dim: int, known: Derived, similar: bool, lent: Lent | None
    ) -> None:
        index, wanted = node.index, not known.moments and lent is None
        # Of a layer channel by channel: what a BatchNorm makes of them follows.
        channelwise = node.module is not None and bool(node.params)
        how = (dim, False, None, wanted, not known.extremes, channelwise)
        found, extremes, _ = _full_precision(parts, output, *how)
        moments = found if lent is None else lent
        if moments is not None and extremes is not None:
            self.outputs[index] = Raw(moments, *extremes)
        else:
            self._pending[index] = node, (moments, extremes, ())
        if similar:
            self._grams[index] = _full_precision(gram, output, self.features)

    def _derivable(self, node: Node, output: Tensor) -> Derived:
        if len(node.inputs) != 1:
            return NOTHING
        before, index = node.inputs[0], node.index
        measured = before in self.outputs or before in self._pending
        if not measured or self.channels[before] != self.channels[index]:
            return NOTHING
        if self.shapes[before][1] != self.shapes[index][1]:  # rounded in between
            return NOTHING
        channelwise = before in self.outputs and self.outputs[before].low.dim() > 0
        return derivable(node, output, self.channels[index][1], channelwise)

    def settle(self) -> None:
        """Derives what was not measured; parameters must still be those of the forward pass."""
        self._beside.release()
        for index, raw in self.outputs.items():
            if isinstance(raw.moments, Lent):
                self.outputs[index] = raw._replace(moments=raw.moments.settled())
        self.outputs |= derived(self._pending, self.outputs)
        self._pending.clear()
        # Together: of each alone, a dozen operations on 16 numbers squared would cost more than its product.
        for grams in _of_one_kind(self._grams):
            cosines, ranks = alike(torch.stack(list(grams.values()))).unbind()
            for index, cosine, rank in zip(grams, cosines, ranks, strict=True):
                self.outputs[index] = self.outputs[index]._replace(cosine=cosine, rank=rank)
        self._grams.clear()

    def _gradient_hook(self, index: int, dim: int) -> Callable[[Tensor], None]:
        # A tensor hook, not a module hook: module backward hooks fail behind in-place activations.
        def hook(gradient: Tensor) -> None:
            self.gradients[index] = _full_precision(measure, gradient, dim, False)

        return hook


def _of_one_kind(tensors: Mapping[int, Tensor]) -> list[dict[int, Tensor]]:
    """Those that can be stacked."""
    kinds: dict[tuple[Any, ...], dict[int, Tensor]] = {}
    for index, tensor in tensors.items():
        kinds.setdefault((tensor.shape, tensor.dtype, tensor.device), {})[index] = tensor
    return list(kinds.values())


def _full_precision(measuring: Callable[..., Any], x: Tensor, *how: Any) -> Any:
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return measuring(x, *how)
    return measuring(x, *how)


def theory(
    measured: Pass, graph: Graph, weight: Weights | None = None, norms: Mapping[int, Tensor] | None = None
) -> dict[int, Predicted]:
    """What theory expects of every node, given the moments that the input really has and what pooling really leaves.

    How much variance an average or a maximum over positions leaves, and how far a maximum moves the mean, depends on
    the correlation between positions, of which theory knows nothing: both factors are taken from the measurement. So
    is what attention leaves of its values, and all behind a normalization that is written out. `norms` are those of
    the parameters in `weight`, by node.
    """
    first = next((n.index for n in graph.nodes if n.kind == "input" and n.index in measured.outputs), None)
    sources = {n.index: n.inputs[0] if pools(n) else _values(graph, n) for n in graph.nodes}
    pooled = {i: s for i, s in sources.items() if s is not None and measured.outputs.keys() >= {i, s}}
    normalized = {n.index for n in graph.nodes if n.index in measured.outputs and _divided(graph, n)}
    wanted = {*pooled.keys(), *pooled.values(), *normalized} | ({first} if first is not None else set())
    stats = fetch({i: measured.outputs[i] for i in wanted})[0]
    known = dict(zip(stats, finish(list(stats.values())), strict=True))
    expected: dict[int, Predicted] = {}

    def correct(node: Node, moments: Predicted) -> Predicted:
        source = pooled.get(node.index)
        if node.index in normalized:
            moments = _seen(known[node.index])
        elif source is not None:
            moments = _pooled(expected[source], known[source], known[node.index]) or moments
        expected[node.index] = moments
        return moments

    given = INPUT
    if first is not None:
        given = _seen(known[first])
    known_norms = {i: norm for i, norm in (norms or {}).items() if len((weight or {})[i]) == 1}
    return predict(graph, given, correct, known_norms) if all(map(math.isfinite, given)) else {}


def _seen(stats: Mapping[str, float]) -> Predicted:
    return Predicted(stats["total_mean"], stats["mean_sq"], stats["var"])


def _divided(graph: Graph, node: Node) -> bool:
    """Whether a node is a signal divided by its own size, as norm layers do that are no module of torch's."""
    if node.name not in ("div", "mul") or len(node.inputs) != 2:
        return False
    ways, seen = [node.inputs[1]], set[int]()
    while ways:
        by = graph.nodes[ways.pop()]
        if by.index in seen or by.kind != "function" or math.prod(by.shape) >= math.prod(node.shape):
            continue  # a layer, or the signal itself: a size has fewer values
        if by.name in _SIZES and by.inputs:
            return True
        seen.add(by.index)
        ways += by.inputs
    return False


_SIZES = {"rsqrt", "sqrt", "std", "norm", "vector_norm", "linalg_norm"}


def _values(graph: Graph, node: Node) -> int | None:
    """Where the values of attention were computed: cut from one layer's output with queries and keys, as a rule."""
    index = values_of(graph, node)
    return None if index is None else _computed(graph, index)


def _computed(graph: Graph, index: int) -> int:
    """Back over what only moves values."""
    while kind(graph.nodes[index]) == "" and graph.nodes[index].inputs:
        index = graph.nodes[index].inputs[0]
    return index


def _pooled(x: Predicted, before: Mapping[str, float], after: Mapping[str, float]) -> Predicted | None:
    """Expected moments after a pool: what the measured ones would have become from the expected `x`."""
    kept = after["var"] / before["var"] if before["var"] > 0 else math.nan
    if not math.isfinite(kept):
        return None
    shift = (after["total_mean"] - before["total_mean"]) / math.sqrt(before["var"])
    mean = x.mean + shift * math.sqrt(x.var)
    return Predicted(mean, x.mean_sq - x.mean**2 + mean**2, x.var * kept)


Held = Mapping[int, tuple[nn.Module, Sequence[str]]]


def holders(graph: Graph, found: Sequence[Place]) -> dict[int, tuple[nn.Module, list[str]]]:
    """Every point that is a module with a weight, and its name; recurrent layers and attention have several."""
    out: dict[int, tuple[nn.Module, list[str]]] = {}
    for place in found:
        module = graph.nodes[place.node].module
        named = module.named_parameters() if module is not None else ()
        names = [name for name, p in named if "weight" in name.rpartition(".")[2] and p.is_floating_point()]
        if module is not None and names:
            out[place.node] = module, names
    return out


def weights(held: Held) -> dict[int, list[nn.Parameter]]:
    """The parameters that stand there now, if they still do."""
    found = {node: [_held(module, name) for name in names] for node, (module, names) in held.items()}
    known = {node: [w for w in each if isinstance(w, nn.Parameter)] for node, each in found.items()}
    return {node: each for node, each in known.items() if each}


def _held(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return module


def norms(tensors: Mapping[int, Sequence[Tensor]]) -> dict[int, Tensor]:
    """L2 norms in fp32, on the device; of several tensors together."""

    def norm(parts: Sequence[Tensor]) -> Tensor:
        each = [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in parts]
        return each[0] if len(each) == 1 else torch.linalg.vector_norm(torch.stack(each))

    with torch.no_grad():
        return {i: norm(parts) for i, parts in tensors.items()}


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def branch_ends(graph: Graph) -> dict[int, tuple[int, Tensor | None]]:
    """Per join the node whose variance is the residual variance, and α where that node's layer holds it folded in."""
    out: dict[int, tuple[int, Tensor | None]] = {}
    for join in graph.joins:
        alpha = getattr(graph.nodes[join.branch_end].module, "alpha", None)
        alpha = alpha if isinstance(alpha, Tensor) and alpha.numel() == 1 else None
        out[join.node] = (_computed(graph, residual_end(graph, join)), alpha)
    return out


def gather(
    measured: Pass,
    found: Sequence[Place],
    ends: Mapping[int, tuple[int, Tensor | None]],
    theory: Theory | None = None,
    weight_norms: Mapping[int, Tensor] | None = None,
    weight_gradients: Mapping[int, Tensor] | None = None,
    updates: Mapping[int, Tensor] | None = None,
    clipped: Mapping[int, float] | None = None,
    layers: Mapping[int, Facts] | None = None,
) -> list[RawPoint]:
    """The rows of one pass, by one transfer.

    Args:
        measured: the pass.
        found: the points.
        ends: `branch_ends` of its graph.
        theory: predicted moments by node.
        weight_norms: by node, on the device.
        weight_gradients: norms by node, on the device.
        updates: ‖ΔW‖ by node, on the device.
        clipped: fraction of the weight's units that AGC clips, by node.
        layers: what is known of each layer, by node.

    Returns:
        One row per place that was measured, in execution order.
    """
    wanted = {p.node for p in found} | {end for end, _ in ends.values()}
    raws = {("out", i): raw for i, raw in measured.outputs.items() if i in wanted}
    raws |= {("gradient", i): raw for i, raw in measured.gradients.items() if i in wanted}
    named = {"norm": weight_norms, "weight": weight_gradients, "update": updates}
    scalars = {(name, i): value for name, values in named.items() for i, value in (values or {}).items()}
    scalars |= {("alpha", join): alpha for join, (_, alpha) in ends.items() if alpha is not None}
    ordered = sorted(p.node for p in found)
    for i, seen in measured.attention.items():  # a fused call is no point: what reads it is
        at = next((node for node in ordered if node >= i), None)
        if at is not None:
            scalars |= {(name, at): value for name, value in seen._asdict().items() if value is not None}
    for i, known in (layers or {}).items():
        tensors = (("gain", known.gain), ("apart", known.apart))
        scalars |= {(name, i): value for name, value in tensors if value is not None}
    stats, numbers = fetch(raws, scalars)
    out: list[RawPoint] = []
    for place in found:
        node = place.node
        if ("out", node) not in stats:
            continue
        more: dict[str, Any] = {}
        if node in ends:
            more = _residual(ends[node][0], numbers.get(("alpha", node), 1.0) ** 2, stats, theory or {})
        norm, update = numbers.get(("norm", node)), numbers.get(("update", node))
        out.append(
            RawPoint(
                place=place,
                shape=measured.shapes[node][0],
                dtype=measured.shapes[node][1],
                output=stats["out", node],
                gradient=stats.get(("gradient", node)),
                predicted=(theory or {}).get(node),
                weight_norm=norm,
                weight_grad_norm=numbers.get(("weight", node)),
                # Zero: the optimizer has not stepped yet (or never will on this layer).
                update_ratio=update / norm if update and norm else None,
                clipped=(clipped or {}).get(node),
                layer=_layer((layers or {}).get(node), node, numbers),
                **more,
            )
        )
    return out


def _layer(known: Facts | None, node: int, numbers: Mapping[Any, float]) -> dict[str, Any]:
    """The columns that tell of the layer itself."""
    columns: dict[str, Any] = {name: numbers.get((name, node)) for name in Look._fields}
    if known is None:
        return columns
    apart = numbers.get(("apart", node))
    return columns | {
        "weight_shape": known.shape,
        "groups": known.groups,
        "frozen": known.frozen,
        "gain": numbers.get(("gain", node)),
        # Zeros are no units at all: branches start so.
        "identical": None if apart is None else apart == 0 and bool(numbers.get(("norm", node))),
    }


def _residual(end: int, scale: float, stats: Mapping[Any, Any], theory: Theory) -> dict[str, Any]:
    """Measured and expected signal at the branch end; `scale` (α²) is what it has been multiplied by already."""
    if scale == 0:
        return {}  # a branch multiplied by zero inside its last layer leaves nothing to divide by
    expected = theory[end].var / scale if end in theory else None
    return {"residual": stats.get(("out", end)), "scale": scale, "predicted_residual_var": expected}
