"""Layers that are run with a weight and bias computed from what they learn; remembered where nothing learns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, NamedTuple, Self

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.functional import pad_same
from nfnets.snapshot import Snapshot
from nfnets.whose import runs_torchs_code

# It branches on shapes, so torch.fx records a call and does not look inside.
torch.fx.wrap("pad_same")

PLAIN_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Torch's convolutions and linear: what can get a computed weight."""


class Remembered(NamedTuple):
    """What a layer was run with, and what that was made of."""

    snapshot: Snapshot
    settings: Hashable
    weight: Tensor
    bias: Tensor | None
    for_steps: bool  # while something learns, too

    def holds(self, layer: Computed) -> bool:
        """Whether it is what the layer would compute now."""
        made_of = layer.made_of()
        return made_of is not None and self.settings == layer.settings() and self.snapshot.holds(made_of)


class Computed(nn.Module):
    """What layers with a computed weight share: it is computed at every call, and each layer says how.

    At evaluation without gradients, on a CPU, it is computed once and reused until one of the tensors that it is made
    of changes, by whatever means (`nfnets.snapshot`); in training as well, where it is asked for
    (`nfnets.accumulating`).
    """

    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    unit_dim = 0
    arguments: tuple[str, ...] = ()  # constructor arguments that torch's layer keeps as attributes
    sources: tuple[
        str, ...
    ] = ()  # parameters and buffers that weight and bias are computed from, besides these two
    _remembered: Remembered | None = None

    @property
    def units(self) -> int:
        """Output channels or features: one gain each."""
        return self.weight.shape[1] * self.groups if self.unit_dim else self.weight.shape[0]

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """What the layer is run with."""

    @abstractmethod
    def effective_bias(self) -> Tensor | None:
        """What the layer adds."""

    def computed(self) -> tuple[Tensor, Tensor | None]:
        """Both, computed now."""
        return self.effective_weight(), self.effective_bias()

    def bias_learns(self) -> bool:
        """Whether something that the bias alone is made of learns."""
        return self.bias is not None and self.bias.requires_grad

    def settings(self) -> Hashable:
        """What else the result depends on, besides tensors."""
        return None

    def effective(self, input: Any = None) -> tuple[Tensor, Tensor | None]:
        """Effective weight and bias, those remembered where they still hold. Not to be written to."""
        kept = self._remembered
        learning = self.training or torch.is_grad_enabled()
        if learning and (kept is None or not kept.for_steps):
            if kept is not None:
                self._remembered = None
            return self.computed()
        # A compiler, exporter or tracer must see the computation, not its result.
        seen = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if seen or isinstance(input, torch.fx.Proxy):
            return self.computed()
        if kept is not None and kept.holds(self):
            return kept.weight, kept.bias
        if learning:
            return self.computed()
        snapshot = self.snapshot()
        weight, bias = self.computed()
        if snapshot is not None:
            self.remember(snapshot, weight, bias)
        return weight, bias

    def made_of(self) -> list[Tensor | None] | None:
        """Tensors that weight and bias are computed from; None where one of them is computed, too."""
        # Out of the dictionaries: five attributes of a module take longer than everything else here.
        own, constants = self._parameters, self._buffers
        try:
            found = [own["weight"], own["bias"]]
            return found + [own[name] if name in own else constants[name] for name in self.sources]
        except KeyError:  # a parametrization for example
            return None

    def snapshot(self) -> Snapshot | None:
        """Of what weight and bias are computed from: to be taken before, lest a write meanwhile go unseen.

        None where a change could not be told, or where they are no function of parameters alone (a functional call).
        """
        made_of = self.made_of()
        plain = made_of is not None and type(made_of[0]) is nn.Parameter
        return Snapshot.take(made_of) if plain else None  # type: ignore[arg-type]

    def remember(
        self, snapshot: Snapshot, weight: Tensor, bias: Tensor | None, for_steps: bool = False
    ) -> Remembered:
        """Run with these until what they were computed from changes."""
        self._remembered = Remembered(snapshot, self.settings(), weight, bias, for_steps)
        return self._remembered

    def remembers_for_steps(self) -> bool:
        """Whether it runs with the same in training, too."""
        return self._remembered is not None and self._remembered.for_steps

    def train(self, mode: bool = True) -> Self:
        self._remembered = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_remembered"}

    @classmethod
    def arguments_of(cls, layer: nn.Module) -> dict[str, Any]:
        """What a twin of a plain layer is made with, but its bias."""
        kept = {name: getattr(layer, name) for name in cls.arguments}
        return kept | {"padding": "tf_same"} if pads_like_tensorflow(layer) else kept


CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


class PaddedConv(nn.modules.conv._ConvNd):
    """Torch's convolutions with `padding="tf_same"` beside "same" and "valid"."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        *args: Any,
        **kwargs: Any,
    ):
        known: Any = 0 if padding == "tf_same" else padding
        super().__init__(in_channels, out_channels, kernel_size, stride, known, *args, **kwargs)
        if padding == "tf_same":
            self.padding = "tf_same"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding != "tf_same":
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        input = pad_same(input, self.kernel_size, self.stride, self.dilation, self.padding_mode)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(input, weight, bias, self.stride, 0, self.dilation, self.groups)  # type: ignore[arg-type]


class SamePadConv1d(PaddedConv, nn.Conv1d):
    """`nn.Conv1d` that also takes `padding="tf_same"`."""


class SamePadConv2d(PaddedConv, nn.Conv2d):
    """`nn.Conv2d` that also takes `padding="tf_same"`, like timm's `Conv2dSame`."""


class SamePadConv3d(PaddedConv, nn.Conv3d):
    """`nn.Conv3d` that also takes `padding="tf_same"`."""


class ComputedConv(Computed, PaddedConv):
    arguments = CONV

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.effective(input))


class ComputedLinear(Computed):
    arguments = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.effective(input))


class ComputedConvTranspose(Computed):
    """The unit is the OUTPUT channel: dimension 1 of (in, out/groups, k…), within its group."""

    unit_dim = 1
    arguments = (*CONV, "output_padding")

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        rank = int(plain_base(type(self)).__name__[-2])
        padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        weight, bias = self.effective(input)
        return convolve(input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)  # type: ignore[arg-type]


def plain_base(computed: type[nn.Module]) -> type[nn.Module]:
    """Torch's class that a class of layers with a computed weight derives from."""
    return next(plain for plain in PLAIN_LAYERS if issubclass(computed, plain))


def plain_class(layer: nn.Module) -> type[nn.Module] | None:
    """The plain class that a layer with a computed weight can become, or None for any other layer."""
    if not isinstance(layer, Computed):
        return None
    if layer.__dict__.get("padding") == "tf_same":
        return (SamePadConv1d, SamePadConv2d, SamePadConv3d)[layer.weight.ndim - 3]
    return plain_base(type(layer))


def runs_as_plain(layer: nn.Module) -> type[nn.Module] | None:
    """Torch's convolution or linear that a layer runs as, or None: another module, or a forward pass of its own, which
    a twin would not run (timm's `Conv2dSame`, whose padding is known here, is the exception)."""
    plain = next((plain for plain in PLAIN_LAYERS if isinstance(layer, plain)), None)
    return plain if runs_torchs_code(layer) or pads_like_tensorflow(layer) else None


def has_own_weight(layer: nn.Module | None) -> bool:
    """Whether a layer is a convolution or linear that runs as torch's and whose weight is a parameter.

    Not so: subclasses with a forward of their own, and weights that are computed (parametrizations, weight norm).
    """
    if layer is None or runs_as_plain(layer) is None:
        return False
    own = layer._parameters
    return own.get("weight") is not None and isinstance(own.get("bias", 0), Tensor | None)


def pads_like_tensorflow(layer: nn.Module) -> bool:
    """Whether a layer is timm's `Conv2dSame`."""
    if "forward" in vars(layer):
        return False
    # Known by name: importing timm takes seconds, and who has such a layer has imported it.
    return (type(layer).__module__, type(layer).__name__) == ("timm.layers.conv2d_same", "Conv2dSame")
