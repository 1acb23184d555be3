"""The loss around trained weights, along filter-normalized directions that several models share."""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nfnets import files
from nfnets.errors import UserError
from nfnets.given import check_module, shown
from nfnets.plain import read_json
from nfnets.preserve import preserved
from nfnets.signal import plotlyjs
from nfnets.signal.figure import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Watch = Callable[[int, int], object]


@dataclass(frozen=True)
class Landscape:
    """Losses around the weights of one model or several.

    Args:
        offsets: a, and b where there are two directions; 0 is the model itself.
        losses: by model, a loss for each a, or a row for each a with a loss for each b. Not finite where it diverged.
        dimensions: 1 or 2.
        seed: of the directions.
    """

    offsets: list[float]
    losses: dict[str, list[Any]]
    dimensions: int
    seed: int

    def figure(self) -> Figure:
        """Lines of all models in one panel, or contours of log₁₀ loss in a panel each; matplotlib."""
        from matplotlib.figure import Figure

        if self.dimensions == 1:
            figure = Figure(figsize=(5.6, 3.6), layout="constrained")
            axis = figure.subplots()
            for number, (name, row) in enumerate(self.losses.items()):
                axis.plot(self.offsets, row, "o-", ms=3, color=COLORS[number % len(COLORS)], label=name)
            axis.set_yscale("log")
            axis.set_xlabel("a, in filter norms")
            axis.set_ylabel("loss")
            axis.legend(frameon=False)
            return figure
        figure = Figure(figsize=(4.2 * len(self.losses), 3.8), layout="constrained")
        axes = figure.subplots(1, len(self.losses), squeeze=False)[0]
        levels = self._levels()
        for axis, (name, grid) in zip(axes, self.losses.items(), strict=True):
            # Rows of a matrix lie along the vertical axis, and a is the horizontal one.
            drawn = axis.contour(self.offsets, self.offsets, _logarithms(grid).T.numpy(), levels=levels)
            axis.clabel(drawn, fontsize=6, fmt=lambda level: f"{10**level:.2g}")
            axis.plot([0], [0], "+", color="black")
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("a, in filter norms")
            axis.set_ylabel("b")
        return figure

    def to_html(self, path: str | Path) -> Path:
        """Write a page with an interactive figure, which opens offline.

        Args:
            path: of the page.

        Returns:
            The path.

        Raises:
            UserError: it cannot be written.
        """
        traces, layout = self._plotly()
        data = json.dumps([traces, layout], allow_nan=False).replace("<", "\\u003c")
        names = html.escape(", ".join(self.losses))
        head = (
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Loss landscape: {names}</title>\n'
        )
        draw = f"{plotlyjs.THEN}(() => Plotly.newPlot('figure', ...{data}, {{responsive: true}}));"
        body = f'<div id="figure" style="height: 90vh"></div>\n<script>{draw}</script>\n</html>\n'
        return files.write(path, head + plotlyjs.embedded() + body)

    def _plotly(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        traces: list[dict[str, Any]] = []
        layout: dict[str, Any] = {"xaxis": {"title": {"text": "a, in filter norms"}}}
        for number, (name, found) in enumerate(self.losses.items()):
            look: dict[str, Any] = {"name": name, "line": {"color": COLORS[number % len(COLORS)]}}
            if self.dimensions == 1:
                losses = [loss if math.isfinite(loss) else None for loss in found]
                traces.append({"x": self.offsets, "y": losses, "mode": "lines+markers"} | look)
                continue
            # The part of plotly.js that is shipped draws lines, so contours are found here.
            for piece, (level, x, y) in enumerate(self._contours(found)):
                hover = {"hovertemplate": f"{name}: loss {10**level:.3g}<extra></extra>"}
                group = {"legendgroup": name, "showlegend": piece == 0}
                traces.append({"x": x, "y": y, "mode": "lines"} | look | hover | group)
        layout["yaxis"] = {"title": {"text": "loss"}, "type": "log"}
        if self.dimensions == 2:
            layout["yaxis"] = {"title": {"text": "b"}, "scaleanchor": "x"}
        return traces, layout

    def _levels(self) -> list[float]:
        """Levels of log₁₀ loss that all models share."""
        every = torch.cat([_logarithms(grid).flatten() for grid in self.losses.values()])
        every = every[every.isfinite()]
        low, high = float(every.min()), float(every.max())
        return torch.linspace(low, high if high > low else low + 1, 14)[1:-1].tolist()

    def _contours(self, grid: list[list[float]]) -> Iterator[tuple[float, list[float], list[float]]]:
        from contourpy import contour_generator

        found = contour_generator(self.offsets, self.offsets, _logarithms(grid).T.numpy())
        for level in self._levels():
            for piece in found.lines(level):
                yield level, piece[:, 0].tolist(), piece[:, 1].tolist()  # type: ignore[index,call-overload]


def landscape(
    models: nn.Module | Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy,
    dimensions: int = 1,
    steps: int = 21,
    extent: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> Landscape:
    """The loss over θ + a·d, or θ + a·d₁ + b·d₂, in evaluation mode.

    d is drawn from N(0, 1), then each filter is rescaled to the norm of the filter that stands there: d_i ← d_i ·
    ‖θ_i‖/‖d_i‖. Biases, gains and norm layers' parameters stay, as do buffers. A parameter's direction is drawn by its
    name and shape, so that a net and what a conversion makes of it move the same weights the same way, each in the
    norms of its own filters.

    Args:
        models: one, or several by name; left as they were.
        images: (N, …), what their forward takes.
        labels: (N, …), what the loss takes.
        loss: from outputs and labels to a mean over samples.
        dimensions: 1 or 2 directions.
        steps: values of a, and of b; an odd number has the model itself in the middle.
        extent: a and b run from −extent to extent; 1 replaces as much as is there.
        seed: of the directions.
        batch_size: images at once.
        out: a JSON file that what was measured is kept in, row by row; the same call with the same models goes on from
            it.
        watch: called with how many losses are done and how many there are, for a progress bar.

    Returns:
        A `Landscape`.

    Raises:
        UserError: no module, no model, wrong numbers, or a file that belongs to another landscape.

    Example:
        >>> net, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        >>> found = landscape({"linear": net}, x, y, steps=5)
        >>> found.offsets, len(found.losses["linear"])
        ([-1.0, -0.5, 0.0, 0.5, 1.0], 5)

    Paper: arXiv 1712.09913. Checked against the formula filter by filter.
    """
    named = {type(models).__name__: models} if isinstance(models, nn.Module) else dict(models)
    for name, model in named.items():
        check_module(model, name)
    if not named:
        raise UserError("no model: expected one or several by name; pass {'nf': model}")
    if dimensions not in (1, 2):
        raise UserError(f"dimensions={shown(dimensions)}: expected 1 or 2; pass dimensions=1")
    if not isinstance(steps, int) or steps < 2:
        raise UserError(f"steps={shown(steps)}: expected 2 or more; pass steps=21")
    if not 0 < extent < math.inf:
        raise UserError(f"extent={shown(extent)}: expected a finite number above 0; pass extent=1.0")
    offsets = torch.linspace(-extent, extent, steps, dtype=torch.float64).tolist()
    about = {"dimensions": dimensions, "offsets": offsets, "seed": seed}
    about |= {"data": _digest([images, labels]), "models": {n: _digest_of(m) for n, m in named.items()}}
    kept = _read(out, about)
    places = [*product(offsets, repeat=dimensions)]
    total, done = len(places) * len(named), 0
    for name, model in named.items():
        own = kept.setdefault(name, [])
        done += len(own)
        ways = [direction(model, seed, number) for number in range(dimensions)]
        with preserved(model):
            model.eval()
            for place in places[len(own) :]:
                own.append(_loss_at(model, ways, place, images, labels, loss, batch_size))
                done += 1
                if watch is not None:
                    watch(done, total)
                if out is not None and (len(own) % steps == 0 or dimensions == 1):
                    files.write(out, json.dumps({"about": about, "losses": _finite(kept)}))
    rows = {n: kept[n] if dimensions == 1 else _rows(kept[n], steps) for n in named}
    return Landscape(offsets, rows, dimensions, seed)


def direction(model: nn.Module, seed: int = 0, number: int = 0) -> dict[str, Tensor]:
    """A filter-normalized direction: for each weight of two dimensions or more, what a step of 1 adds to it.

    Args:
        model: its parameters' names, shapes and filter norms decide.
        seed: of the draw.
        number: of the direction.

    Returns:
        Tensors by parameter name.

    Raises:
        UserError: no module.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> torch.allclose(direction(net)["weight"].norm(dim=1), net.weight.norm(dim=1))
        True
    """
    check_module(model)
    found = {}
    for path, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            if p.ndim < 2 or isinstance(module, nn.LayerNorm | nn.RMSNorm):
                continue
            name = f"{path}.{attribute}".lstrip(".")
            key = hashlib.sha256(f"{seed} {number} {name} {tuple(p.shape)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            # Of a transposed convolution (in, out/groups, k…) a filter is an output's, over its group's inputs.
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            shape = (module.groups if transposed else 1, -1, *p.shape[1:])
            over = [1, *range(3, p.ndim + 1)] if transposed else [*range(2, p.ndim + 1)]
            own, drawn = p.detach().reshape(shape), drawn.reshape(shape)
            norms = [torch.linalg.vector_norm(t, dim=over, keepdim=True) for t in (own, drawn)]
            scaled = drawn * (norms[0] / norms[1])
            found[name] = scaled.reshape(p.shape)
    return found


@torch.no_grad()
def _loss_at(
    model: nn.Module,
    ways: list[dict[str, Tensor]],
    place: tuple[float, ...],
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
    batch_size: int,
) -> float:
    moved = {n: p.detach() for n, p in model.named_parameters()}
    for way, offset in zip(ways, place, strict=True):
        moved |= {name: moved[name] + offset * step for name, step in way.items()}
    total = 0.0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        total += float(loss(functional_call(model, moved, (x,)), y)) * len(x)
    return total / len(images)


def _finite(losses: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """JSON has no numbers that are none."""
    return {name: [v if math.isfinite(v) else None for v in row] for name, row in losses.items()}


def _rows(flat: list[float], steps: int) -> list[list[float]]:
    return [flat[at : at + steps] for at in range(0, len(flat), steps)]


def _logarithms(grid: list[list[float]]) -> Tensor:
    return torch.tensor(grid, dtype=torch.float64).clamp(min=1e-12).log10()


def _digest_of(model: nn.Module) -> str:
    return _digest([*model.state_dict().values()])


def _digest(tensors: list[Tensor]) -> str:
    seen = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        seen.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(flat.view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def _read(out: str | Path | None, about: dict[str, Any]) -> dict[str, list[float]]:
    """What was measured before, if the file is this landscape's."""
    if out is None or not Path(out).is_file():
        return {}
    found = read_json(Path(out), "losses around a model, as JSON")
    if found.get("about") != about:
        raise UserError(
            f"{out}: losses around other models, data or directions: expected a file of this landscape's; pass another"
        )
    return {name: [math.nan if v is None else float(v) for v in row] for name, row in found["losses"].items()}
