"""Set every constant of a converted model so that its output has unit variance, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nfnets.convert.reference import keep_scales
from nfnets.init.lsuv import channel_moments
from nfnets.layers import Scale, _ScaledStd
from nfnets.scale.one_pass import Call, Rescale, Write, one_pass, transaction
from nfnets.structure.sites import channel_dim


class Calibrated(NamedTuple):
    """What `predict` starts from at a layer whose constant was measured."""

    square: float
    """mean(gain²) when it was: the variance before α is 1 times what it has grown by since."""
    centred: bool
    """Whether its channels were given the mean 0."""


def await_calibration(layer: nn.Module) -> nn.Module:
    """Mark a layer that `calibrate_` is to set; those of an earlier conversion keep their constants."""
    layer.__dict__["calibrated"] = False
    return layer


Size = Callable[[Tensor, int], Tensor]
"""Of an output and the dimension of its channels; of c times the output it must be c² times as much."""

_MOST = 4.0
"""How far a channel's gain may move from the others': a dead channel is not to be filled with what it has left."""
_FEWEST = 16
"""Values of a channel below which its mean and variance are left alone: they would tell of these few samples."""


def calibrate_(
    model: nn.Module,
    *inputs: Any,
    size: Size | None = None,
    most: Mapping[str, float] | None = None,
    keep: Mapping[str, float | None] | None = None,
    channelwise: bool = False,
) -> dict[str, float]:
    """Choose each new constant so that the average channel variance of its layer's output, before α, is 1.

    scale ← scale / sqrt(mean_c Var_c(out / α)). Each output is rescaled as soon as it is seen and passed on, so by
    induction over the execution order one pass leaves every layer at unit variance on these inputs. A layer called
    more than once is set by its first call, and its later ones are rescaled alike; one whose output is constant or
    not finite is left alone.

    `channelwise`, gains and biases then give each channel the mean 0 and the average variance, as BatchNorm would:
    gain_c ← gain_c · r_c, bias_c ← r_c · (bias_c − mean_c(out) / (scale · α)), r_c = sqrt(mean_c' Var_c' / Var_c),
    between 1/4 and 4, where a channel has 16 values or more (the initialization of arXiv 1602.07868, section 3).

    Args:
        model: a converted model, with layers that await calibration.
        *inputs: example inputs.
        size: what is to be 1, of an output and the dimension of its channels; None for the variance.
        most: by path, the largest root mean square that an output may have, α included.
        keep: by path, what `keep_scales` is to keep.
        channelwise: whether gains and biases are set, too.

    Returns:
        The constants that were set, by module path.
    """
    constants = Constants(size, most, channelwise)
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
    """What a pass chooses for layers that await calibration: their constants and, channelwise, gains and biases.

    Args:
        size: what is to be 1, of an output and the dimension of its channels; None for the variance.
        most: by path, the largest root mean square that an output may have, α included.
        channelwise: whether standardized layers' gains and biases are set, too; of these the variance is to be 1.
    """

    def __init__(
        self, size: Size | None = None, most: Mapping[str, float] | None = None, channelwise: bool = False
    ):
        self._size, self._most, self._channelwise = size or average_channel_variance, most or {}, channelwise
        self._constants: dict[str, tuple[Tensor, Tensor]] = {}
        self._others: list[tuple[Tensor, Tensor]] = []
        self._centred: list[nn.Module] = []
        self._changes: dict[str, Callable[[Tensor], Tensor]] = {}

    def rescale(self, call: Call, output: Tensor) -> Tensor | None:
        """The output with what its layer is to have; None if that keeps what it has."""
        layer: Any = call.module
        if not awaits_calibration(layer):
            return None
        if call.index and call.path in self._changes:  # the constant itself is written after the pass
            return self._changes[call.path](output)
        if call.index or output.numel() == 0:
            return None
        # A `Scale` starts at its α: one branch in many ends in a norm layer that no convolution feeds.
        constant, alpha = (
            (layer.value, layer.value) if isinstance(layer, Scale) else (layer.scale, layer.alpha)
        )
        channels = 1 if isinstance(layer, Scale) else channel_dim(layer)
        dim = channels % output.ndim - output.ndim
        moments = _moments(layer, output, dim) if self._channelwise else None
        size = self._size(output, channels) if moments is None else moments[1].mean()
        factor = size.rsqrt() * alpha
        if call.path in self._most:
            square = mean_square(output) if moments is None else size  # its mean goes
            factor = factor.minimum(self._most[call.path] * square.rsqrt())
        if not torch.isfinite(factor):
            return None
        self._constants[call.path] = constant, (constant * factor).to(constant.dtype)
        ratio, shift = factor, None
        if moments is not None:
            mean, variance = moments
            self._centred.append(layer)
            own_parameters = dict(layer.named_parameters(recurse=False))
            gain, bias = own_parameters["gain"], own_parameters["bias"]
            own = (size / variance).sqrt().nan_to_num(1.0, _MOST, 1 / _MOST).clamp(1 / _MOST, _MOST)
            self._others += [
                (gain, gain * own),
                (bias, (bias - mean / (constant * alpha)) * own),
            ]
            shape = (-1,) + (1,) * (-dim - 1)
            ratio, shift = (factor * own).view(shape), -(factor * own * mean).view(shape)

        def change(out: Tensor) -> Tensor:
            wide = out * ratio if shift is None else torch.addcmul(shift, out, ratio)
            return wide.to(out.dtype)

        self._changes[call.path] = change
        return change(output)

    @torch.no_grad()
    def write(self) -> dict[str, float]:
        """Set them, after the pass: until then everything is kept as it was. The constants by module path."""
        for tensor, value in [*self._constants.values(), *self._others]:
            tensor.copy_(value)
        for layer in self._centred:
            _settle(layer, centred=True)
        return {path: float(value) for path, (_, value) in self._constants.items()}


def _moments(layer: nn.Module, output: Tensor, dim: int) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of each channel of a layer that has a gain and a bias to set; None where values are few."""
    settable = isinstance(layer, _ScaledStd) and layer._parameters.get("bias") is not None
    many = output.numel() >= _FEWEST * output.shape[dim]
    return channel_moments(output, dim) if settable and many else None


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
            _settle(layer, centred=False)


def _settle(layer: nn.Module, centred: bool) -> None:
    gain = dict(layer.named_parameters(recurse=False)).get("gain")
    square = 1.0 if gain is None or gain.is_meta else float(gain.detach().double().pow(2).mean())
    layer.__dict__["calibrated"] = Calibrated(square, centred)


def awaits_calibration(module: nn.Module) -> bool:
    """Whether a layer was put in by a conversion that is not finished."""
    return vars(module).get("calibrated") is False and isinstance(module, Scale | _ScaledStd)


def mean_square(output: Tensor, channels: int = 1) -> Tensor:
    """mean(x²), the same whatever the dimension of the channels."""
    return output.float().square().mean()


def average_channel_variance(output: Tensor, channels: int = 1) -> Tensor:
    """mean_c Var_c, biased; `channels` is the dimension that holds them."""
    return channel_moments(output, channels % output.ndim - output.ndim)[1].mean()
