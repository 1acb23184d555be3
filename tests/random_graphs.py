"""Random CNNs for property-based tests: a small, printable spec, the net it stands for, a strategy that draws it.

A failing example prints as `Net(blocks=(Block(...),))`; `build(Net(blocks=(Block(...),)))` is the net again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from hypothesis import strategies as st
from random_modules import (
    ACTIVATIONS,
    Composed,
    Dense,
    Gated,
    Inception,
    Network,
    Raw,
    Readers,
    Residual,
    SharedNorm,
    Shortcut,
    Split,
    Steps,
    Sum,
    Twice,
    activation,
    norm,
    pool,
)
from torch import Tensor, nn

from nfnets.trace import is_batch_norm_like


class Short:
    """Prints only what differs from the defaults."""

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True, repr=False)
class Unit(Short):
    """A convolution with its norm layer and activation."""

    conv: str = "plain"
    order: str = "conv norm act"
    act: str = "relu"
    inplace: bool = False
    functional: bool = False
    width: int = 4
    bias: bool = False
    affine: bool = True
    extra: str = ""


@dataclass(frozen=True, repr=False)
class Block(Short):
    """Units or further blocks, joined in one of many ways."""

    kind: str = "chain"
    parts: tuple[Any, ...] = (Unit(),)
    nest: str = "list"
    shortcut: str = "identity"
    add: str = "branch first"
    act: str = "identity"
    inplace: bool = False
    stride: int = 1


@dataclass(frozen=True, repr=False)
class Net(Short):
    """A whole network."""

    blocks: tuple[Block, ...] = (Block(),)
    stem: Unit = Unit()
    head: str = "linear"
    rank: int = 2
    io: str = "tensor"
    training: bool = True
    trained: bool = False


CONVS = (
    "plain",
    "pointwise",
    "grouped",
    "depthwise",
    "dilated",
    "circular",
    "transposed",
    "transposed grouped",
)
ORDERS = ("conv norm act", "conv norm", "norm act conv", "act conv norm", "conv act", "conv act norm")
EXTRAS = ("", "identity", "se", "shuffle", "dropout", "stochastic depth")
KINDS = ("chain", "residual", "dense", "inception", "sum", "twice", "shared norm", "readers", "raw", "gated")
KINDS += ("split", "max pool", "avg pool", "up")
ADDS = ("branch first", "shortcut first", "in place", "scaled")
SIZES = {1: 16, 2: 8, 3: 4}
BATCH = 4

units = st.builds(
    Unit,
    conv=st.sampled_from(CONVS),
    order=st.sampled_from(ORDERS),
    act=st.sampled_from(list(ACTIVATIONS)),
    inplace=st.booleans(),
    functional=st.booleans(),
    width=st.sampled_from((4, 6, 8)),
    bias=st.booleans(),
    affine=st.sampled_from((True, True, False)),
    extra=st.sampled_from(EXTRAS),
)


def _blocks(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Block]:
    return st.builds(
        Block,
        kind=st.sampled_from((*KINDS, "residual", "residual", "residual")),
        parts=st.lists(parts, min_size=1, max_size=3).map(tuple),
        nest=st.sampled_from(("list", "dict", "deep")),
        shortcut=st.sampled_from(("identity", "projection", "pool")),
        add=st.sampled_from(ADDS),
        act=st.sampled_from(("identity", "relu", "silu", "hardswish")),
        inplace=st.booleans(),
        stride=st.sampled_from((1, 2)),
    )


flat = _blocks(units)
blocks = _blocks(st.one_of(units, units, units, flat))
_all_nets = st.builds(
    Net,
    blocks=st.lists(blocks, min_size=1, max_size=3).map(tuple),
    stem=units,
    head=st.sampled_from(("linear", "hidden", "flatten", "map", "none")),
    rank=st.sampled_from((2, 2, 1, 3)),
    io=st.sampled_from(("tensor", "dict", "tuple", "keyword")),
    training=st.booleans(),
    trained=st.booleans(),
)


@dataclass
class Flow:
    """Channels and size of the tensor that the next module reads."""

    channels: int
    size: int
    rank: int


def build(spec: Net, seed: int = 0) -> nn.Module:
    """The network of a spec; the same for the same seed, whatever the global generator holds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = Flow(3, SIZES[spec.rank], spec.rank)
        stem = _unit(Unit(**{**vars(spec.stem), "conv": _fits_image(spec.stem.conv)}), flow)
        body = nn.Sequential(*(_block(block, flow) for block in spec.blocks))
        net = Network(stem, body, _head(spec.head, flow), spec.io)
        if spec.trained:
            _train(net)
    return net.train(spec.training)


def inputs(spec: Net, seed: int = 0, batch: int = BATCH) -> tuple[Any, ...]:
    """What the network of a spec takes by position."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, 3, *(SIZES[spec.rank],) * spec.rank, generator=generator)
    return ({"image": image},) if spec.io == "dict" else (image,)


def _train(net: nn.Module) -> None:
    """Values such as training leaves: statistics, γ of any sign, biases."""
    for module in net.modules():
        if is_batch_norm_like(module):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 3)
        if is_batch_norm_like(module) and module.weight is not None:
            module.weight.data.normal_(1, 0.5)
            module.bias.data.normal_(0, 0.3)


def _fits_image(conv: str) -> str:
    return "plain" if "grouped" in conv else conv  # three channels make no two groups


def _unit(spec: Unit, flow: Flow, width: int | None = None, stride: int = 1) -> nn.Module:
    before, flow.channels = flow.channels, width or spec.width
    flow.size = -(-flow.size // stride)
    return Steps(spec, before, flow.channels, flow.rank, stride)


def _part(spec: Unit | Block, flow: Flow, width: int | None = None, stride: int = 1) -> nn.Module:
    """A unit, or a block that ends in a unit where a certain width is asked for."""
    if isinstance(spec, Unit):
        return _unit(spec, flow, width, stride)
    kept = Block(**{**vars(spec), "stride": 1})
    block = _block(kept if kept.kind not in ("max pool", "avg pool", "up") else Block(parts=kept.parts), flow)
    if width is None or flow.channels == width:
        return block
    return nn.Sequential(block, _unit(Unit(conv="pointwise"), flow, width))


def _chain(parts: tuple[Any, ...], flow: Flow, last: int | None = None, stride: int = 1) -> list[nn.Module]:
    made = []
    for i, part in enumerate(parts):
        first = isinstance(part, Unit) and i == 0
        width = last if i == len(parts) - 1 else None
        made.append(_part(part, flow, width, stride if first else 1))
    return made


def _parallel(parts: tuple[Any, ...], flow: Flow, width: int | None = None) -> list[nn.Module]:
    """Every part reads the same; afterwards the flow has the channels of all, or `width`."""
    before, made, channels = flow.channels, [], 0
    for part in parts:
        flow.channels = before
        made.append(_part(part, flow, width))
        channels += flow.channels
    flow.channels = width or channels
    return made


def _block(spec: Block, flow: Flow) -> nn.Module:
    before, parts, nest = flow.channels, spec.parts, spec.nest
    halves = flow.size % 2 == 0 and flow.size > 2
    if spec.kind == "residual":
        strided = spec.stride == 2 and spec.shortcut != "identity" and halves and isinstance(parts[0], Unit)
        stride = 2 if strided else 1
        branch = _chain(parts, flow, before if spec.shortcut == "identity" else None, stride)
        shortcut = Shortcut(spec.shortcut, before, flow.channels, flow.rank, stride)
        return Residual(branch, nest, shortcut, spec.add, activation(spec.act, spec.inplace))
    if spec.kind == "dense":
        made, total = [], before
        for part in parts:
            flow.channels = total
            made.append(_part(part, flow))
            total += flow.channels
        flow.channels = total
        return Dense(made, nest)
    if spec.kind == "inception":
        return Inception(_parallel(parts, flow), nest)
    if spec.kind == "sum":
        return Sum(_parallel(parts, flow, before), nest, norm(before, flow.rank))
    if spec.kind == "twice":
        return Twice([_part(part, flow, before) for part in parts], nest)
    if spec.kind == "shared norm":
        return SharedNorm([_part(part, flow, before) for part in parts], nest, norm(before, flow.rank))
    if spec.kind == "readers":
        made = _parallel(parts, flow)
        flow.channels += before
        return Readers(made, nest, norm(before, flow.rank))
    if spec.kind == "gated":
        return Gated(_parallel(parts, flow, 4), nest)
    if spec.kind == "split":
        flow.channels = before // 2
        if flow.channels % 2:  # grouped convolutions need an even number
            flow.channels = before
            return Composed(_chain(parts, flow), nest)
        made = _chain(parts, flow, before // 2)
        flow.channels = before
        return Split(made, nest)
    first = next(part for part in _flattened(parts) if isinstance(part, Unit))
    if spec.kind == "raw":
        flow.channels = first.width
        conv = _convolution_of(first, before, flow)
        return Raw(conv, norm(first.width, flow.rank, first.affine), activation(first.act, first.inplace))
    if spec.kind in ("max pool", "avg pool") and halves:
        flow.size //= 2
        return pool(spec.kind.split()[0].capitalize(), flow.rank)
    if spec.kind == "up" and flow.size <= SIZES[flow.rank] // 2:
        flow.channels, flow.size = first.width, flow.size * 2
        up = getattr(nn, f"ConvTranspose{flow.rank}d")(before, first.width, 2, 2, bias=first.bias)
        return nn.Sequential(
            up, norm(first.width, flow.rank, first.affine), activation(first.act, first.inplace)
        )
    return Composed(_chain(parts, flow), nest)


def _flattened(parts: tuple[Any, ...]) -> list[Unit]:
    return [u for part in parts for u in ([part] if isinstance(part, Unit) else _flattened(part.parts))]


def _convolution_of(spec: Unit, before: int, flow: Flow) -> nn.Module:
    return Steps(
        Unit(conv=spec.conv, order="conv", act="identity", bias=spec.bias), before, spec.width, flow.rank, 1
    ).conv


def _head(kind: str, flow: Flow) -> nn.Module:
    gap = nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    if kind == "linear":
        return nn.Sequential(gap, nn.Linear(flow.channels, 5))
    if kind == "hidden":
        hidden = [nn.Linear(flow.channels, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(inplace=True)]
        return nn.Sequential(gap, *hidden, nn.Linear(8, 5))
    if kind == "flatten":
        return nn.Sequential(nn.Flatten(), nn.Linear(flow.channels * flow.size**flow.rank, 5))
    if kind == "map":
        return getattr(nn, f"Conv{flow.rank}d")(flow.channels, 2, 1)
    return nn.Sequential()


def leaves(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def sensible(spec: Net) -> bool:
    """Whether a norm layer runs, and PyTorch lets the network train: some overwrite what a backward pass needs."""
    with torch.random.fork_rng():
        for mode in {True, spec.training}:
            model = build(spec).train(mode)
            try:
                sum(t.sum() for t in leaves(model(*inputs(spec)))).backward()  # type: ignore[union-attr]
            except RuntimeError as error:
                if "inplace" not in str(error):
                    raise
                return False
    return any(is_batch_norm_like(module) for module in model.modules())


nets = _all_nets.filter(sensible)
