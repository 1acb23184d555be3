"""How far the bounded functions of pointwise layers (`dyt`, `derf`) saturate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nfnets.given import check_module
from nfnets.nested import tensors_in
from nfnets.pointwise import DynamicErf, DynamicTanh
from nfnets.trace import trace

SATURATED = 0.1
"""Share of the slope at 0 below which a value counts as saturated."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """One call of a pointwise layer.

    Args:
        path: of the layer.
        alpha: its α.
        rms: root mean square of α · x (+ s), what the function is applied to.
        slope: mean slope there, relative to the one at 0: 1 is a linear layer, 0 one that passes no gradient.
        saturated: share of values whose slope is below a tenth of that at 0 (|tanh| above 0.95).
    """

    path: str
    alpha: float
    rms: float
    slope: float
    saturated: float

    def __str__(self) -> str:
        measured = f"rms {self.rms:.3g}, slope {self.slope:.2f}, saturated {self.saturated:.1%}"
        return f"{self.path}: α {self.alpha:.3g}, {measured}"


def saturation(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[Saturation]:
    """How far each pointwise layer saturates on some inputs, call by call in execution order.

    Args:
        model: left as it was; run in the mode it is in.
        *inputs: what its forward takes.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Saturation` for every call of a `DynamicTanh` or `DynamicErf`; none if there is none.

    Raises:
        UserError: the model rejects the inputs.

    Example:
        >>> from nfnets.layers import DynamicTanh
        >>> print(*saturation(nn.Sequential(DynamicTanh(2, alpha=1.0)), torch.tensor([[0.0, 4.0]])))
        0: α 1, rms 2.83, slope 0.50, saturated 50.0%
    """
    check_module(model)
    found: list[Saturation] = []
    handles = []

    def note(path: str, layer: Any, *given: Any) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            (x,) = tensors_in(given)
            argument = layer.argument(x.detach().double())
            slope = layer.slope(argument)
            found.append(
                Saturation(
                    path,
                    float(layer.alpha.detach()),
                    float(argument.square().mean().sqrt()),
                    float(slope.mean()),
                    float((slope < SATURATED).double().mean()),
                )
            )

    for path, layer in model.named_modules():
        if isinstance(layer, DynamicTanh | DynamicErf):
            handles.append(layer.register_forward_pre_hook(partial(note, path), with_kwargs=True))
    try:
        trace(model, *inputs, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
