"""Starts side by side: what each makes of the signal, of the gradient, and of the first steps of training."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets import files
from nfnets.copying import deep_copy
from nfnets.errors import UserError
from nfnets.init.interface import initialize
from nfnets.init.measured import measured
from nfnets.init.reading import few_samples
from nfnets.init.registry import find
from nfnets.nested import fresh, tensors_in
from nfnets.noise import keyed
from nfnets.scale.one_pass import check
from nfnets.scale.report import Report
from nfnets.signal import SignalReport, profile

if TYPE_CHECKING:
    from rich.table import Table

AS_IS = "as is"
"""The start that leaves the model as it was given."""
METHODS = (
    AS_IS,
    "he",
    "glorot",
    "orthogonal",
    "lsuv",
    "autoinit",
    "weight_norm",
    "selu",
    "tat",
    "dks",
    "zero",
)
COLUMNS = {
    "forward": "mean square of the last hidden weight layer's output, over the first's",
    "gradient": "mean square of the gradient at the first weight layer's output, over the last hidden one's",
    "cosine": "mean cosine between two samples at the last hidden weight layer",
    "rank": "effective rank of the batch there",
    "dead": "largest share of channels of a layer that no example moves",
    "promised": "largest factor between a promised root mean square and the measured one",
    "first_loss": "of the given batch",
    "last_loss": "after the steps",
    "seconds": "of processor time that the start took",
}
"""What the numbers of a start are."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        reports: what each start did, by name.
        signal: the signal of all of them: points by model, `to_html` for the page.
        losses: of each, before the first step and after every one; infinite from where it diverged.
        seconds: processor time that each start took.
        refused: why a method could not be applied, by name.
    """

    reports: dict[str, Report]
    signal: SignalReport
    losses: dict[str, tuple[float, ...]]
    seconds: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row a start: what the columns of the table mean is in `COLUMNS`."""
        return [{"start": name} | self._numbers(name) for name in self.losses]

    def layers(self, name: str) -> list[dict[str, Any]]:
        """A start's weight layers in execution order: variance, gradient, cosine, rank, dead channels."""
        found = []
        for p in self._weighted(name):
            found.append(
                {
                    "layer": p.name,
                    "var": p.var,
                    "mean_sq": p.mean_sq,
                    "predicted_var": p.predicted_var,
                    "grad_var": p.grad_var,
                    "grad_mean_sq": p.grad_mean_sq,
                    "cosine": p.cosine,
                    "rank": p.rank,
                    "dead": p.dead,
                }
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; numbers that are not finite as texts."""
        layers = {name: self.layers(name) for name in self.losses}
        found = {
            "starts": self.rows(),
            "layers": layers,
            "losses": {name: list(values) for name, values in self.losses.items()},
            "refused": dict(self.refused),
        }
        return _plain(found)

    def to_json(self, path: str | Path) -> Path:
        """Writes what `to_dict` holds."""
        return files.write(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_html(self, path: str | Path) -> Path:
        """The signal page of all starts; notes above it say how the loss fell, and what refused the model."""
        return self.signal.to_html(path)

    def table(self) -> Table:
        """A rich table, one row a start."""
        from rich.table import Table

        table = Table("start", *(name.replace("_", " ") for name in COLUMNS), "signal")
        for row in self.rows():
            cells = [_cell(row[name]) for name in COLUMNS]
            table.add_row(row["start"], *cells, _verdict(row))
        for name in self.refused:
            table.add_row(name, *[""] * len(COLUMNS), "refused")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        head = ["start", *COLUMNS, "signal"]
        body = [
            [r["start"], *(_cell(r[name]) for name in COLUMNS), ", ".join(r["broken"]) or "healthy"]
            for r in self.rows()
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *body)
        ]
        return "\n".join([*lines, *(f"{name} was refused: {why}" for name, why in self.refused.items())])

    def _weighted(self, name: str) -> list[Any]:
        return [p for p in self.signal.points if p.model == name and p.kind in ("conv", "linear")]

    def _numbers(self, name: str) -> dict[str, Any]:
        found = self._weighted(name)
        hidden = found[:-1] or found
        first, last = hidden[0], hidden[-1]
        factors = [
            max(row.rms / row.promised, row.promised / row.rms) if row.rms > 0 else math.inf
            for row in self.reports.get(name, ())
            if not math.isnan(row.promised) and not math.isnan(row.rms)
        ]
        verdict = SignalReport([p for p in self.signal.points if p.model == name]).check()
        losses = self.losses[name]
        return {
            "forward": _over(_square(last), _square(first)),
            "gradient": _over(_square(first, "grad_"), _square(last, "grad_")),
            "cosine": last.cosine,
            "rank": last.rank,
            "dead": max(
                (p.dead for p in self.signal.points if p.model == name and p.dead is not None), default=None
            ),
            "promised": max(factors, default=None),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "seconds": self.seconds[name],
            "broken": list(verdict.broken),
        }


def compare(
    model: nn.Module,
    *inputs: Any,
    methods: Collection[str] | Mapping[str, Mapping[str, Any]] = METHODS,
    steps: int = 20,
    lr: float = 0.02,
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> Comparison:
    """Start copies of a model in several ways, and measure each: forward, backward and in the first steps of training.

    Every start draws from the same seed; every copy takes the same steps on the same batch (SGD, momentum 0.9), with
    dropout masks from one key. The model is left as it is. A method that refuses the model is listed with the reason.

    Args:
        model: with values, in the mode in which it should be measured.
        *inputs: one batch, as `model(*inputs)` takes it: 16 samples or more.
        methods: names of `list_initializers()`, or `"as is"`; or by a name of your own the options of `initialize`, as
            `{"tat 0.8": {"method": "tat", "eta": 0.8}}`.
        steps: of the loss curve; 0 for none.
        lr: its learning rate.
        loss: makes a 0-dim tensor of the output; by default cross-entropy to labels from the seed where the output is
            (N, classes), else the mean square distance to normal values from it.
        seed: of everything random.

    Returns:
        A `Comparison`: `print` it for a table, `to_html` for the signal page, `to_dict` for numbers.

    Raises:
        UserError: no methods, an unknown one, inputs the model rejects, or every method refused.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.ReLU())]
        >>> model = nn.Sequential(*layers, nn.Linear(64, 10))
        >>> found = compare(model, torch.randn(64, 64), methods=["as is", "he", "tat"])
        >>> [(row["start"], row["last_loss"] < row["first_loss"]) for row in found.rows()]
        [('as is', True), ('he', True), ('tat', True)]
    """
    check(model, inputs, {})
    _numbers_given(steps, lr)
    asked = _asked(methods)
    few_samples(model, inputs, {})  # inputs that the model rejects are refused here, once
    models: dict[str, nn.Module] = {}
    reports: dict[str, Report] = {}
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, options in asked.items():
        copy = deep_copy(model)
        with _seeded(seed):
            try:
                began = time.process_time()
                if options is not None:
                    reports[name] = initialize(copy, *inputs, measure=False, **options)
                seconds[name] = time.process_time() - began
                if options is not None:  # once more for what is measured, which is no cost of the start
                    reports[name] = measured(reports[name], copy, inputs, {})
                models[name] = copy
            except UserError as error:
                seconds.pop(name, None)
                reports.pop(name, None)
                refused[name] = str(error)
    if not models:
        name, why = next(iter(refused.items()))
        raise UserError(f"every method refused the model; {name}: {why}")
    wanted = loss or _loss(models, inputs, seed)
    signal = profile(models, *inputs, backward=True, loss=wanted)
    losses = {name: _curve(each, inputs, wanted, steps, lr) for name, each in models.items()}
    for name, curve in losses.items():
        if len(curve) > 1:
            signal.notes.append(
                f"{name}: loss {curve[0]:.4g} → {curve[-1]:.4g} in {len(curve) - 1} steps at lr {lr:g}"
            )
    signal.notes += [f"{name} was refused: {why}" for name, why in refused.items()]
    return Comparison(reports, signal, losses, seconds, refused)


def _numbers_given(steps: Any, lr: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise UserError(f"steps={steps}: expected a whole number of steps, 0 or more; pass steps=20")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise UserError(f"lr={lr}: expected a finite number above 0; pass lr=0.02")


def _asked(methods: Any) -> dict[str, dict[str, Any] | None]:
    """Options of `initialize` by name; None for the model as it is."""
    if isinstance(methods, str) or not isinstance(methods, Collection) or not methods:
        raise UserError(f"methods={methods!r}: expected names of initializers; pass methods=['he', 'lsuv']")
    given = methods if isinstance(methods, Mapping) else {name: {"method": name} for name in methods}
    found: dict[str, dict[str, Any] | None] = {}
    for name, options in given.items():
        if not isinstance(options, Mapping):
            raise UserError(f"methods[{name!r}]={options!r}: expected the options of initialize, as a dict")
        method = options.get("method", name)
        if method == AS_IS:
            found[name] = None
            continue
        find(method).check({k: v for k, v in options.items() if k != "method"}, {})
        found[name] = {"method": method} | dict(options)
    return found


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global generator from a seed; as it was afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _loss(models: Mapping[str, nn.Module], inputs: tuple[Any, ...], seed: int) -> Callable[[Any], Tensor]:
    """To labels or values from the seed, made for what the first model puts out."""
    first = next(iter(models.values()))
    with torch.no_grad(), keyed(first):
        own = fresh(inputs)
        shape = _output(deep_copy(first)(*own)).shape
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 2 and shape[1] > 1:
        labels = torch.randint(shape[1], (shape[0],), generator=generator)
        return lambda output: F.cross_entropy(_output(output).float(), labels.to(_output(output).device))
    values = torch.randn(shape, generator=generator)
    return lambda output: F.mse_loss(_output(output).float(), values.to(_output(output).device))


def _output(output: Any) -> Tensor:
    tensors = [t for t in tensors_in(output) if t.is_floating_point()]
    if not tensors:
        raise UserError("the model returns no floating-point tensor: expected one to compare; pass loss=")
    return tensors[0]


def _curve(
    model: nn.Module, inputs: tuple[Any, ...], loss: Callable[[Any], Tensor], steps: int, lr: float
) -> tuple[float, ...]:
    """Losses before the first step and after each, on one batch; infinite once it is not finite."""
    copy = deep_copy(model)
    parameters = [p for p in copy.parameters() if p.requires_grad]
    if not parameters or steps == 0:
        return ()
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    found: list[float] = []
    with keyed(copy), torch.enable_grad():
        for step in range(steps + 1):
            value = loss(copy(*fresh(inputs)))
            found.append(float(value.detach()) if bool(torch.isfinite(value)) else math.inf)
            if math.isinf(found[-1]):
                return (*found, *[math.inf] * (steps - step))
            if step < steps:
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
    return tuple(found)


def _square(point: Any, of: str = "") -> float | None:
    var, mean_sq = getattr(point, f"{of}var"), getattr(point, f"{of}mean_sq")
    return None if var is None or mean_sq is None else var + mean_sq


def _over(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return a / b if b else (math.inf if a else math.nan)


def _verdict(row: Mapping[str, Any]) -> str:
    return ", ".join(row["broken"]) or "healthy"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
