"""A probe that samples the user's own forward (and backward) passes during training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nfnets.errors import UserError
from nfnets.signal.collect import Pass, Theory, norms, rows, scalars, theory, weights
from nfnets.signal.points import Place, places, residual_end, unwrapped
from nfnets.signal.report import Point, SignalReport
from nfnets.trace import Graph, recording

# A cosine from 8,192 features is good to about a percent, and costs a tenth of one from a whole feature map.
_FEATURES = 8192


class _Sample:
    """One sampled step: statistics on the device, rows only when a report is asked for."""

    def __init__(self, step: int, measured: Pass):
        self.step = step
        self.measured = measured
        self.graph: Graph | None = None
        self.found: list[Place] = []
        self.weight_norms: dict[int, Tensor] = {}
        self.before: dict[int, Tensor] = {}
        self.updates: dict[int, Tensor] = {}


class Probe:
    """Measures every `every`-th forward pass of a model that the user runs; see `probe`."""

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        backward: bool = False,
        updates: bool = False,
        name: str | None = None,
        include: Collection[str] = (),
        exclude: Collection[str] = (),
    ):
        if not isinstance(model, nn.Module):
            raise UserError(f"probe of a {type(model).__name__}: expected an nn.Module")
        if isinstance(model, nn.DataParallel):
            raise UserError(
                "DataParallel runs replicas in threads that no tracer sees: probe model.module instead"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UserError(
                f"every={every!r}: expected a whole number above 0; every=50 samples one step in fifty"
            )
        self.model, self.every, self.backward, self.updates = model, every, backward, updates
        self.include, self.exclude = include, exclude
        inner = unwrapped(model)
        self.prefix = next((f"{n}." for n, m in model.named_modules() if m is inner and n), "")
        self.prefix = self.prefix.replace("_orig_mod.", "")
        self.name = name or type(inner).__name__
        self.calls = 0
        self._points: list[Point] = []
        self._pending: _Sample | None = None
        self._theory: tuple[tuple[str, ...], Theory] | None = None
        self._wrapped: Callable[..., Any] | None = None
        self._shadowed: Any = None
        self._wanted: tuple[tuple[str, ...], set[int]] | None = None
        self._active = False
        self._running = False

    def __enter__(self) -> Self:
        if self._active:
            raise UserError("this probe is already open: expected one `with` at a time; make another probe")
        original = self.model.forward
        self._shadowed = self.model.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(original, args, kwargs)

        forward.probe = self  # type: ignore[attr-defined]
        # An attribute of this instance: forward hooks of the root would miss passes that start inside them, and
        # a compiled model calls `forward` where hooks added later do not fire.
        self._wrapped = forward
        self.model.__dict__["forward"] = forward
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        if self.model.__dict__.get("forward") is not self._wrapped:
            return  # a probe opened later wraps this one, and takes it away when it closes
        below = self._shadowed
        while isinstance(inner := getattr(below, "probe", None), Probe) and not inner._active:
            below = inner._shadowed
        if below is None:
            del self.model.__dict__["forward"]
        else:
            self.model.__dict__["forward"] = below

    def _call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._active or self._running:  # closed, or a model that calls itself
            return original(*args, **kwargs)
        step = self.calls
        self.calls += 1
        self._finish_updates()
        if step % self.every:
            return original(*args, **kwargs)
        if (
            self._pending is not None
        ):  # its backward pass is over by now: one transfer, and its tensors can go
            self._points += self._rows(self._pending)
            self._pending = None
        sample = _Sample(step, Pass(self.backward, self._wanted[1] if self._wanted else None, _FEATURES))
        self._running = True
        try:
            with recording(self.model, sample.measured.visit) as recorder:
                for leaf in tree_leaves((args, kwargs)):
                    if isinstance(leaf, Tensor):
                        recorder.record("input", "input", (), (), leaf, path="")
                output = original(*args, **kwargs)
                graph = Graph(recorder.nodes, tuple(dict.fromkeys(recorder.sources(output))))
        finally:
            self._running = False
        self._keep(sample, graph)
        return output

    def _keep(self, sample: _Sample, graph: Graph) -> None:
        """Decides what are points, once a graph: later passes measure only those."""
        sample.graph = graph
        signature = tuple(node.name for node in graph.nodes)
        if self._wanted is not None and self._wanted[0] != signature:
            # Other control flow than when the points were chosen: this pass may have missed some of its own.
            self._wanted = None
        sample.found = places(graph, sample.measured.vectors, self.include, self.exclude, self.prefix)
        kept = {p.node for p in sample.found} | {residual_end(graph, j) for j in graph.joins}
        if self._wanted is None and sample.measured.only is None:
            self._wanted = (signature, kept)
        for index in sample.measured.vectors.keys() - kept:
            del sample.measured.vectors[index], sample.measured.counts[index]
        weight = weights(graph, sample.found)
        sample.weight_norms = norms(weight)
        if self.updates and self.model.training:
            sample.before = {i: w.detach().clone() for i, w in weight.items()}
        if self._theory is None:
            self._theory = (signature, theory(sample.measured, graph))
        self._pending = sample

    def _finish_updates(self) -> None:
        """‖W_now − W_then‖ of the step that was sampled last, and lets go of the copies."""
        if self._pending is not None and self._pending.before:
            self._pending.updates = self._moved(self._pending)
            self._pending.before = {}

    @staticmethod
    def _moved(sample: _Sample) -> dict[int, Tensor]:
        now = weights(sample.graph, sample.found) if sample.graph is not None else {}
        with torch.no_grad():
            return norms({i: now[i].detach() - w for i, w in sample.before.items()})

    def _rows(self, sample: _Sample) -> list[Point]:
        if sample.graph is None:
            return []
        weight = scalars(sample.weight_norms)
        moved = scalars(sample.updates or self._moved(sample))
        known = self._theory is not None and self._theory[0] == tuple(n.name for n in sample.graph.nodes)
        return rows(
            sample.measured,
            sample.graph,
            self.name,
            step=sample.step,
            theory=self._theory[1] if known and self._theory is not None else {},
            found=sample.found,
            weight_norms=weight,
            # Zero: the optimizer has not stepped yet (or never will on this layer).
            updates={i: d / weight[i] for i, d in moved.items() if d > 0 and weight.get(i)},
        )

    def report(self) -> SignalReport:
        """What has been measured so far.

        Predictions are those of the first sampled step: theory describes a network at initialization.

        Returns:
            A `SignalReport` with a row per point and sampled step.

        Raises:
            UserError: no forward pass has been seen yet, or it had nothing to measure.
        """
        if self._pending is None:
            raise UserError(
                "the probe saw no forward pass: expected at least one call of the model inside `with`"
            )
        points = [*self._points, *self._rows(self._pending)]
        if all(p.kind == "input" for p in points):
            raise UserError(
                f"{self.name} has no point to measure: expected a layer with a floating-point output"
            )
        return SignalReport(points, meta={"torch": str(torch.__version__), "every": self.every})


def probe(
    model: nn.Module,
    every: int = 1,
    backward: bool = False,
    *,
    updates: bool = False,
    name: str | None = None,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
) -> Probe:
    """Measures the passes that run inside a `with` block; outputs, random state and gradients stay bitwise.

    Nothing is synchronized inside a pass (but after the first, for the prediction): a step's statistics wait on the
    device until the next sampled step, or `report()`. Cosine and rank are estimated from 8,192 features a sample.

    Args:
        model: the model, in whatever mode it is trained; compiled ones run sampled steps eagerly.
        every: sample one forward pass in this many, the first included.
        backward: also the gradients that the user's own `backward()` sends through.
        updates: also ‖ΔW‖ / ‖W‖ from a sampled step to the next call (copies the weights meanwhile).
        name: the model's name in the report; its class when omitted.
        include: glob patterns of further points.
        exclude: glob patterns of points to leave out.

    Returns:
        A context manager; `.report()` gives a `SignalReport` at any time, also after it closed.

    Raises:
        UserError: not a module, DataParallel, or `every` below 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> with probe(net, every=2) as p:
        ...     for _ in range(4):
        ...         _ = net(torch.randn(4, 8))
        >>> p.report().steps
        (0, 2)

    Paper: arXiv 2101.08692 §3.
    """
    return Probe(model, every, backward, updates, name, include, exclude)
