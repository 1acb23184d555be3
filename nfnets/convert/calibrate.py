"""Set every constant of a converted model so that its output has unit variance, in one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nfnets.init.one_pass import Call, one_pass
from nfnets.layers import Scale, _ScaledStd


def calibrate_(model: nn.Module, *inputs: Any) -> dict[str, float]:
    """Choose each constant so that the average channel variance of its layer's output, before α, is 1.

    scale ← scale / sqrt(mean_c Var_c(out / α)). Each output is rescaled as soon as it is seen and passed on, so by
    induction over the execution order one pass leaves every layer at unit variance on these inputs. A layer called
    more than once is set by its first call; one whose output is constant or not finite is left alone.

    Args:
        model: a converted model.
        *inputs: example inputs; on `meta` there is nothing to measure and nothing is changed.

    Returns:
        The constants that were set, by module path.
    """
    if any(t.is_meta for t in [*model.parameters(), *tree_leaves(inputs)] if isinstance(t, Tensor)):
        return {}
    chosen: dict[str, tuple[Tensor, Tensor]] = {}

    def rescale(call: Call) -> Tensor | None:
        layer: Any = call.module
        if call.index or call.output.numel() == 0:
            return None
        # A `Scale` starts at its α: one branch in many ends in a norm layer that no convolution feeds.
        constant, alpha = (
            (layer.value, layer.value) if isinstance(layer, Scale) else (layer.scale, layer.alpha)
        )
        factor = average_channel_variance(call.output / alpha).rsqrt()
        if not torch.isfinite(factor):
            return None
        chosen[call.path] = constant, (constant * factor).to(constant.dtype)
        return call.output * factor.to(call.output.dtype)

    one_pass(model, *inputs, select=lambda module: isinstance(module, Scale | _ScaledStd), rescale=rescale)
    for constant, value in chosen.values():  # after the pass: until then all buffers are kept as they were
        constant.copy_(value)
    return {path: float(value) for path, (_, value) in chosen.items()}


def average_channel_variance(output: Tensor) -> Tensor:
    """mean_c Var_c, biased, with channels in dimension 1."""
    return output.float().var(dim=[0, *range(2, output.ndim)], correction=0).mean()
