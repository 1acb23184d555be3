"""One optimizer step, and the state that a checkpoint holds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nfnets.train.config import RunConfig
from nfnets.train.keyed import key, seed_torch
from nfnets.train.mix import Mixer
from nfnets.train.optim import Optimizer
from nfnets.train.order import Batch
from nfnets.train.processes import Processes
from nfnets.train.schedule import learning_rate

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A model with its optimizer, gradient scaler, moving average and step count.

    Args:
        model: on its device, in training mode.
        config: of the run.
        per_epoch: optimizer steps per epoch.
        num_classes: of the data, for soft targets.
        processes: each takes its share of every batch.
    """

    def __init__(
        self, model: nn.Module, config: RunConfig, per_epoch: int, num_classes: int, processes: Processes
    ) -> None:
        self.model, self.config, self.processes = model, config, processes
        self.device = next(model.parameters()).device
        self.total = config.epochs * per_epoch
        self.warmup = round(config.warmup_epochs * per_epoch)
        self.step_count = 0
        self.optimizer = Optimizer(model, config)
        self._forward = processes.wrap(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.ema = None
        if config.ema_decay is not None:
            from timm.utils.model_ema import ModelEmaV3  # timm's import takes seconds

            self.ema = ModelEmaV3(model, config.ema_decay, use_warmup=True)
        self.mixer = Mixer(config, num_classes)
        self._dtype = _AUTOCAST.get(config.precision)

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated and exported: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def lr(self) -> float:
        """The learning rate of the coming step."""
        return learning_rate(
            self.step_count,
            peak=self.config.lr,
            total=self.total,
            warmup=self.warmup,
            floor=self.config.min_lr,
        )

    def step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """One optimizer step on a batch.

        Returns:
            The mean loss of this process's share of the batch, and the fraction of units that AGC clipped
            (None where it is off), as tensors on the device: nothing here waits for it.
        """
        parts, ranks = self.config.accumulation, self.processes.size
        size = len(batch.labels) // (parts * ranks)
        images, targets = batch.images, batch.labels
        if self.mixer:
            images, targets = self.mixer(images, targets, self.step_count)
        self.optimizer.torch.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for part in range(parts):
            at = part * ranks + self.processes.rank
            # Dropout and stochastic depth draw from torch's generator: keyed, they need no saved state.
            seed_torch(key(self.config.seed, "forward", self.step_count, at) & (2**63 - 1))
            rows = slice(at * size, (at + 1) * size)
            with self._synchronized(part == parts - 1):
                loss = self._loss(images[rows], targets[rows])
                if parts > 1:
                    loss = loss / parts
                self.scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        self.optimizer.set_lr(self.lr())
        # AGC is a step pre-hook: it must see unscaled gradients, summed over every micro-batch.
        self.scaler.unscale_(self.optimizer.torch)
        self.scaler.step(self.optimizer.torch)
        self.scaler.update()
        self.step_count += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step_count)
        return total, self.optimizer.clipped

    def _synchronized(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the processes at the last micro-batch only."""
        if last or not isinstance(self._forward, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self._forward.no_sync()

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
