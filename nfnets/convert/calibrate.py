"""Set every constant of a converted model so that its output has unit variance, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.convert.reference import keep_scales
from nfnets.convert.sites import channel_dim
from nfnets.init.lsuv import channel_moments
from nfnets.init.one_pass import Call, Rescale, Write, one_pass, transaction
from nfnets.layers import Scale, _ScaledStd


def await_calibration(layer: nn.Module) -> nn.Module:
    """Mark a layer that `calibrate_` is to set; those of an earlier conversion keep their constants."""
    layer.__dict__["calibrated"] = False
    return layer


Size = Callable[[Tensor, int], Tensor]
"""Of an output and the dimension of its channels; of c times the output it must be c² times as much."""


def calibrate_(
    model: nn.Module,
    *inputs: Any,
    size: Size | None = None,
    most: Mapping[str, float] | None = None,
    keep: Mapping[str, float | None] | None = None,
) -> dict[str, float]:
    """Choose each new constant so that the average channel variance of its layer's output, before α, is 1.

    scale ← scale / sqrt(mean_c Var_c(out / α)). Each output is rescaled as soon as it is seen and passed on, so by
    induction over the execution order one pass leaves every layer at unit variance on these inputs. A layer called
    more than once is set by its first call, and its later ones are rescaled alike; one whose output is constant or
    not finite is left alone.

    Args:
        model: a converted model, with layers that await calibration.
        *inputs: example inputs.
        size: what is to be 1, of an output and the dimension of its channels; None for the variance.
        most: by path, the largest root mean square that an output may have, α included.
        keep: by path, what `keep_scales` is to keep.

    Returns:
        The constants that were set, by module path.
    """
    constants = Constants(size, most)
    wanted = keep or {}
    others = {model.get_submodule(path) for path in wanted}
    if not others and not any(map(awaits_calibration, model.modules())):
        return {}
    with transaction() as write:
        one_pass(
            model,
            *inputs,
            select=lambda module: awaits_calibration(module) or module in others,
            rescale=beside(wanted, constants)(write),
        )
    return constants.write()


class Constants:
    """The constants that a pass chooses: those of layers that await calibration.

    Args:
        size: what is to be 1, of an output and the dimension of its channels; None for the variance.
        most: by path, the largest root mean square that an output may have, α included.
    """

    def __init__(self, size: Size | None = None, most: Mapping[str, float] | None = None):
        self._size, self._most = size or average_channel_variance, most or {}
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}
        self._factors: dict[str, Tensor] = {}

    def rescale(self, call: Call, output: Tensor) -> Tensor | None:
        """The output with the constant that its layer is to have; None if it keeps the one it has."""
        layer: Any = call.module
        if not awaits_calibration(layer):
            return None
        if call.index and call.path in self._factors:  # the constant itself is written after the pass
            return output * self._factors[call.path].to(output.dtype)
        if call.index or output.numel() == 0:
            return None
        # A `Scale` starts at its α: one branch in many ends in a norm layer that no convolution feeds.
        constant, alpha = (
            (layer.value, layer.value) if isinstance(layer, Scale) else (layer.scale, layer.alpha)
        )
        channels = 1 if isinstance(layer, Scale) else channel_dim(layer)
        factor = self._size(output, channels).rsqrt() * alpha
        if call.path in self._most:
            factor = factor.minimum(self._most[call.path] * mean_square(output).rsqrt())
        if not torch.isfinite(factor):
            return None
        self._factors[call.path] = factor
        self._chosen[call.path] = constant, (constant * factor).to(constant.dtype)
        return output * factor.to(output.dtype)

    def write(self) -> dict[str, float]:
        """Set them, after the pass: until then all buffers are kept as they were. By module path."""
        for constant, value in self._chosen.values():
            constant.copy_(value)
        return {path: float(value) for path, (_, value) in self._chosen.items()}


def beside(wanted: Mapping[str, float | None], constants: Constants) -> Callable[[Write], Rescale]:
    """Both at once, for `one_pass` or `lsuv_`: `keep_scales`, then constants.

    Args:
        wanted: what `keep_scales` is to keep.
        constants: of the layers that await calibration; to be written after the pass.
    """

    def both(write: Write) -> Rescale:
        keep = keep_scales(wanted, write)

        def rescale(call: Call) -> Tensor | None:
            kept = keep(call)
            scaled = constants.rescale(call, call.output if kept is None else kept)
            return kept if scaled is None else scaled

        return rescale

    return both


def settle(model: nn.Module) -> None:
    """Nothing awaits calibration any more: constants are measured, or come with a `state_dict`."""
    for layer in model.modules():
        if awaits_calibration(layer):
            layer.__dict__["calibrated"] = True  # `predict` starts anew from here


def awaits_calibration(module: nn.Module) -> bool:
    """Whether a layer was put in by a conversion that is not finished."""
    return vars(module).get("calibrated") is False and isinstance(module, Scale | _ScaledStd)


def mean_square(output: Tensor, channels: int = 1) -> Tensor:
    """mean(x²), the same whatever the dimension of the channels."""
    return output.float().square().mean()


def average_channel_variance(output: Tensor, channels: int = 1) -> Tensor:
    """mean_c Var_c, biased; `channels` is the dimension that holds them."""
    return channel_moments(output, channels % output.ndim - output.ndim)[1].mean()
