"""Rules that find the one layer that is unlike its peers, or whose units are no good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from nfnets.signal.measured import Point
from nfnets.signal.rules.places import finite
from nfnets.signal.rules.rule import Broken, Rule

# A rule of initialization is recognized where all layers but one follow it this closely, and a quarter as far (in the
# logarithm) as the one is off.
AGREE, OFF = 1.2, 1.4
# Layers that must agree, and the weights that a layer must have for its size to tell.
LAYERS, WEIGHTS = 4, 64
# Variance at a branch's end over the median of its peers, and what those keep within (convolutions and attention in one
# net differ by a hundred).
BRANCH, BRANCH_AGREE = 10.0, 3.0
# Share of the stream below which a branch is not compared: in an NFNet whose branches start at zero it is 5e-7 when the
# first leaves it, before its peers. Attention that was initialized by deviation 0.02 has 6e-5.
STARTING = 1e-5
# Fraction of constant units after an activation, and the values a channel that it takes to judge.
DEAD, DEAD_COUNT, FEW_COUNT = 0.5, 32, 16
# Mean over rows of the largest attention weight, where a row has 8 or more. Variance of logits that nothing scales:
# queries and keys of unit variance leave 1 where they are scaled, and as much as a head is wide where they are not.
PEAK, LOGITS = 0.5, 1.0


def _odd(points: Sequence[Point]) -> Broken:
    """The one layer whose weights are off the rule that all others follow.

    size = rms(W) · √f        f one of 1, fan_in, fan_out, fan_in + fan_out
    """
    for group in _groups(points):
        for sizes in _conventions(group):
            if found := _outlier(sizes):
                index, factor = found
                yield group[index], factor, OFF if factor > 1 else 1 / OFF
                break
            if _agree(sizes):
                break


def _groups(points: Sequence[Point]) -> list[list[Point]]:
    """Layers that one rule of initialization is written for; the first and the last often have their own."""
    out: dict[tuple[object, ...], list[Point]] = {}
    weighted = [p for p in points if p.weight_norm and finite(p.weight_norm) and p.call == 0]
    deep = max((p.depth for p in weighted), default=0)
    for p in weighted:
        if p.role == "head" or (len(p.weight_shape) > 1 and (p.depth == 1 or p.depth == deep)):
            continue
        if len(p.weight_shape) > 1 and math.prod(p.weight_shape) < WEIGHTS:
            continue
        kind = (p.kind, p.gain is not None, p.role == "branch_end", len(p.weight_shape) > 1)
        out.setdefault(kind, []).append(p)
    return [group for group in out.values() if len(group) > LAYERS]


def _conventions(group: Sequence[Point]) -> list[list[float]]:
    if group[0].gain is not None:
        return [[p.gain or 0.0 for p in group]]
    rms = [(p.weight_norm or 0.0) / math.sqrt(math.prod(p.weight_shape)) for p in group]
    if len(group[0].weight_shape) < 2:
        return [rms]
    fans = [_fans(p) for p in group]
    roots = (
        [1.0 for _ in fans],
        [i for i, _, _ in fans],
        [o for _, o, _ in fans],
        [i + o for i, o, _ in fans],
        [o * g for _, o, g in fans],
    )
    return [[r * math.sqrt(f) for r, f in zip(rms, root, strict=True)] for root in roots]


def _fans(p: Point) -> tuple[float, float, float]:
    """Weights into an output, out of an input, and the groups that torch's fan_out leaves out of account."""
    groups = p.groups or 1
    return math.prod(p.weight_shape[1:]), p.weight_shape[0] * math.prod(p.weight_shape[2:]) / groups, groups


def _agree(sizes: Sequence[float], within: float = AGREE) -> bool:
    middle = median(sizes)
    return all(middle / within < s < middle * within for s in sizes)


def _outlier(sizes: Sequence[float]) -> tuple[int, float] | None:
    middle = median(sizes)
    if middle <= 0:
        return None
    index = max(range(len(sizes)), key=lambda i: abs(math.log(max(sizes[i], 1e-30) / middle)))
    factor = sizes[index] / middle
    rest = [s for i, s in enumerate(sizes) if i != index]
    off = max(factor, 1 / max(factor, 1e-30))
    return (index, factor) if off > OFF and _agree(rest, min(AGREE, off**0.25)) else None


def _no_convention(points: Sequence[Point]) -> str:
    groups = _groups(points)
    known = any(_agree(sizes) or _outlier(sizes) for group in groups for sizes in _conventions(group))
    return "" if known else "the layers' weights follow no common rule" if groups else "too few like layers"


def _branch(points: Sequence[Point]) -> Broken:
    """Branches of a block are numbered (`block`, `block#2`): each is compared with its like in other blocks."""
    for joins in _branches(points):
        loudest = max(joins, key=lambda p: p.residual_var or 0.0)
        others = [p.residual_var or 0.0 for p in joins if p is not loudest]
        ratio = (loudest.residual_var or 0.0) / median(others)
        if ratio > BRANCH and _agree(others, BRANCH_AGREE):
            yield loudest, ratio, BRANCH


def _branches(points: Sequence[Point]) -> list[list[Point]]:
    out: dict[str, list[Point]] = {}
    for p in points:
        if finite(p.residual_var) and (p.residual_var or 0.0) > max(1e-12, STARTING * (p.var or 0.0)):
            out.setdefault(p.name.partition("#")[2], []).append(p)
    return [joins for joins in out.values() if len(joins) > 2]


def _no_branches(points: Sequence[Point]) -> str:
    return "" if _branches(points) else "fewer than three branches that add to the stream"


def _identical(points: Sequence[Point]) -> Broken:
    for p in points:
        if p.identical:
            yield p, 1.0, 0.0


def _judged_units(points: Sequence[Point]) -> list[Point]:
    """Activations with values enough to call a unit dead.

    Not a gate (1×1 maps, one channel): off for a few similar descriptors need not be dead.
    """
    return [
        p
        for p in points
        if p.kind == "activation"
        and p.dead is not None
        and p.count >= FEW_COUNT
        and not (len(p.shape) > 2 and (math.prod(p.shape[2:]) == 1 or math.prod(p.shape) == p.count))
    ]


def _dead(points: Sequence[Point]) -> Broken:
    """A unit is dead where it is constant, or varies a thousand times less than the average one, as GELU does at −6.

    Not where it was so before the activation: that came from elsewhere, such as the zeros of a padded shortcut.
    """
    before = dict(zip(points[1:], points, strict=False))
    for p in _judged_units(points):
        share, given = max(p.dead or 0.0, p.quiet or 0.0), before.get(p)
        if given is not None and given.shape == p.shape:
            share -= max(given.dead or 0.0, given.quiet or 0.0)
        limit = DEAD if p.count >= DEAD_COUNT else 0.75
        if share > limit:
            yield p, share, limit


def _no_units(points: Sequence[Point]) -> str:
    if _judged_units(points):
        return ""
    few = any(p.kind == "activation" for p in points)
    return f"fewer than {FEW_COUNT} values a channel" if few else "no activation"


def _attention(points: Sequence[Point]) -> Broken:
    for p in points:
        if p.logits is not None and p.logits > LOGITS:
            yield p, p.logits, LOGITS
        elif p.peak is not None and p.peak > PEAK:
            yield p, p.peak, PEAK


def _no_attention(points: Sequence[Point]) -> str:
    known = any(p.peak is not None or p.logits is not None for p in points)
    return "" if known else "no attention by softmax over 8 positions or more"


RULES = (
    Rule(
        "odd-layer",
        "the size of this layer's weights is off the rule that its peers follow (factor)",
        "inspect how this layer is initialized: its gain or multiplier is applied once too often, or not at all",
        _odd,
        "weight_norm",
        _no_convention,
        cause=True,
    ),
    Rule(
        "identical-units",
        "all units of this layer have the same weights, and will keep them",
        "initialize this layer by random weights",
        _identical,
        "identical",
        cause=True,
    ),
    Rule(
        "dead-units",
        "fraction of units that do not answer to the input",
        "raise the biases in front of the activation, lower the learning rate, or use a leaky activation",
        _dead,
        "",
        _no_units,
        cause=True,
    ),
    Rule(
        "attention",
        "attention's logits are too large (variance where nothing scales them, else mean of the largest weight)",
        "divide the logits by the square root of the width of a head, or normalize queries and keys",
        _attention,
        "",
        _no_attention,
        cause=True,
    ),
    Rule(
        "branch",
        "this branch is louder than its like in other blocks (variance over their median)",
        "inspect the branch's last layer: its weights, gain or multiplier",
        _branch,
        "residual_var",
        _no_branches,
    ),
)
