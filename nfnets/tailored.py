"""Activations with four constants: what DKS and TAT put in place of a network's own."""

from __future__ import annotations

import math

from torch import Tensor, nn

from nfnets.errors import UserError


class TailoredActivation(nn.Module):
    """y = output_scale · (φ(input_scale · x + input_shift) + output_shift), constants that do not learn.

    Computed in at least fp32: where the constants nearly cancel, half precision would leave nothing.

    Args:
        activation: φ, element by element.
        input_scale, input_shift, output_shift, output_scale: finite numbers.

    Raises:
        UserError: no module, or a constant that is no finite number.

    Example:
        >>> import torch
        >>> print(TailoredActivation(nn.LeakyReLU(0.5), output_scale=1.25))
        TailoredActivation(
          output_scale=1.25
          (activation): LeakyReLU(negative_slope=0.5)
        )
        >>> TailoredActivation(nn.ReLU(), 2.0, 1.0, -1.0, 0.5)(torch.tensor([-1.0, 1.0]))
        tensor([-0.5000,  1.0000])

    Paper: arXiv 2110.01765 (DKS), 2203.08120 (TAT). Checked against PyPI `dks` 0.1.2.
    """

    def __init__(
        self,
        activation: nn.Module,
        input_scale: float = 1.0,
        input_shift: float = 0.0,
        output_shift: float = 0.0,
        output_scale: float = 1.0,
    ):
        super().__init__()
        if not isinstance(activation, nn.Module):
            raise UserError(
                f"activation of type {type(activation).__name__}: expected a module; pass nn.Tanh()"
            )
        constants = (input_scale, input_shift, output_shift, output_scale)
        if not all(isinstance(c, int | float) and math.isfinite(c) for c in constants):
            raise UserError(f"constants {constants}: expected four finite numbers")
        if getattr(activation, "inplace", False):
            activation.inplace = False  # type: ignore[assignment]
        self.activation = activation
        self.input_scale, self.input_shift = float(input_scale), float(input_shift)
        self.output_shift, self.output_scale = float(output_shift), float(output_scale)

    def forward(self, input: Tensor) -> Tensor:
        x = input.float() if input.dtype.itemsize < 4 else input
        if (self.input_scale, self.input_shift) != (1.0, 0.0):
            x = x * self.input_scale + self.input_shift
        x = self.activation(x)
        if self.output_shift != 0.0:
            x = x + self.output_shift
        return (x * self.output_scale).to(input.dtype)

    def extra_repr(self) -> str:
        named = {
            name: getattr(self, name)
            for name in ("input_scale", "input_shift", "output_shift", "output_scale")
        }
        neutral = {"input_scale": 1.0, "input_shift": 0.0, "output_shift": 0.0}
        return ", ".join(f"{n}={v:.6g}" for n, v in named.items() if v != neutral.get(n))
