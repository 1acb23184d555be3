"""Rules of what goes forward: the input, values that are not finite, and how the signal changes along the trunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from nfnets.signal.measured import Point
from nfnets.signal.rules.places import finite, growth_limit, no_trunk, reference, trunk
from nfnets.signal.rules.rule import Broken, Rule

# Limits. Each stands well between what healthy networks show at initialization and what the sick ones do.
# Variance over everything, and squared mean over variance, of the input: pixels in 0..1 have 0.08 and 3.
INPUT_LOW, INPUT_HIGH, INPUT_SHIFT = 0.02, 25.0, 5.0
# Squared mean / variance. BN pre-activation 0.47 (1/π over 0.682), He without normalization 7 to 190.
MEAN_SHIFT = 5.0
# Variance over that of the point before on the trunk; healthy networks reach 2.8 at the start and 5.7 after 300 steps
# (a ResNet by SkipInit, where its last stage begins). One layer × 3 makes 9.
JUMP = 8.0
# Median factor from layer to layer of a plain network: He's 0.8 to 1, torch's default initialization 0.1 to 0.3.
FADING = 0.45
# Of the reference. Average-pool shortcuts take white noise to 0.012 in NFNet-F0, to 0.0017 in NF-RegNet.
VANISHING = 1e-3
# In training, of the reference there and of what it is without dropout. One dropout of p = 0.5 doubles a mean square.
NOISE = 4.0
# Bits of headroom below 65504.
FP16_BITS = 1.0
# Mean cosine between samples. BN and NF stay below 0.7, GroupNorm below 0.93, He-VGG reaches 0.994.
COSINE = 0.98


def _inputs(points: Sequence[Point]) -> list[Point]:
    """The first input, where no norm layer takes its scale out anyway."""
    found = [p for p in points if p.kind == "input"][:1]
    return [p for p in found if p.feeds != "norm" and finite(p.total_var)]


def _input(points: Sequence[Point]) -> Broken:
    for p in _inputs(points):
        mean, var = p.total_mean or 0.0, p.total_var or 0.0
        if mean**2 > INPUT_SHIFT * var:
            yield p, mean**2 / var if var > 0 else math.inf, INPUT_SHIFT
        elif not INPUT_LOW <= var <= INPUT_HIGH:
            yield p, var, INPUT_LOW if var < INPUT_LOW else INPUT_HIGH


def _no_input(points: Sequence[Point]) -> str:
    return "" if _inputs(points) else "no input of numbers, or one that a norm layer reads"


def _neighbours(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Trunk points with the factor from the one before."""
    known = [p for p in trunk(points) if finite(p.var) and (p.var or 0.0) > 0]
    return [(q, (q.var or 0.0) / (p.var or 1.0)) for p, q in pairwise(known)]


def _jump(points: Sequence[Point]) -> Broken:
    found = _neighbours(points)
    usual = max(1.0, median(r for _, r in found)) if found else 1.0
    for p, ratio in found:
        if ratio > JUMP * usual:
            yield p, ratio, JUMP * usual


def _fading(points: Sequence[Point]) -> Broken:
    """Every layer takes a share away: the network as a whole has the wrong gain, no layer stands out."""
    found = _neighbours(points)
    if any(p.role == "join" for p, _ in found) or len(found) < 4:
        return
    factor = median(r for _, r in found)
    if factor < FADING:
        yield found[0][0], factor, FADING


def _plain(points: Sequence[Point]) -> str:
    found = _neighbours(points)
    if any(p.role == "join" for p, _ in found):
        return "a residual network"
    return "" if len(found) >= 4 else "fewer than five layers"


def _nonfinite(points: Sequence[Point]) -> Broken:
    for p in points:
        if p.nonfinite:
            worst = p.max if p.max is not None else math.nan
            yield p, worst, math.inf


def _probabilities(points: Sequence[Point]) -> Broken:
    """An output of positive numbers that add up to one over the channels."""
    for p in points:
        channels = math.prod(p.shape[1:2])
        positive = p.role == "head" and p.min is not None and p.min >= 0
        if positive and channels > 1 and math.isclose((p.total_mean or 0.0) * channels, 1, rel_tol=1e-4):
            yield p, 1.0, 0.0


def _mean_shift(points: Sequence[Point]) -> Broken:
    for p in trunk(points):
        if p.residual_var is not None and p.residual_var < 1e-12:
            continue  # a branch that starts at zero shifts nothing: what is seen is the stem's pooling
        if p.mean_sq is not None and p.var is not None and finite(p.mean_sq) and finite(p.var):
            ratio = p.mean_sq / p.var if p.var > 0 else (math.inf if p.mean_sq > 0 else 0.0)
            if ratio > MEAN_SHIFT:
                yield p, ratio, MEAN_SHIFT


def _growth(points: Sequence[Point]) -> Broken:
    for p, limit in zip(trunk(points), growth_limit(points), strict=True):
        if p.var is not None and finite(p.var) and p.var > limit:
            yield p, p.var, limit


def _vanishing(points: Sequence[Point]) -> Broken:
    limit = VANISHING * reference(points)
    for p in trunk(points):
        if p.var is not None and p.var < limit:
            yield p, p.var, limit


def _noise(points: Sequence[Point]) -> Broken:
    """Growth by dropout: a stream that grows without it, or starts as large, is not meant."""
    known = [p for p in trunk(points) if finite(p.training_var) and finite(p.var)]
    start = max(
        [p.training_var or 0.0 for p in points if p.role == "stem" and finite(p.training_var)], default=0.0
    )
    for p in known:
        limit = NOISE * max(start or known[0].training_var or 0.0, p.var or 0.0)
        if (p.training_var or 0.0) > limit:
            yield p, p.training_var or 0.0, limit


def _overflow(points: Sequence[Point]) -> Broken:
    for p in points:
        if not p.nonfinite and p.headroom_fp16 is not None and p.headroom_fp16 < FP16_BITS:
            yield p, p.headroom_fp16, FP16_BITS


def _cosine(points: Sequence[Point]) -> Broken:
    alike = [p for p in trunk(points) if p.cosine is not None and p.cosine > COSINE]
    given = [p for p in points if alike and p.kind == "input" and (p.cosine or 0.0) > COSINE]
    for p in (*given, *alike):
        yield p, p.cosine or 0.0, COSINE


RULES = (
    Rule(
        "input",
        "the input's scale is not what layers are initialized for (variance, or squared mean over variance)",
        "normalize what goes in to mean 0 and variance 1: subtract the data's mean and divide by its deviation, once",
        _input,
        "",
        _no_input,
        cause=True,
    ),
    Rule(
        "finite",
        "NaN or inf in the output",
        "look at the first layer listed: its weights or its input are not finite, or it overflowed; lower the "
        "learning rate, clip gradients (AGC), or keep it in fp32",
        _nonfinite,
        cause=True,
    ),
    Rule(
        "softmax-output",
        "the output is a softmax",
        "leave it to the loss: cross_entropy has its own, and on probabilities its gradients all but vanish",
        _probabilities,
        cause=True,
    ),
    Rule(
        "mean-shift",
        "the channels' means dwarf their variance (squared mean / variance)",
        'standardize the weights: nfnets.convert(model, images, method="nf") uses scaled weight standardization',
        _mean_shift,
        "",
        no_trunk,
    ),
    Rule(
        "jump",
        "the variance jumps from the point before on the trunk (factor)",
        "inspect this layer's weights: their scale, or one channel of them",
        _jump,
        "",
        no_trunk,
    ),
    Rule(
        "fading",
        "each layer takes away a share of the variance (median factor from layer to layer)",
        "initialize for the activation, by kaiming_normal_ with mode fan_in or nfnets.init.lsuv_",
        _fading,
        "",
        _plain,
    ),
    Rule(
        "growth",
        "the variance grows faster than one unit per block",
        "divide each branch's input by β and multiply its output by α (0.2), or start branches at zero (SkipInit)",
        _growth,
        "",
        no_trunk,
    ),
    Rule(
        "noise",
        "the variance grows in training, by dropout or stochastic depth, and not without",
        "each multiplies the mean square by 1/(1 − p), and no norm layer takes that back: nfnets.convert measures "
        "constants that do, or lower p",
        _noise,
        "training_var",
    ),
    Rule(
        "vanishing",
        "the variance dies out with depth",
        "multiply each activation by its gain (nfnets.gains.gain) or initialize by nfnets.init.lsuv_",
        _vanishing,
        "",
        no_trunk,
    ),
    Rule(
        "fp16-overflow",
        "bits left before fp16 overflows (65504)",
        "run in bfloat16, or scale the signal down before this layer",
        _overflow,
    ),
    Rule(
        "cosine",
        "all samples look the same (mean cosine)",
        "standardize the weights, add shortcuts, or shape the activation (TAT)",
        _cosine,
        "cosine",
    ),
)
