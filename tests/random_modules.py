"""The modules that random graphs are made of: ordinary `nn.Module` code, as users write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "identity": nn.Identity,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "elu": nn.ELU,
    "leaky": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": nn.Hardtanh,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "logsigmoid": nn.LogSigmoid,
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky": F.leaky_relu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "selu": F.selu,
    "celu": F.celu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
}
OVERWRITES = {"relu", "relu6", "silu", "hardswish", "elu", "leaky", "mish"}
OVERWRITES |= {"hardsigmoid", "hardtanh", "selu", "celu"}
# Both spellings that users have, the underscore and the flag; sigmoid and tanh have the first alone.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    name: partial(FUNCTIONS[name], inplace=True) for name in sorted(OVERWRITES)
} | {
    "relu": torch.relu_,
    "selu": torch.selu_,
    "leaky": F.leaky_relu_,
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}


def activation(name: str, inplace: bool = False) -> nn.Module:
    kind = ACTIVATIONS[name]
    return kind(inplace=True) if inplace and name in OVERWRITES else kind()


def convolution(kind: str, before: int, width: int, rank: int, bias: bool, stride: int = 1) -> nn.Module:
    """One that keeps the size of its input at stride 1 and halves it at stride 2."""
    plain, transposed = getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")
    if kind == "pointwise":
        return plain(before, width, 1, stride, bias=bias)
    if kind == "grouped":
        return plain(before, width, 3, stride, 1, groups=2, bias=bias)
    if kind == "depthwise" and width % before == 0:
        return plain(before, width, 3, stride, 1, groups=before, bias=bias)
    if kind == "dilated":
        return plain(before, width, 3, stride, 2, dilation=2, bias=bias)
    if kind == "circular":
        return plain(before, width, 3, stride, 1, padding_mode="circular", bias=bias)
    if kind.startswith("transposed") and stride == 1:
        return transposed(before, width, 3, 1, 1, groups=2 if kind == "transposed grouped" else 1, bias=bias)
    return plain(before, width, 3, stride, 1, bias=bias)


def norm(channels: int, rank: int, affine: bool = True) -> nn.Module:
    return getattr(nn, f"BatchNorm{rank}d")(channels, affine=affine)


def pool(kind: str, rank: int, **options: Any) -> nn.Module:
    return getattr(nn, f"{kind}Pool{rank}d")(2, 2, **options)


class Gate(nn.Module):
    """Squeeze and excitation for any number of dimensions."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(x.flatten(2).mean(2)))).sigmoid()
        return x * gate.reshape(gate.shape + (1,) * (x.ndim - 2))


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def extra(kind: str, channels: int) -> nn.Module:
    return {
        "": lambda: nn.Sequential(),
        "identity": nn.Identity,
        "se": lambda: Gate(channels),
        "shuffle": Shuffle,
        "dropout": lambda: nn.Dropout(0.3),
        "stochastic depth": lambda: StochasticDepth(0.3, "row"),
    }[kind]()


class Steps(nn.Module):
    """Convolution, norm layer and activation in the order of a spec."""

    def __init__(self, spec: Any, before: int, width: int, rank: int, stride: int):
        super().__init__()
        self.order = spec.order.split()
        first = self.order.index("norm") < self.order.index("conv") if "norm" in self.order else False
        self.conv = convolution(spec.conv, before, width, rank, spec.bias, stride)
        if "norm" in self.order:
            self.norm = norm(before if first else width, rank, spec.affine)
        self.plain = FUNCTIONS.get(spec.act) if spec.functional else None
        called = IN_PLACE.get(spec.act, self.plain) if spec.inplace else self.plain
        self.act = activation(spec.act, spec.inplace) if self.plain is None else called
        self.extra = extra(spec.extra, width)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.order:
            x = getattr(self, step)(x)
        return self.extra(x)


class Shortcut(nn.Sequential):
    """What stands on a residual block's other side; nothing for an identity."""

    def __init__(self, kind: str, before: int, width: int, rank: int, stride: int):
        super().__init__()
        if kind == "pool" and stride == 2:
            self.pool = pool("Avg", rank)
            stride = 1
        if kind != "identity":
            self.conv = convolution("pointwise", before, width, rank, False, stride)
            self.norm = norm(width, rank)


class Composed(nn.Module):
    """Parts in some kind of container; subclasses say how they are joined."""

    def __init__(self, parts: Iterable[nn.Module], nest: str):
        super().__init__()
        parts = list(parts)
        if nest == "dict":
            self.parts: Any = nn.ModuleDict({f"part{i}": part for i, part in enumerate(parts)})
        elif nest == "deep":
            self.parts = nn.ModuleList(nn.ModuleList([part]) for part in parts)
        else:
            self.parts = nn.ModuleList(parts)
        self.nest = nest

    def each(self) -> list[Callable[[Tensor], Tensor]]:
        if self.nest == "dict":
            return list(self.parts.values())
        return [part[0] for part in self.parts] if self.nest == "deep" else list(self.parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.each():
            x = part(x)
        return x


class Residual(Composed):
    """The branch added to a shortcut, in place or not, from either side."""

    def __init__(self, parts: Iterable[nn.Module], nest: str, shortcut: Shortcut, add: str, act: nn.Module):
        super().__init__(parts, nest)
        self.shortcut, self.add, self.act = shortcut, add, act

    def forward(self, x: Tensor) -> Tensor:
        if self.add == "in place":
            y = super().forward(x)
            y += self.shortcut(x)
        elif self.add == "shortcut first":
            y = self.shortcut(x)
            y = y + super().forward(x)
        elif self.add == "scaled":
            y = self.shortcut(x) + 0.5 * super().forward(x)
        else:
            y = super().forward(x) + self.shortcut(x)
        return self.act(y)


class Dense(Composed):
    def forward(self, x: Tensor) -> Tensor:
        for part in self.each():
            x = torch.cat([x, part(x)], 1)
        return x


class Inception(Composed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.each()], 1)


class Sum(Composed):
    """Parallel paths, as RepVGG's; a norm layer alone is one of them."""

    def __init__(self, parts: Iterable[nn.Module], nest: str, norm: nn.Module):
        super().__init__(parts, nest)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        total = self.norm(x)
        for part in self.each():
            total = total + part(x)
        return total


class Twice(Composed):
    """Every part runs twice; the second time under another name of the same module."""

    def __init__(self, parts: Iterable[nn.Module], nest: str):
        super().__init__(parts, nest)
        self.again = nn.ModuleList(self.each())  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for part, same in zip(self.each(), self.again, strict=True):
            x = same(part(x))
        return x


class SharedNorm(Composed):
    """One norm layer reads every part."""

    def __init__(self, parts: Iterable[nn.Module], nest: str, norm: nn.Module):
        super().__init__(parts, nest)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        for part in self.each():
            x = self.norm(part(x))
        return x


class Readers(Composed):
    """Every part reads what a norm layer returns, and so does the sum."""

    def __init__(self, parts: Iterable[nn.Module], nest: str, norm: nn.Module):
        super().__init__(parts, nest)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([part(y) for part in self.each()] + [y], 1)


class Raw(nn.Module):
    """What a convolution returns is read by a norm layer and by a sum."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module):
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.act(self.norm(y))


class Gated(Composed):
    """The first part times the sigmoid of the others."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.each()
        y = first(x)
        for other in others:
            y = y * torch.sigmoid(other(x))
        return y


class Split(Composed):
    """Half of the channels pass, the other half goes through the parts; then both are shuffled (ShuffleNet)."""

    def __init__(self, parts: Iterable[nn.Module], nest: str):
        super().__init__(parts, nest)
        self.shuffle = Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        passed, changed = x.chunk(2, 1)
        return self.shuffle(torch.cat([passed, super().forward(changed)], 1))


class Network(nn.Module):
    """Stem, blocks, head; a tensor, a dict or a tuple out."""

    def __init__(self, stem: nn.Module, blocks: nn.Module, head: nn.Module, io: str):
        super().__init__()
        self.stem, self.blocks, self.head, self.io = stem, blocks, head, io

    def forward(self, x: Any) -> Any:
        image = x["image"] if isinstance(x, dict) else x
        first = self.stem(image)
        features = self.blocks(first)
        out = self.head(features)
        if self.io == "dict":
            return {"out": out, "more": [first.flatten(1).amax(1, keepdim=True)]}
        return (out, features) if self.io == "tuple" else out
