"""One training run from its configuration: resumable, exact, and honest about divergence."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nfnets import files
from nfnets.errors import UserError, first_line
from nfnets.state_dicts import write_state
from nfnets.train import hardware
from nfnets.train.config import RunConfig
from nfnets.train.data import Data, load
from nfnets.train.data.splits import Split
from nfnets.train.loop import checkpoint
from nfnets.train.loop import folder as folders
from nfnets.train.loop.evaluate import Metrics, evaluate
from nfnets.train.loop.interrupts import Interrupts, Stopped
from nfnets.train.loop.log import Log
from nfnets.train.loop.processes import Processes, must_be_as_many
from nfnets.train.loop.session import prepare, session

if TYPE_CHECKING:
    from nfnets.train.data.stream import Stream

OnStep = Callable[[dict[str, Any]], None]

# Losses stay on the device until a flush: a GPU is not made to wait for a log line at every step.
_FLUSH_STEPS = 50
_FLUSH_SECONDS = 0.5
# Several processes must flush, and notice a signal, at the same step, which their clocks do not tell.
_FLUSH_STEPS_TOGETHER = 10


def run(
    config: RunConfig,
    folder: Path,
    *,
    on_step: OnStep | None = None,
    resume: bool = True,
    test: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train one arm to the end of its budget, and test it once.

    The same configuration gives the same weights, bit for bit, on one machine, whatever interrupted it. What it leaves
    open (threads, device) is what the run began with.

    Args:
        config: what to train.
        folder: gets config.json, checkpoint.pt, log.jsonl, model.safetensors and result.json. A finished
            run's result is returned at once; an open one goes on where it was.
        on_step: called with every row of the log, plus "steps", the run's total.
        resume: False starts again from nothing.
        test: False leaves the test split alone, as a learning-rate search must; the same run asked for again
            with True then reads it, and trains nothing.
        say: told in one line what a user should know (a damaged checkpoint, say).

    Returns:
        The content of result.json: "status" is "done" or "diverged" (a non-finite loss: the rest of the
        budget is not spent, accuracies are None, "diverged_at" is the step, no weights are written).

    Raises:
        UserError: for impossible settings, unreadable data, or a folder that is not this run's.
        KeyboardInterrupt, SystemExit(143): after Ctrl-C or SIGTERM, with the state saved.

    Example:
        >>> import tempfile
        >>> config = RunConfig.create(model="bn_resnet8_cifar", train_limit=80, epochs=1, threads=1)
        >>> result = run(config, Path(tempfile.mkdtemp()) / "run")
        >>> result["status"], result["steps"]
        ('done', 1)
    """
    folder = Path(folder)
    config = folders.as_begun(folder, config)

    def over() -> dict[str, Any] | None:
        """The result, if nothing is left to do. Weights that somebody deleted are written again from the checkpoint."""
        result = folders.finished(folder, config, tested=test)
        if result is not None:
            must_be_as_many(folder, result.get("processes", 1))
        if result is None or not (lost := folders.lost(folder, config, result)):
            return result
        if checkpoint.present(folder):
            return None
        say(f"{lost} was deleted, and so were the checkpoints; to train again, choose another folder")
        return result

    if resume and (result := over()) is not None:
        return result
    if not resume:
        folders.finished(folder, config)  # still refuses a folder that is another run's
    with session(config) as processes:
        config = config.settled({"threads": torch.get_num_threads(), "device": processes.device.type})
        data = load(config, processes.device)
        with folders.owned(folder) if processes.first else nullcontext():
            # Another process may have finished it between the look above and the lock.
            result = over() if resume and processes.first else None
            if (result := processes.first_says(result)) is not None:
                return result
            this = _Run(config, folder, data, processes, on_step, say)
            if processes.first:
                folders.mark(folder, config, resume=resume)
            return this.result(test)


class _Run:
    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        data: Data,
        processes: Processes,
        on_step: OnStep | None,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.folder, self.data = config, folder, data
        self.processes, self.device = processes, processes.device
        self.on_step, self.say = on_step, say
        self.augment, self.batches, self.trainer = prepare(config, data, processes)
        self.train_seconds = self.compile_seconds = 0.0
        self.diverged_at: int | None = None
        self.pending: list[tuple[int, float, Tensor, Tensor | None]] = []
        self.validation: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def result(self, test: bool) -> dict[str, Any]:
        """Train from where the folder is, evaluate, write result.json."""
        kept = self.processes.first_says(self._restore())  # nobody writes before everybody has read
        log = Log(self.folder / folders.LOG, kept) if self.processes.first else nullcontext()
        with log as self.log, Interrupts() as self.interrupts:
            try:
                self._compile()
                self._train()
                tested = self._evaluate(self.data.test) if test and not self.diverged_at else None
            except Stopped:
                raise
            except (KeyboardInterrupt, SystemExit):  # raised between steps: by on_step, or for a noted signal
                self._save()
                raise
            result = self.processes.first_says(self._finish(tested) if self.processes.first else None)
            self.interrupts.leave()
            return result

    def _compile(self) -> None:
        """Before the clock of training starts, and before anything else runs: a resumed run compiles the same."""
        if not self.config.compile:
            return
        started = time.perf_counter()
        self.trainer.warm_up(self.batches.first())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.compile_seconds = time.perf_counter() - started

    def _train(self) -> None:
        trainer, total = self.trainer, self.trainer.total
        batches = self.batches.from_step(trainer.step_count, total)
        if self._evaluates(trainer.step_count) and self.validation.get("step") != trainer.step_count:
            self._validate()  # the run was interrupted between the step and its validation
        started = time.perf_counter()
        while trainer.step_count < total and not self.diverged_at:
            lr, (loss, clipped) = trainer.lr(), trainer.step(next(batches))
            step = trainer.step_count
            self.pending.append((step, lr, loss, clipped))
            evaluates, saves = self._evaluates(step), self._saves(step)
            if not (evaluates or saves or self._flushes(step, started)):
                continue
            self._flush()
            self.train_seconds += time.perf_counter() - started
            if evaluates and not self.diverged_at:
                self._validate()
            self.interrupts.pending = self.processes.largest(self.interrupts.pending)
            if saves or self.interrupts.pending:
                self.processes.unite(self.data.unreadable)
            if saves or self._is_best():
                self._save()
            self.interrupts.leave()
            started = time.perf_counter()

    def _flushes(self, step: int, started: float) -> bool:
        if self.processes.size > 1:
            return step % _FLUSH_STEPS_TOGETHER == 0
        late = len(self.pending) >= _FLUSH_STEPS or time.perf_counter() - started >= _FLUSH_SECONDS
        return late or self.interrupts.pending > 0

    def _evaluates(self, step: int) -> bool:
        epochs, inside = divmod(step, self.batches.per_epoch)
        every = self.config.eval_every
        return step == self.trainer.total or (step > 0 and inside == 0 and every > 0 and epochs % every == 0)

    def _saves(self, step: int) -> bool:
        return (
            step == self.trainer.total or step % (self.config.checkpoint_every or self.batches.per_epoch) == 0
        )

    def _flush(self) -> None:
        """Bring the buffered losses to the log, up to the first one that is not finite."""
        if not self.pending:
            return
        losses = self.processes.mean(torch.stack([loss for _, _, loss, _ in self.pending])).tolist()
        shares: list[float] | None = None
        if self.pending[0][3] is not None:
            shares = torch.stack([c for _, _, _, c in self.pending if c is not None]).tolist()
        rows = []
        for at, (step, lr, _, _) in enumerate(self.pending):
            row = {"step": step, "epoch": self._epoch(step), "loss": losses[at], "lr": lr}
            if shares is not None:
                row["clipped"] = shares[at]
            rows.append(row)
            if not math.isfinite(losses[at]):
                self.diverged_at = step
                break
        self.pending.clear()
        self._report(rows)

    def _report(self, rows: list[dict[str, Any]]) -> None:
        if self.log is None:
            return
        self.log.write(rows)
        if self.on_step is not None:
            for row in rows:
                self.on_step({**row, "steps": self.trainer.total})

    def _epoch(self, step: int) -> float:
        return round(step / self.batches.per_epoch, 6)

    def _validate(self) -> None:
        metrics = self._evaluate(self.data.val)
        step = self.trainer.step_count
        self.validation = {"step": step, "loss": metrics.loss, "accuracy": metrics.accuracy}
        if not math.isfinite(metrics.loss):
            self.diverged_at = step
        elif self._rank(self.validation) > self._rank(self.best):
            self.best = dict(self.validation)
        self._report(
            [
                {
                    "step": step,
                    "epoch": self._epoch(step),
                    "split": "val",
                    "loss": metrics.loss,
                    "accuracy": metrics.accuracy,
                }
            ]
        )

    @staticmethod
    def _rank(validation: dict[str, Any]) -> tuple[float, float]:
        """The better, the greater; of two alike the first is kept."""
        return (validation["accuracy"], -validation["loss"]) if validation else (-math.inf, -math.inf)

    def _is_best(self) -> bool:
        return self.best.get("step") == self.trainer.step_count

    def _evaluate(self, split: Split | Stream) -> Metrics:
        def between() -> None:
            if self.processes.size == 1:  # one process of several must not leave the others waiting
                self.interrupts.leave()

        self.processes.share_buffers(self.trainer.evaluated)
        return evaluate(
            self.trainer.evaluated,
            split,
            self.augment.normalize,
            batch_size=self.config.eval_batch_size,
            channels_last=self.config.channels_last,
            between=between,
            processes=self.processes,
        )

    def _save(self) -> None:
        """A checkpoint of the present step, with the log's rows up to it on disk."""
        self._flush()
        if self.diverged_at or self.log is None:
            return  # a diverged state is not worth going on from: a resumed run finds the divergence again
        state = self.trainer.state_dict() | {
            "log_bytes": self.log.sync(),
            "train_seconds": self.train_seconds,
            "validation": self.validation,
            "best": self.best,
            "unreadable": self.data.unreadable.found,
            "config": self.config.to_json(),
            "processes": self.processes.size,
        }
        checkpoint.save(self.folder, state, keep=self.config.keep_checkpoints, best=self._is_best())

    def _restore(self) -> int:
        """Load the checkpoint, if there is one; returns how many bytes of the log belong to it."""
        state = checkpoint.load(self.folder, self.say)
        if state is None:
            return 0
        try:
            return self._go_on_from(state)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self.folder}: its checkpoint is no whole one of this run ({type(error).__name__}: "
                f"{first_line(error)}); delete the folder to train again from the start"
            ) from error

    def _go_on_from(self, state: dict[str, Any]) -> int:
        theirs = RunConfig.create(**json.loads(state["config"])).settled(self.config)
        if theirs.fingerprint() != self.config.fingerprint():
            fields = "; ".join(self.config.differences(theirs))
            raise UserError(
                f"{self.folder}: its checkpoint is another run's ({fields}); choose another folder"
            )
        must_be_as_many(self.folder, state["processes"])
        if not (isinstance(state["step"], int) and 0 <= state["step"] <= self.trainer.total):
            raise ValueError(f"step {state['step']} of {self.trainer.total}")
        self.trainer.load_state_dict(state)
        self.train_seconds = float(state["train_seconds"])
        self.validation = state["validation"]
        self.best = state["best"]
        self.data.unreadable.merge(state["unreadable"])
        if self._is_best() and self.processes.first:
            checkpoint.save_best(self.folder, state)
        return int(state["log_bytes"])

    def _finish(self, test: Metrics | None) -> dict[str, Any]:
        if self.diverged_at is not None:
            self.validation, self.best = {}, {}
        diverged, tested = self.diverged_at is not None, test is not None
        if test is not None and not math.isfinite(test.loss):  # the validation that led here stays as it was
            diverged, test = True, None
        steps = self.trainer.step_count
        result = {
            "status": "diverged" if diverged else "done",
            "config": self.config.model_dump(mode="json"),
            "fingerprint": self.config.fingerprint(),
            "val_accuracy": self.validation.get("accuracy"),
            "val_loss": self.validation.get("loss"),
            "best": self.best or None,
            **_of_test(test),
            "steps": self.diverged_at or steps,
            "train_seconds": self.train_seconds,
            "compile_seconds": self.compile_seconds,
            "images_per_second": steps * self.config.batch_size / max(self.train_seconds, 1e-9),
            "peak_memory_mb": hardware.peak_memory_mb(self.device),
            "diverged_at": self.diverged_at,
            "parameters": sum(p.numel() for p in self.trainer.model.parameters()),
            "samples": {
                "train": len(self.data.train),
                "val": len(self.data.val),
                "test": len(self.data.test),
            },
            "unreadable": self.data.unreadable.summary(),
            "processes": self.processes.size,
            "versions": hardware.versions(),
            "hardware": hardware.hardware(self.device),
        }
        # A run that was only to be tested, or to write its weights again, keeps what its training measured.
        earlier = folders.finished(self.folder, self.config)
        if earlier is not None:
            new = ("status", *_of_test(test), "unreadable") if tested else ()
            result = earlier | {name: result[name] for name in new}
        about = {"fingerprint": self.config.fingerprint(), "config": self.config.to_json()}
        ema = None if self.trainer.ema is None else self.trainer.ema.module
        for name, model in ((folders.MODEL, self.trainer.model), (folders.EMA, ema)):
            if model is None or diverged:  # weights that are not finite would be taken for a trained model's
                (self.folder / name).unlink(missing_ok=True)
            else:
                files.write(self.folder / name, partial(write_state, model=model, metadata=about))
        assert self.log is not None  # the first process's task
        self.log.sync()
        files.write(self.folder / folders.RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
        return result


def _of_test(test: Metrics | None) -> dict[str, Any]:
    """What the test split says, for result.json; None throughout where it was not read."""
    return {
        "test_accuracy": test and test.accuracy,
        "test_loss": test and test.loss,
        "ece": test and test.ece,
        "reliability": test and [list(row) for row in test.bins],
    }
