"""Callbacks for Lightning and Hugging Face: what the method needs, and a signal report of the running training."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from nfnets.advice import whole
from nfnets.agc import AGCHandle, Exclude, _check_limits
from nfnets.attached import Attached, attach
from nfnets.errors import UserError, unknown
from nfnets.given import check_text
from nfnets.marked import marks_of
from nfnets.signal import Probe, SignalReport, probe
from nfnets.signal.logged import Log, check_log, summary, values
from nfnets.signal.ranks import several

__all__ = ["huggingface_callback", "lightning_callback"]


def lightning_callback(
    clipping: float | Literal["auto"] | None = "auto",
    *,
    batch_size: int | None = None,
    network: str = "model",
    eps: float = 1e-3,
    exclude: Exclude = "head",
    head: float | Literal["auto"] | None = "auto",
    every: int | None = 100,
    backward: bool = False,
    folder: str | Path | None = None,
) -> Any:
    """A Lightning callback that does what `attach` does and measures by `probe`; both are removed when the fit ends.

    It logs, at the end of every epoch, `agc/clipped` (fraction of units clipped in that epoch) and, of the step that
    was sampled last, `signal/mean_sq` and `signal/var` (the largest average channel squared mean and variance of a
    residual join, or of any point where there is no join) and `signal/dead` (the largest fraction of dead units).
    Validation and sanity-check batches are neither sampled nor clipped. Where several optimizers train, those that hold
    parameters of the network are clipped. Where several ranks train, all that is measured is about the whole batch.

    Args:
        clipping: "auto" is all that the network's conversion method needs, by `nfnets.attach`: clipping, the head,
            centralization, with accumulated batches and devices counted in. A number is λ of adaptive gradient
            clipping, and nothing else is done; None is off.
        batch_size: images in a batch of one device, for "auto". None takes the one that `convert` was given, or the
            training loader's.
        network: attribute path of the network within the LightningModule; "" is the module itself.
        eps: ε of adaptive gradient clipping.
        exclude: what not to clip, as for `attach_agc`.
        head: at how many times λ the weights that make the logits are clipped, as for `attach_agc`. "auto" is what the
            method needs, and None beside a λ that is a number.
        every: sample one training batch in so many; None is never.
        backward: gradients, too.
        folder: where `signal.html` and `signal.json` are written when the fit ends, by the first rank.

    Returns:
        A `lightning.pytorch.Callback` (of `pytorch_lightning` where that is what is installed). Its `report()` is the
        `SignalReport` so far (of several ranks' whole batch, so every rank must ask; `report(merge=False)` is this
        rank's own), its `clipping` the handles of `attach_agc`, one per optimizer that holds parameters of the network.

    Raises:
        UserError: Lightning is not installed, or a limit is no number above 0; when the fit starts, a `network` that
            is not there, that no optimizer holds, or that `nfnets.attach` refuses.

    Example:
        >>> callback = lightning_callback(every=50)  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP

    Paper: arXiv 2102.06171, section 4; arXiv 2101.08692, section 3.
    """
    _check(clipping, eps, head, network, batch_size)
    return _class()(clipping, network, eps, exclude, head, every, backward, folder, batch_size)


def huggingface_callback(
    clipping: float | Literal["auto"] | None = "auto",
    *,
    batch_size: int | None = None,
    network: str = "",
    eps: float = 1e-3,
    exclude: Exclude = "head",
    head: float | Literal["auto"] | None = "auto",
    every: int | None = 100,
    backward: bool = False,
    folder: str | Path | None = None,
    log: Log | None = None,
) -> Any:
    """A callback for the `Trainer` of Hugging Face's transformers that does what `lightning_callback` does.

    Whenever the trainer logs, it adds `agc/clipped` and `signal/mean_sq`, `signal/var`, `signal/dead` of the step that
    was sampled last to `trainer.state.log_history` and to what is printed. Trackers that `report_to` names have had
    their values by then: pass `log`. The trainer clips by the global norm beside it, unless `max_grad_norm=0`.

    Args:
        clipping, eps, exclude, head, every, backward, folder: as for `lightning_callback`.
        batch_size: images in a batch of one device, for "auto". None takes the one that `convert` was given, or
            `per_device_train_batch_size`. `gradient_accumulation_steps` and devices are counted in.
        network: attribute path of the network within the trained model; "" is the model itself.
        log: called as `log(values, step)` by the first rank whenever the trainer logs and a step was sampled since,
            with more values than the summary: those of the stem, the joins and the head, as `nfnets.probe` logs them.

    Returns:
        A `transformers.TrainerCallback` with `report()` and `clipping`, as of `lightning_callback`.

    Raises:
        UserError: transformers is not installed, a limit is no number above 0, or `log` cannot be called; when the
            training starts, a `network` that is not there, or what `nfnets.attach` refuses.

    Example:
        >>> callback = huggingface_callback(every=50)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=images, callbacks=[callback]).train()  # doctest: +SKIP

    Paper: arXiv 2102.06171, section 4; arXiv 2101.08692, section 3.
    """
    _check(clipping, eps, head, network, batch_size)
    check_log(log)
    return _trainer_class()(clipping, network, eps, exclude, head, every, backward, folder, batch_size, log)


def _check(clipping: Any, eps: Any, head: Any, network: Any, batch_size: Any) -> None:
    _check_limits(*(1.0 if limit in (None, "auto") else limit for limit in (clipping, eps, head)))
    check_text(network, "network", "model")
    if batch_size is not None:
        whole("batch_size", batch_size)


class _Attending:
    """What both callbacks do, whoever calls them."""

    def __init__(
        self,
        clipping: float | Literal["auto"] | None,
        network: str,
        eps: float,
        exclude: Exclude,
        head: float | Literal["auto"] | None,
        every: int | None,
        backward: bool,
        folder: str | Path | None,
        batch_size: int | None = None,
        log: Log | None = None,
    ) -> None:
        self._log, self._seen = log, 0
        self._clipping, self._eps, self._exclude, self._head = clipping, eps, exclude, head
        self._batch_size = batch_size
        self._attached: list[Attached] = []
        self._network, self._every, self._backward = network, every, backward
        self._folder = None if folder is None else Path(folder)
        self.clipping: list[AGCHandle] = []
        self._probe: Probe | None = None

    def report(self, merge: bool | None = None) -> SignalReport:
        """The signal report so far; of all ranks where there are several, each of which must then ask for it."""
        if self._probe is None:
            raise UserError("nothing was sampled: expected a fit with every=100 or so before report()")
        # Trainers put DDP around their own module, so the network does not show that it is in DDP.
        return self._probe.report(several(self._probe.model) if merge is None else merge)

    def _start(self, optimizers: Sequence[Optimizer], net: nn.Module, counted: Callable[[], Any]) -> None:
        """Attach, and make the probe."""
        self._remove()
        self._attached, self.clipping = [], []
        if self._clipping is not None:
            given = self._given(net, counted)
            for each in _stepping(optimizers, net, self._network):
                self._attached.append(attach(each, net, **given))
            self.clipping = [each.clipping for each in self._attached if each.clipping is not None]
        if self._every is not None:
            agc = self.clipping[0] if len(self.clipping) == 1 else None
            self._probe = probe(net, self._every, self._backward, agc=agc)

    def _given(self, net: nn.Module, counted: Callable[[], Any]) -> dict[str, Any]:
        """What `attach` is told; `counted` gives the trainer's batch size and what multiplies it."""
        given = {"clipping": self._clipping, "eps": self._eps, "exclude": self._exclude, "head": self._head}
        if self._clipping != "auto":
            head = None if self._head == "auto" else self._head
            return given | {"head": head, "centralization": False, "verbose": False}
        known = counted()
        if self._batch_size is not None or any(mark.batch_size for mark in marks_of(net)):
            known["batch_size"] = self._batch_size
        return given | known

    # Open during training batches alone: a probe counts and samples every forward pass that it sees.
    def _open(self) -> None:
        if self._probe is not None:
            self._probe.__enter__()

    def _close(self) -> None:
        if self._probe is not None and self._probe._active:
            self._probe.__exit__(None, None, None)

    def _clipped(self) -> dict[str, Any]:
        """The fraction of units clipped since this was asked last."""
        used = [handle for handle in self.clipping if handle.stats.steps]
        if not used:
            return {}
        found = sum(handle.stats.fraction for handle in used) / len(used)
        for handle in used:
            handle.stats.reset()
        return {"agc/clipped": found}

    def _end(self, first: bool) -> None:
        """Remove everything; the first rank writes the report."""
        self._remove()
        if self._folder is None or not self._sampled():
            return
        report = self.report()  # by all ranks together, written by one
        if first:
            self._folder.mkdir(parents=True, exist_ok=True)
            report.to_html(self._folder / "signal.html")
            report.to_json(self._folder / "signal.json")

    def _sampled(self) -> bool:
        return self._probe is not None and self._probe.calls > 0

    def _remove(self) -> None:
        for handle in self._attached:
            handle.remove()
        self._close()


class _NormalizerFree(_Attending):
    """The hooks, without Lightning's base class."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        def counted() -> dict[str, Any]:
            return {
                "batch_size": getattr(getattr(trainer, "train_dataloader", None), "batch_size", None),
                "accumulate": getattr(trainer, "accumulate_grad_batches", 1),
                "world_size": getattr(trainer, "world_size", 1),
                "verbose": trainer.is_global_zero,
            }

        self._start(trainer.optimizers, _at(module, self._network), counted)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._open()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._close()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        found = self._clipped()
        if self._sampled():
            found |= summary(self.report())
        elif self._probe is not None:
            warnings.warn(
                f"network={self._network!r} ran in no training batch, so nothing is sampled: expected the path of what "
                f"training_step calls, such as {_called(module, self._network)}",
                stacklevel=2,
            )
        module.log_dict(found)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._end(trainer.is_global_zero)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._remove()


class _ForTrainer(_Attending):
    """The hooks, without the base class of transformers."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        def counted() -> dict[str, Any]:
            return {
                "batch_size": args.per_device_train_batch_size,
                "accumulate": args.gradient_accumulation_steps,
                "world_size": args.world_size,
                "verbose": state.is_world_process_zero,
            }

        self._seen = 0
        # The trainer's own is Accelerate's, around the one that steps.
        self._start([getattr(optimizer, "optimizer", optimizer)], _at(model, self._network), counted)
        if self.clipping and args.max_grad_norm and state.is_world_process_zero:
            print(
                f"  note: max_grad_norm={args.max_grad_norm:g} clips the whole gradient first; pass max_grad_norm=0"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._close()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        found = {name: float(value) for name, value in self._clipped().items()}
        steps = 0 if self._probe is None else -(-self._probe.calls // self._probe.every)
        if steps > self._seen:
            self._seen = steps
            report = self.report()
            if self._log is not None and state.is_world_process_zero:
                self._log(found | values(report.select()), state.global_step)
            found |= summary(report)
        for known in (logs, *state.log_history[-1:]):
            if known is not None:
                known.update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end(state.is_world_process_zero)


def _at(module: nn.Module, path: str) -> nn.Module:
    known = {name for name, _ in module.named_modules()}
    if path not in known:
        top = [name for name in known if name and "." not in name]
        raise unknown(f"network of {type(module).__name__}", path, top)
    return module.get_submodule(path)


def _stepping(optimizers: Sequence[Optimizer], net: nn.Module, path: str) -> list[Optimizer]:
    """The optimizers that hold parameters of a network; others train something else, as a GAN's second one does."""
    own = {id(p) for p in net.parameters()}
    found = [o for o in optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]
    if not found:
        raise UserError(
            f"network={path!r}: none of its parameters is in any of {len(optimizers)} optimizers; expected the path of "
            "what is trained"
        )
    return found


def _called(module: nn.Module, path: str) -> str:
    """What the network could have been instead, in words: the module's children that have something to train."""
    others = [n for n, child in module.named_children() if n != path and list(child.parameters())]
    return " or ".join(f"network={name!r}" for name in others) or "another one"


@functools.cache
def _class() -> type[Any]:
    """The hooks over Lightning's own base class, which is imported now."""
    return _over(_NormalizerFree, "NormalizerFree", "Callback", "lightning.pytorch", "pytorch_lightning")


@functools.cache
def _trainer_class() -> type[Any]:
    """The hooks over that of transformers."""
    return _over(_ForTrainer, "NormalizerFreeTrainerCallback", "TrainerCallback", "transformers")


def _over(hooks: type[_Attending], name: str, base: str, *modules: str) -> type[Any]:
    for module in modules:
        try:
            found = getattr(importlib.import_module(module), base)
        except ImportError:
            continue
        # Found by this name when a callback is unpickled in another process: see `__getattr__`.
        return type(name, (hooks, found), {"__module__": __name__})
    known = [module.partition(".")[0] for module in modules]
    raise UserError(f"{known[0]} is not installed: expected {' or '.join(known)}; pip install {known[0]}")


def __getattr__(name: str) -> Any:
    if name == "NormalizerFree":
        return _class()
    if name == "NormalizerFreeTrainerCallback":
        return _trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
