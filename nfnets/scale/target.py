"""Statements about what a layer puts out; `set_scales` makes them hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nfnets.errors import UserError

Statistic = Literal["channel variance", "variance", "mean square"]
By = Literal["weight", "constant"]


@dataclass(frozen=True, slots=True)
class Target:
    """How large a layer's output is to be: √statistic = `value`.

    Args:
        value: the square root of the statistic: a standard deviation or a root mean square, above 0.
        statistic: `"channel variance"`, mean_c Var_c, what a norm layer makes 1; `"variance"` of the whole output, as
            `torch.var` takes it; `"mean square"`, about 0.
        at_most: largest root mean square that the output may have; a value that needs more is lowered to it.
        unless: factors of `value`, below and above: between them the output stays as it is. (0.5, 2) keeps a layer
            within a factor 2, (0, 2) does so from above only.
        channels: None sets the layer as a whole. A number gives every channel the mean 0 and the same variance, too,
            but moves no channel further than by this factor from the layer's; `math.inf` for any factor.
        by: what is multiplied: `"weight"`, the weight, or a standardized layer's gain; `"constant"`, the constant of a
            standardized layer or of a `Scale`, and with `channels` its gain and bias.
        search: find the multiple of the weight by running the layer again, where its output need not follow its weight
            (a max-norm, as a parametrization or in the forward); otherwise such a layer is left.
        required: whether a layer whose output does not follow its weight is to be refused, by who asked, not left.

    Raises:
        UserError: a value that is not a finite number above 0.

    Example:
        >>> Target(0.5, at_most=2.0).statistic
        'channel variance'
    """

    value: float = 1.0
    statistic: Statistic = "channel variance"
    at_most: float = math.inf
    unless: tuple[float, float] = (1.0, 1.0)
    channels: float | None = None
    by: By = "weight"
    search: bool = False
    required: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (("statistic", get_args(Statistic)), ("by", get_args(By))):
            if getattr(self, name) not in kinds:
                raise UserError(
                    f"a target with {name}={getattr(self, name)!r}: expected one of {', '.join(kinds)}"
                )
        limit = self.channels
        if limit is not None and (isinstance(limit, bool) or not limit >= 1):
            raise UserError(
                f"a target with channels={limit!r}: expected None or a number from 1 up; pass math.inf"
            )
        if not 0 < self.value < math.inf:
            raise UserError(f"a target of {self.value}: expected a finite number above 0; pass value=1.0")


class Spread(NamedTuple):
    """Moments of an output per channel, biased, in at least fp32."""

    mean: Tensor
    var: Tensor
    values: int
    """Values in all."""


def channel_moments(output: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, accumulated in at least fp32.

    Two plain reductions over centered values: torch's var_mean is ten times slower on a CPU.

    Args:
        output: any shape.
        channel_dim: the dimension of the channels, counted from the end.

    Example:
        >>> [moment.round().tolist() for moment in channel_moments(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), -1)]
        [[2.0, 2.0], [1.0, 0.0]]
    """
    x = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    dim = x.ndim + channel_dim
    others = tuple(d for d in range(x.ndim) if d != dim)
    if not others:
        return x, torch.zeros_like(x)
    mean = x.mean(others, keepdim=True)
    rest = x - mean
    squares = torch.linalg.vector_norm(rest, dim=others[1:]).square().sum(0) if others[1:] else None
    if squares is None:
        squares = torch.linalg.vector_norm(rest, dim=others).square()
    return mean.flatten(), squares / (x.numel() // x.shape[dim])


def spread_of(output: Tensor, channel_dim: int) -> Spread:
    """Moments per channel; `channel_dim` counts from the end."""
    return Spread(*channel_moments(output, channel_dim), output.numel())


def form(statistic: Statistic, spread: Spread, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The statistic of z + b as a quadratic form: S(c·z + b) = c²·S(z, z) + 2c·S(z, b) + S(b, b).

    Args:
        statistic: which.
        spread: of z + b.
        rest: b per channel, or one 0: what a layer adds to each channel whatever its weight.

    Returns:
        S(z, z), S(z, b) and S(b, b).

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> [float(part) for part in form("mean square", spread_of(x, -1), torch.tensor([0.0, 1.0]))]
        [3.0, 0.5, 0.5]
    """
    mean = spread.mean - rest
    if statistic == "channel variance":
        none = mean.new_zeros(())
        return spread.var.mean(), none, none
    if statistic == "mean square":
        return spread.var.mean() + mean.square().mean(), (mean * rest).mean(), rest.square().mean()
    unbiased = spread.values / max(1, spread.values - 1)
    centered, offset = mean - mean.mean(), rest - rest.mean()
    return (
        (spread.var.mean() + centered.square().mean()) * unbiased,
        (centered * offset).mean() * unbiased,
        offset.square().mean() * unbiased,
    )
