"""A callback for Lightning: adaptive gradient clipping, and a signal report of the training that runs anyway."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from torch import nn

from nfnets.agc import AGCHandle, Exclude, attach_agc
from nfnets.errors import UserError, unknown
from nfnets.signal import Probe, SignalReport, probe

__all__ = ["lightning_callback"]


def lightning_callback(
    clipping: float | None = 0.01,
    *,
    network: str = "model",
    eps: float = 1e-3,
    exclude: Exclude = "head",
    every: int | None = 100,
    backward: bool = False,
    folder: str | Path | None = None,
) -> Any:
    """A Lightning callback that clips by `attach_agc` and measures by `probe`; both are removed when the fit ends.

    It logs, at the end of every epoch, `agc/clipped` (fraction of units clipped in that epoch) and, of the step that
    was sampled last, `signal/mean_sq` and `signal/var` (the largest average channel squared mean and variance of a
    residual join, or of any point where there is no join) and `signal/dead` (the largest fraction of dead units).
    Validation and sanity-check batches are neither sampled nor clipped.

    Args:
        clipping: λ of adaptive gradient clipping; None is off.
        network: attribute path of the network within the LightningModule; "" is the module itself.
        eps: ε of adaptive gradient clipping.
        exclude: what not to clip, as for `attach_agc`.
        every: sample one training batch in so many; None is never.
        backward: gradients, too.
        folder: where `signal.html` and `signal.json` are written when the fit ends, by the first rank.

    Returns:
        A `lightning.pytorch.Callback` (of `pytorch_lightning` where that is what is installed). Its `report()` is the
        `SignalReport` so far, its `clipping` the handles of `attach_agc`, one per optimizer.

    Raises:
        UserError: Lightning is not installed; when the fit starts, a `network` that is not there.

    Example:
        >>> callback = lightning_callback(clipping=0.05, every=50)  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP

    Paper: arXiv 2102.06171, section 4; arXiv 2101.08692, section 3.
    """
    return _class()(clipping, network, eps, exclude, every, backward, folder)


class _NormalizerFree:
    """The hooks, without Lightning's base class."""

    def __init__(
        self,
        clipping: float | None,
        network: str,
        eps: float,
        exclude: Exclude,
        every: int | None,
        backward: bool,
        folder: str | Path | None,
    ) -> None:
        self._clipping, self._eps, self._exclude = clipping, eps, exclude
        self._network, self._every, self._backward = network, every, backward
        self._folder = None if folder is None else Path(folder)
        self.clipping: list[AGCHandle] = []
        self._probe: Probe | None = None

    def report(self) -> SignalReport:
        """The signal report so far."""
        if self._probe is None:
            raise UserError("nothing was sampled: expected a fit with every=100 or so before report()")
        return self._probe.report()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        net = _at(module, self._network)
        if self._clipping is not None:
            self.clipping = [
                attach_agc(each, net, self._clipping, self._eps, self._exclude) for each in trainer.optimizers
            ]
        if self._every is not None:
            agc = self.clipping[0] if len(self.clipping) == 1 else None
            self._probe = probe(net, self._every, self._backward, agc=agc)

    # Open during training batches alone: a probe counts and samples every forward pass that it sees.
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self._probe is not None:
            self._probe.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._probe is not None:
            self._probe.__exit__(None, None, None)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        found: dict[str, Any] = {}
        used = [handle for handle in self.clipping if handle.stats.steps]
        if used:
            found["agc/clipped"] = sum(handle.stats.fraction for handle in used) / len(used)
            for handle in used:
                handle.stats.reset()
        if self._probe is not None and self._probe.calls:
            found |= summary(self.report())
        module.log_dict(found)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._remove()
        if self._folder is not None and self._probe is not None and trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            report = self.report()
            report.to_html(self._folder / "signal.html")
            report.to_json(self._folder / "signal.json")

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self.clipping:
            handle.remove()
        if self._probe is not None and self._probe._active:
            self._probe.__exit__(None, None, None)


def summary(report: SignalReport) -> dict[str, float]:
    """The three numbers of a report's last step that an experiment's log should have.

    Example:
        >>> from nfnets.signal import Point
        >>> summary(SignalReport([Point("net", "layer1.0", "join", "join", mean_sq=0.25, var=2.0)]))
        {'signal/mean_sq': 0.25, 'signal/var': 2.0}
    """
    points = report.select()
    trunk = [point for point in points if point.role == "join"] or points
    columns = {"mean_sq": trunk, "var": trunk, "dead": points}
    values = {
        name: [value for point in chosen if (value := getattr(point, name)) is not None]
        for name, chosen in columns.items()
    }
    return {f"signal/{name}": max(each) for name, each in values.items() if each}


def _at(module: nn.Module, path: str) -> nn.Module:
    known = {name for name, _ in module.named_modules()}
    if path not in known:
        top = [name for name in known if name and "." not in name]
        raise unknown(f"network of {type(module).__name__}", path, top)
    return module.get_submodule(path)


@functools.cache
def _class() -> type[Any]:
    """The hooks over Lightning's own base class, which is imported now."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            base = importlib.import_module(name).Callback
        except ImportError:
            continue
        # Found by this name when a callback is unpickled in another process: see `__getattr__`.
        return type("NormalizerFree", (_NormalizerFree, base), {"__module__": __name__})
    raise UserError(
        "Lightning is not installed: expected lightning or pytorch_lightning; pip install lightning"
    )


def __getattr__(name: str) -> Any:
    if name == "NormalizerFree":
        return _class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
