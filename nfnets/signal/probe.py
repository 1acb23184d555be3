"""A probe that samples the user's own forward (and backward) passes during training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nfnets.errors import UserError
from nfnets.signal import live, ranks
from nfnets.signal.collect import (
    Pass,
    Theory,
    Weights,
    branch_ends,
    gather,
    holders,
    norms,
    theory,
    weights,
)
from nfnets.signal.facts import facts
from nfnets.signal.live import Watch
from nfnets.signal.logged import Log, check_log, values
from nfnets.signal.notes import empty_input, of_graph, of_model, of_output, of_patterns, of_points
from nfnets.signal.points import compared, patterns, places, unmatched, unwrapped
from nfnets.signal.report import Point, SignalReport
from nfnets.signal.rows import RawPoint, points
from nfnets.signal.sampled import Layout, SampledStep, untraced
from nfnets.trace import Graph

# 256 runs of 16: a cosine good to a few percent for a fraction of what one from a whole feature map costs.
_FEATURES = 4096


class _ClippingStats(Protocol):
    def per_parameter(self) -> dict[str, float]: ...


class Clipping(Protocol):
    """What `nfnets.attach_agc` returns."""

    @property
    def stats(self) -> _ClippingStats: ...


class _Alone:
    """Belongs to one model while a probe is open; `copy` and `pickle` make nothing of it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Sampled(_Alone):
    """What the model's `forward` is while a probe is open."""

    def __init__(self, probe: Probe, original: Callable[..., Any], below: Any) -> None:
        self.probe, self.original, self.below = probe, original, below

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.probe._call(self.original, args, kwargs)


class _Unprobed(_Alone):
    """What its `__getstate__` is: copies and files of the model have no probe and run their own `forward`."""

    name = "__getstate__"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> Any:
        state = type(self.model).__getstate__(self.model)
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if value is not self}
            for name in [name for name, value in state.items() if isinstance(value, _Sampled)]:
                _put(state, name, _below(state[name]))
        return state


def _below(value: Any, closed: bool = False) -> Any:
    """What stood there before the probes (only those that are closed)."""
    while isinstance(value, _Sampled) and not (closed and value.probe._active):
        value = value.below
    return value


def _put(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        del attributes[name]
    else:
        attributes[name] = value


def _versions(weight: Weights) -> list[int]:
    """Counters that grow with every write in place: to know of a step costs no read."""
    return [w._version for held in weight.values() for w in held]


class Probe:
    """Measures the passes that run inside a `with` block; outputs, random state and gradients stay bitwise.

    Nothing is synchronized inside a pass (but after the first, for the prediction): a step's statistics wait on the
    device until the next sampled step, or `report()`, and come in one transfer (`agc` adds its own). Moments, extremes
    and dead units are exact and at every point; cosine and rank, which cost more than all of them together, are
    estimated from 4,096 features a sample, and after the first sampled pass only on the trunk (joins, or what enters
    activations) and at branch ends.

    Gradients are those of the last `backward()` that reached a point, as they came: of the scaled loss under a
    `GradScaler`, of one micro-batch where gradients are accumulated.

    Args:
        model: the model, in whatever mode it is trained; compiled ones run sampled steps eagerly.
        every: sample one forward pass in this many, the first included.
        backward: also the gradients that the user's own `backward()` sends through.
        updates: also ‖ΔW‖ / ‖W‖ by the optimizer's first step after a sampled pass (copies the weights until then).
        name: the model's name in the report; its class when omitted.
        include: glob pattern(s) of further points; one that matches nothing is noted.
        exclude: glob pattern(s) of points to leave out.
        thorough: cosine and rank at every point of every sampled pass.
        agc: the handle of `nfnets.attach_agc`: the fraction of units it clips joins the report.
        log: called with the values of each sampled step, `{"signal/var": 1.2, "signal/layer1.0/var": …}`, and the
            step: the stem, the joins and the head (all points where nothing is joined). That is when the next step is
            sampled, or the `with` block ends; a step is a forward pass. Under DDP each rank logs its own part. What is
            warned of is there, too: `signal/alarms` counts, and `signal/alarm/RULE/POINT` holds what was measured.
        warn: judge each sampled step when the next one comes, and warn of what it starts with, once for each rule
            (a `SignalWarning`).

    Returns:
        A context manager; `.report()` gives a `SignalReport` at any time, also after it closed.

    Raises:
        UserError: not a module, DataParallel, `every` below 1, `agc` that is no handle, or `log` that cannot be called.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> with probe(net, every=2) as p:
        ...     for _ in range(4):
        ...         _ = net(torch.randn(4, 8))
        >>> p.report().steps
        (0, 2)

    Paper: arXiv 2101.08692 §3.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        backward: bool = False,
        *,
        updates: bool = False,
        name: str | None = None,
        include: str | Collection[str] = (),
        exclude: str | Collection[str] = (),
        thorough: bool = False,
        agc: Clipping | None = None,
        log: Log | None = None,
        warn: bool = True,
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
        if agc is not None and not hasattr(getattr(agc, "stats", None), "per_parameter"):
            raise UserError(f"agc={type(agc).__name__}: expected the handle that nfnets.attach_agc returned")
        check_log(log)
        self.model, self.every, self.backward, self.updates = model, every, backward, updates
        self.include, self.exclude = patterns(include), patterns(exclude)
        inner = unwrapped(model)
        self.prefix = next((f"{n}." for n, m in model.named_modules() if m is inner and n), "")
        self.prefix = self.prefix.replace("_orig_mod.", "")
        self.name = name or type(inner).__name__
        self.calls = 0
        self.thorough, self.agc, self._log = thorough, agc, log
        self._logged = -1
        self._watch = Watch() if warn else None
        self._points: list[Point] = []
        self._rows: list[tuple[int, list[RawPoint]]] = []
        self._pending: SampledStep | None = None
        self._theory: tuple[tuple[Any, ...], Theory] | None = None
        self._layout: Layout | None = None
        self._notes: dict[str, None] = {}
        self._unmatched: list[str] | None = None
        self._hook = "forward"
        self._wrapped: _Sampled | None = None
        self._active = False
        self._running = False

    def __enter__(self) -> Self:
        if self._active:
            raise UserError("this probe is already open: expected one `with` at a time; make another probe")
        # `module.compile()` in place compiles the call itself: what it made is wrapped, never traced through.
        self._hook = "forward" if self.model._compiled_call_impl is None else "_compiled_call_impl"
        # An attribute of this instance: forward hooks of the root would miss passes that start inside them, and
        # a compiled model calls `forward` where hooks added later do not fire.
        attributes = self.model.__dict__
        self._wrapped = _Sampled(self, getattr(self.model, self._hook), attributes.get(self._hook))
        attributes[self._hook] = self._wrapped
        attributes.setdefault(_Unprobed.name, _Unprobed(self.model))
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        if self._pending is not None:
            self._pending.unfollow()
        if error is None and self._pending is not None:
            self._send(self._pending.step)
        attributes = self.model.__dict__
        if attributes.get(self._hook) is not self._wrapped:
            return  # a probe opened later wraps this one, and takes it away when it closes
        _put(attributes, self._hook, _below(self._wrapped, closed=True))
        probed = any(isinstance(value, _Sampled) for value in attributes.values())
        if not probed and isinstance(attributes.get(_Unprobed.name), _Unprobed):
            del attributes[_Unprobed.name]

    def _call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._active or self._running:  # closed, or a model that calls itself
            return original(*args, **kwargs)
        step = self.calls
        self.calls += 1
        if self._pending is not None and self._pending.gradients:
            self._pending.unfollow()  # a backward pass has come: the next belongs to another step
        with untraced():
            self._finish_updates()
        if step % self.every:
            return original(*args, **kwargs)
        if nothing := empty_input((args, kwargs)):
            self._notes[f"step {step} was not sampled: {nothing}"] = None
            return original(*args, **kwargs)
        if (
            self._pending is not None
        ):  # its backward pass is over by now: one transfer, and its tensors can go
            with untraced():
                self._finish(self._pending)
            self._pending = None
        known = self._layout
        measured = Pass(
            self.backward,
            only=known.kept if known else None,
            compared=known.compared if known and not self.thorough else None,
            features=_FEATURES,
        )
        self._running = True
        try:
            with measured.recording(self.model) as recorder:
                for leaf in tree_leaves((args, kwargs)):
                    if isinstance(leaf, Tensor):
                        recorder.record("input", "input", (), (), leaf, path="")
                output = original(*args, **kwargs)
                graph = recorder.graph(output)
        finally:
            self._running = False
        with untraced():
            self._keep(step, measured, graph)
        leaves = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim())
        samples = next(map(len, leaves), 0)
        self._notes |= dict.fromkeys([*of_output(output), *of_graph(graph), *of_model(self.model, samples)])
        return output

    def _keep(self, step: int, measured: Pass, graph: Graph) -> None:
        """Decides what are points, once a graph: later passes measure only those."""
        measured.settle()
        signature = tuple((node.name, node.inputs) for node in graph.nodes)
        layout = self._layout
        if layout is None or layout.signature != signature:
            found = places(graph, measured.outputs, self.include, self.exclude, self.prefix)
            ends = branch_ends(graph)
            kept = {p.node for p in found} | {end for end, _ in ends.values()}
            layout = Layout(
                signature, found, ends, kept, compared(found, self.include), holders(graph, found)
            )
            missed = unmatched(graph, measured.outputs, self.include, self.exclude, self.prefix)
            self._unmatched = [g for g in missed if self._unmatched is None or g in self._unmatched]
            # With other control flow than when the points were chosen, this pass may have missed some of its own.
            self._layout = layout if measured.only is None else None
        weight = weights(layout.held)
        lengths = norms(weight)
        if self._theory is None:
            self._theory = (signature, theory(measured, graph, weight, lengths))
        for index in measured.outputs.keys() - layout.kept:
            del measured.outputs[index]
        before = {i: [w.detach().clone() for w in ws] for i, ws in weight.items()} if self._moves() else {}
        self._pending = SampledStep(
            step,
            measured,
            layout,
            weight,
            lengths,
            before,
            _versions(weight),
            facts(graph, weight, units=measured.only is None),
        )
        if self.backward:
            self._pending.follow()

    def _moves(self) -> bool:
        return self.updates and self.model.training

    def _finish_updates(self) -> None:
        """‖W_now − W_then‖ of the step that was sampled last; lets go of the copies once the optimizer has stepped.

        Where gradients are accumulated that is not before the next call.
        """
        if self._pending is not None and self._pending.before:
            self._pending.updates = self._moved(self._pending)
            if _versions(self._pending.weights) != self._pending.versions:
                self._pending.before = {}

    @staticmethod
    def _moved(sample: SampledStep) -> dict[int, Tensor]:
        """The first update that was not zero: an optimizer that writes to `.data` changes no version."""
        with torch.no_grad():
            apart = {
                i: [w.detach() - b for w, b in zip(sample.weights[i], before, strict=True)]
                for i, before in sample.before.items()
            }
            now, known = norms(apart), sample.updates
            return known | {
                i: torch.where(known[i] > 0, known[i], n) if i in known else n for i, n in now.items()
            }

    def _finish(self, sample: SampledStep) -> None:
        """Per-channel statistics are kept only where ranks will be merged: averages cannot be."""
        sample.unfollow()
        rows = self._gather(sample)
        found = points(rows, self.name, sample.step)
        if ranks.several(self.model):
            self._rows.append((sample.step, rows))
        else:
            self._points += found
        alarm = self._watch.see(found) if self._watch is not None and ranks.first() else None
        if alarm is not None:
            live.warn(alarm)
        self._send(sample.step, rows)

    def _send(self, step: int, rows: list[RawPoint] | None = None) -> None:
        """Calls `log`, once a step."""
        if self._log is None or step <= self._logged:
            return
        if rows is None and self._pending is not None:
            rows = self._gather(self._pending)
        self._logged = step
        alarms = self._watch.values() if self._watch is not None and ranks.first() else {}
        self._log(values(points(rows or [], self.name, step)) | alarms, step)

    def _gather(self, sample: SampledStep) -> list[RawPoint]:
        known = self._theory is not None and self._theory[0] == sample.layout.signature
        return gather(
            sample.measured,
            sample.layout.found,
            sample.layout.ends,
            theory=self._theory[1] if known and self._theory is not None else {},
            weight_norms=sample.weight_norms,
            weight_gradients=sample.gradient_norms(),
            updates=self._moved(sample),
            clipped=self._clipped(sample.weights),
            layers=sample.facts,
        )

    def _clipped(self, weight: Weights) -> dict[int, float]:
        """By rows, which are the units of what has several weights; read from the device apart from the statistics."""
        if self.agc is None:
            return {}
        fractions = self.agc.stats.per_parameter()
        of = {
            id(p): fractions[name]
            for name, p in unwrapped(self.model).named_parameters()
            if name in fractions
        }
        known = {i: [w for w in held if id(w) in of] for i, held in weight.items()}
        return {
            i: of[id(held[0])]
            if len(held) == 1
            else sum(of[id(w)] * len(w) for w in held) / sum(map(len, held))
            for i, held in known.items()
            if held
        }

    def report(self, merge: bool | None = None) -> SignalReport:
        """What has been measured so far.

        Predictions are those of the first sampled step: theory describes a network at initialization.

        Args:
            merge: whether to merge what all ranks measured, as if the whole batch had run in one process: moments by
                Chan's formula, cosine and rank averaged. A collective call: every rank must make it, and gets the
                same report. By default, where the model is wrapped in DDP.

        Returns:
            A `SignalReport` with a row per point and sampled step.

        Raises:
            UserError: no forward pass has been seen yet, or it had nothing to measure.
        """
        rows = list(self._rows)
        if self._pending is not None:
            rows.append((self._pending.step, self._gather(self._pending)))
        if not rows and not self._points:
            raise UserError(
                next(iter(self._notes), "")
                or "the probe saw no forward pass: expected at least one call of the model inside `with`"
            )
        meta: dict[str, Any] = {"torch": str(torch.__version__), "every": self.every}
        if ranks.wrapped(self.model) if merge is None else merge:
            rows, meta["ranks"] = ranks.merge_steps(rows, self.model)
        found = [*self._points, *(p for step, each in rows for p in points(each, self.name, step))]
        if all(p.kind == "input" for p in found):
            raise UserError(
                f"{self.name} has no point to measure: expected a layer with a floating-point output"
            )
        if self.agc is not None:
            meta["clipped"] = self.agc.stats.per_parameter()
        notes = [*of_patterns(self._unmatched or ()), *self._notes, *of_points(found)]
        return SignalReport(found, notes=notes, meta=meta)


probe = Probe
"""How it is used, as a verb: `with nfnets.probe(model) as p: …`."""
