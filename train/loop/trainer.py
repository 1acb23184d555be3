"""One optimizer step, and the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nfnets.accumulate import accumulating
from nfnets.train.augment.mix import Mixer
from nfnets.train.config import RunConfig
from nfnets.train.keyed import key, seed_torch
from nfnets.train.loop.optim import Optimizer
from nfnets.train.loop.order import Batch
from nfnets.train.loop.processes import Processes
from nfnets.train.loop.recompute import recompute_
from nfnets.train.loop.sam import climbed
from nfnets.train.loop.schedule import learning_rate
from nfnets.train.loop.sync_bn import synchronize_

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A model with its optimizer, gradient scaler, moving average and step count.

    Args:
        model: on its device, in training mode.
        config: of the run.
        per_epoch: optimizer steps per epoch.
        num_classes: of the data, for soft targets.
        processes: each takes its share of every batch.
        rate: the learning rate of a step, in place of the configured schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        per_epoch: int,
        num_classes: int,
        processes: Processes,
        rate: Callable[[int], float] | None = None,
    ) -> None:
        self.rate = rate or self.scheduled
        self.device = next(model.parameters()).device
        if config.sync_bn and config.method == "bn" and processes.size > 1:
            model = synchronize_(model, self.device)
        if config.grad_checkpointing:
            recompute_(model)
        self.model, self.config, self.processes = model, config, processes
        self.total = config.epochs * per_epoch
        self.warmup = round(config.warmup_epochs * per_epoch)
        self.falls = [round(epoch * per_epoch) for epoch in config.decay_epochs]
        self.step_count = 0
        self.optimizer = Optimizer(model, config)
        self._parallel = self._forward = processes.wrap(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.ema = None
        if config.ema_decay is not None:
            from timm.utils.model_ema import ModelEmaV3  # timm's import takes seconds

            self.ema = ModelEmaV3(model, config.ema_decay, use_warmup=True)
        self.mixer = Mixer(config, num_classes)
        self._dtype = _AUTOCAST.get(config.precision)
        self.evaluated: nn.Module = model if self.ema is None else self.ema.module
        """What is evaluated: the moving average where there is one, compiled where that is asked for."""
        if config.compile:
            # Shapes are few. Were they dynamic, what a resumed run compiles would depend on where it begins.
            self._forward = compiled(self._parallel)
            self.evaluated = compiled(self.evaluated)

    def lr(self) -> float:
        """The learning rate of the coming step."""
        return self.rate(self.step_count)

    def scheduled(self, step: int) -> float:
        """The configured learning rate of a step."""
        return learning_rate(
            step,
            peak=self.config.lr,
            total=self.total,
            warmup=self.warmup,
            floor=self.config.min_lr,
            falls=None if self.config.schedule == "cosine" else self.falls,
            factor=self.config.decay_factor,
        )

    def step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """One optimizer step on a batch.

        Returns:
            The mean loss of this process's share of the batch, and the fraction of units that AGC clipped
            (None where it is off), as tensors on the device: nothing here waits for it.
        """
        images, targets = batch.images, batch.labels
        if self.mixer:
            images, targets = self.mixer(images, targets, self.step_count)
        self.optimizer.torch.zero_grad(set_to_none=True)
        if self.config.sam_rho:
            loss = self._backward(images, targets, self.config.sam_share)
            with climbed(self.model, self.config.sam_rho):
                self._backward(images, targets)
        else:
            loss = self._backward(images, targets)
        self.optimizer.set_lr(self.lr())
        # AGC is a step pre-hook: it must see unscaled gradients, summed over every micro-batch.
        self.scaler.unscale_(self.optimizer.torch)
        self.scaler.step(self.optimizer.torch)
        self.scaler.update()
        self.step_count += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step_count)
        return loss, self.optimizer.clipped

    def warm_up(self, batch: Batch) -> None:
        """Compile what a step on such a batch runs; nothing is changed by it."""
        images, targets = batch.images, batch.labels
        if self.mixer:
            images, targets = self.mixer(images, targets, self.step_count)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        if self.config.sam_rho and self.config.sam_share < 1:
            self._backward(images, targets, self.config.sam_share)
        self._backward(images, targets)
        self.optimizer.torch.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)

    def _backward(self, images: Tensor, targets: Tensor, share: float = 1.0) -> Tensor:
        """Add the (scaled) gradient of a batch's mean loss; returns that loss.

        Args:
            images: of all processes.
            targets: theirs.
            share: of every micro-batch, from its start, that is looked at.
        """
        parts, ranks = self.config.accumulation, self.processes.size
        size = len(targets) // (parts * ranks)
        total: Tensor | None = None
        with self._weights_once():
            for part in range(parts):
                at = part * ranks + self.processes.rank
                # Dropout and stochastic depth draw from torch's generator: keyed, they need no saved state.
                seed_torch(key(self.config.seed, "forward", self.step_count, at) & (2**63 - 1))
                rows = slice(at * size, at * size + max(1, round(share * size)))
                with self._synchronized(part == parts - 1):
                    loss = self._loss(images[rows], targets[rows])
                    if parts > 1:
                        loss = loss / parts
                    self.scaler.scale(loss).backward()
                total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _weights_once(self) -> AbstractContextManager[Any]:
        """Where weights are used again, what is computed from them is computed once; not where a compiler does that."""
        again = self.config.accumulation > 1 or self.config.grad_checkpointing
        return accumulating(self.model) if again and not self.config.compile else nullcontext()

    def _synchronized(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the processes at the last micro-batch only."""
        if last or not isinstance(self._parallel, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self._parallel.no_sync()

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        if self._dtype is None:
            logits = self._forward(images)
        else:
            with torch.autocast(self.device.type, self._dtype):
                logits = self._forward(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the coming steps depend on."""
        return {
            "step": self.step_count,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.torch.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.torch.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.step_count = state["step"]


def compiled(model: nn.Module) -> nn.Module:
    """The model by `torch.compile`, every shape for itself."""
    return torch.compile(model, dynamic=False)  # pyright: ignore[reportReturnType]
