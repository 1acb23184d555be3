"""BatchNorm whose statistics are taken over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm layer of a model normalize by the statistics of the whole batch, over all processes.

    On a GPU they become torch's `SyncBatchNorm` (timm's fused kinds included, by timm's own conversion). torch has
    none for the CPU: there the layers' own class is changed, and two all-reduces a layer bring the mean and the
    biased variance together.

    Args:
        model: changed in place; parameters, buffers and names stay.
        device: that it trains on.

    Returns:
        The model; another object only where the model itself is a norm layer.
    """
    if device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm  # seconds of imports

        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _Synchronized):
            module.__class__ = type(type(module).__name__, (_Synchronized, type(module)), {})
    return model


class _Synchronized(_BatchNorm):
    def forward(self, input: Tensor, **kwargs: Any) -> Tensor:
        if not self.training or not distributed.is_initialized():
            return super().forward(input, **kwargs)
        shape = (1, -1, *[1] * (input.ndim - 2))
        others = [0, *range(2, input.ndim)]
        wide = input.float()
        # Every process holds as many values: the means' mean is the whole mean.
        mean = _mean(wide.mean(others))
        centered = wide - mean.view(shape)
        variance = _mean(centered.square().mean(others))
        self._remember(mean.detach(), variance.detach(), input.numel() // input.shape[1])
        y = (centered * (variance + self.eps).rsqrt().view(shape)).to(input.dtype)
        if self.weight is not None:
            y = y * self.weight.view(shape).to(input.dtype) + self.bias.view(shape).to(input.dtype)
        for name in ("drop", "act"):  # timm fuses these into its norm layers
            after = getattr(self, name, None)
            y = after(y) if isinstance(after, nn.Module) else y
        return y

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        count *= distributed.get_world_size()
        share = 1.0 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def _mean(tensor: Tensor) -> Tensor:
    total: Any = _Sum.apply(tensor)
    return total / distributed.get_world_size()
