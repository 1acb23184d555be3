"""The learning-rate range test: a short run whose rate grows until the loss explodes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nfnets import files
from nfnets.errors import UserError
from nfnets.signal.figure import COLORS
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.loop.session import prepare, session

# As fastai does: the mean forgets within some ten steps, and four times its lowest is an explosion.
_DECAY = 0.9
_EXPLOSION = 4.0


@dataclass(frozen=True)
class RangeTest:
    """Rates that were tried, one per step, with the loss before each step.

    `smoothed` is the loss's exponential mean, corrected for its start. `suggested` is the rate at which the loss falls
    fastest against the logarithm of the rate, `lowest` the one at which its mean ends to fall: beyond, it is too high.
    `stopped` says whether the loss exploded before the last rate was reached.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggested: float
    lowest: float
    stopped: bool


def lr_range(
    config: RunConfig,
    *,
    start: float = 1e-5,
    stop: float = 10.0,
    steps: int = 100,
    on_step: Callable[[int, float, float], None] = lambda step, rate, loss: None,
) -> RangeTest:
    """Train a fresh arm with a rate that grows exponentially; nothing is saved.

    lr(t) = start · (stop / start)^(t / (steps − 1)). It ends early where the loss is not finite, or its mean exceeds
    four times the lowest so far.

    Args:
        config: the run's; its schedule, length and moving average are not used.
        start: the first rate.
        stop: the last one.
        steps: optimizer steps.
        on_step: told (step, rate, loss) after each.

    Returns:
        The curve and what it suggests.

    Raises:
        UserError: for impossible settings, or a loss that is not finite from the start.

    Example:
        >>> found = lr_range(RunConfig.create(model="bn_resnet8_cifar", train_limit=200, threads=1), steps=30)
        >>> found.rates[0] <= found.suggested <= found.lowest <= found.rates[-1]
        True

    Paper: arXiv 1506.01186 §3.3.
    """
    if not (0 < start < stop < math.inf and steps >= 10):
        raise UserError(
            f"start={start:g}, stop={stop:g}, steps={steps}: expected 0 < start < stop and 10 steps or more"
        )
    ramp = [start * (stop / start) ** (step / (steps - 1)) for step in range(steps)]
    config = config.model_copy(update={"ema_decay": None})
    losses: list[float] = []
    smoothed: list[float] = []
    stopped, mean = False, 0.0
    with session(config) as processes:
        data = load(config, processes.device)
        _, batches, trainer = prepare(config, data, processes, lambda step: ramp[step])
        for step, batch in enumerate(batches.from_step(0, steps)):
            loss = float(processes.mean(trainer.step(batch)[0]))
            mean = _DECAY * mean + (1 - _DECAY) * loss
            if not math.isfinite(loss):
                stopped = True
                break
            losses.append(loss)
            smoothed.append(mean / (1 - _DECAY ** (step + 1)))
            on_step(step, ramp[step], loss)
            if smoothed[-1] > _EXPLOSION * min(smoothed):
                stopped = True
                break
    rates = ramp[: len(losses)]
    if len(losses) < 5:
        raise UserError(
            f"the loss exploded after {len(losses)} steps at rates of {start:g} and a little more: expected it to "
            "fall first; start lower, and look at the signal with `nfnets check`"
        )
    return RangeTest(
        tuple(rates), tuple(losses), tuple(smoothed), *suggestion(rates, losses, smoothed), stopped
    )


def suggestion(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float]
) -> tuple[float, float]:
    """(the rate at which the loss falls fastest against log(rate), the rate at which its mean ends to fall).

    The slope at a rate is that of a line through the losses around it, an eighth of the curve wide: between
    neighbors there is mostly noise. The fall ends at the lowest mean, or before it where the mean, most of the way
    down, rises again by a tenth of the whole fall: such rates shake the net, which then often learns anew, and lower.

    Example:
        >>> rates = [10.0**e for e in range(-6, 3)]
        >>> losses = [2.3, 2.3, 2.3, 2.3, 2.2, 1.6, 1.2, 1.1, 5.0]
        >>> suggestion(rates, losses, losses)
        (0.1, 10.0)
    """
    mean = np.asarray(smoothed)
    lowest = int(np.argmin(mean))
    best = np.minimum.accumulate(mean)
    top, fall = mean[: lowest + 1].max(), mean[: lowest + 1].max() - mean[lowest]
    risen = (mean - best > 0.1 * fall) & (top - best > 0.5 * fall)
    if risen[:lowest].any():
        lowest = int(np.argmin(mean[: int(np.argmax(risen))]))
    half = max(1, len(losses) // 16)
    until = max(lowest, 2 * half) + 1
    x, y = np.log(np.asarray(rates)), np.asarray(losses)
    windows = [slice(at - half, at + half + 1) for at in range(half, until - half)]
    slopes = [np.polyfit(x[window], y[window], 1)[0] for window in windows]
    return float(rates[half + int(np.argmin(slopes))]), float(rates[lowest])


def save(found: RangeTest, folder: Path) -> tuple[Path, Path]:
    """Write lr-range.json and lr-range.png into a folder, made where it is missing; nothing else in it changes.

    Raises:
        UserError: when they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder"
        ) from None
    text, image = folder / "lr-range.json", folder / "lr-range.png"
    files.write(text, json.dumps(asdict(found), indent=1, allow_nan=False) + "\n")
    files.write(image, lambda path: draw(found).savefig(path, dpi=150))
    return text, image


def draw(found: RangeTest) -> Figure:
    """Loss against learning rate, with the suggestion marked."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    axis.plot(found.rates, found.losses, color="0.8", linewidth=1, label="loss of each step")
    axis.plot(found.rates, found.smoothed, color=COLORS[0], linewidth=2, label="smoothed")
    axis.axvline(found.suggested, color=COLORS[1], linewidth=1)
    axis.annotate(
        f" falls fastest: {found.suggested:.2g}",
        (found.suggested, 0.97),
        xycoords=("data", "axes fraction"),
        va="top",
        color=COLORS[1],
    )
    axis.set_xscale("log")
    axis.set_ylim(0, 1.1 * max(found.smoothed[0], *found.losses[: max(5, len(found.losses) // 2)]))
    axis.set_xlabel("learning rate")
    axis.set_ylabel("training loss")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left")
    return figure
