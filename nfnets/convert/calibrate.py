"""Set every constant of a converted model so that its output has unit variance, in one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nfnets.layers import Scale, _ScaledStd
from nfnets.trace import preserved, silence_noise


def calibrate_(model: nn.Module, *inputs: Any) -> dict[str, float]:
    """Choose each constant so that the average channel variance of its layer's output, before α, is 1.

    scale ← scale / sqrt(mean_c Var_c(out / α)). Each layer's hook rescales the output it just saw and passes it on,
    so by induction over the execution order one pass leaves every layer at unit variance on these inputs. A layer
    called more than once is set by its first call; one whose output is constant or not finite is left alone. Dropout
    and stochastic depth are off.

    Args:
        model: a converted model.
        *inputs: example inputs; on `meta` there is nothing to measure and nothing is changed.

    Returns:
        The constants that were set, by module path.
    """
    chosen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str) -> Any:
        def measure(module: Any, args: Any, output: Tensor) -> Tensor:
            if path in chosen or output.is_meta or output.numel() == 0:
                return output
            constant, alpha = (
                (module.value, None) if isinstance(module, Scale) else (module.scale, module.alpha)
            )
            factor = average_channel_variance(output if alpha is None else output / alpha).rsqrt()
            if not torch.isfinite(factor):
                return output
            chosen[path] = constant, (constant * factor).to(constant.dtype)
            return output * factor.to(output.dtype)

        return measure

    handles = [
        module.register_forward_hook(hook(path))
        for path, module in model.named_modules()
        if isinstance(module, Scale | _ScaledStd)
    ]
    try:
        with torch.no_grad(), preserved(model):
            silence_noise(model)
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for constant, value in chosen.values():  # after the pass: until then all buffers are kept as they were
        constant.copy_(value)
    return {path: float(value) for path, (_, value) in chosen.items()}


def average_channel_variance(output: Tensor) -> Tensor:
    """mean_c Var_c, biased, with channels in dimension 1 (the last one of a tensor without positions)."""
    dims = [0, *range(2, output.ndim)]
    return output.float().var(dim=dims, correction=0).mean()
