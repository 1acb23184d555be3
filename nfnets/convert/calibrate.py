"""Set every constant of a converted model so that its output has unit variance, in one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nfnets.layers import Scale, _ScaledStd
from nfnets.trace import preserved


def calibrate_(model: nn.Module, *inputs: Any) -> dict[str, float]:
    """Choose each `scale` so that the average channel variance of its layer's output, before α, is 1.

    scale ← 1 / sqrt(mean_c Var_c(out)). Each layer's hook rescales the output it just saw and passes it on, so by
    induction over the execution order one pass leaves every layer at unit variance on these inputs.

    Args:
        model: a converted model.
        *inputs: example inputs; if they or the model are on `meta`, nothing is measured.

    Returns:
        The constants by module path.
    """
    chosen: dict[str, float] = {}
    done: set[nn.Module] = set()

    def hook(path: str) -> Any:
        def measure(module: Any, args: Any, output: Tensor) -> Tensor:
            if module in done or output.is_meta:
                return output
            done.add(module)
            constant: Tensor = module.value if isinstance(module, Scale) else module.scale
            alpha = constant.clone() if isinstance(module, Scale) else module.alpha
            dims = (
                [0, *range(2, output.ndim)] if output.ndim != 3 or isinstance(module, nn.Conv1d) else [0, 1]
            )
            variance = (output / alpha).float().var(dim=dims, correction=0).mean().double()
            factor = variance.rsqrt()
            if not torch.isfinite(factor):
                return output
            constant.mul_(factor)
            chosen[path] = float(constant)
            return output * factor.to(output.dtype)

        return measure

    handles = [
        module.register_forward_hook(hook(path))
        for path, module in model.named_modules()
        if isinstance(module, Scale | _ScaledStd)
    ]
    try:
        with torch.no_grad(), _kept_buffers(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return chosen


def _kept_buffers(model: nn.Module) -> Any:
    return preserved(model)
