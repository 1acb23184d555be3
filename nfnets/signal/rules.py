"""Named rules that say whether a network's signal is healthy, and what to do where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from nfnets.errors import UserError, unknown
from nfnets.signal.measured import Measured, Point

# Limits. Each stands well between what healthy networks show at initialization and what the sick ones do.
# Squared mean / variance. BN pre-activation 0.47 (1/π over 0.682), He without normalization 7 to 190.
MEAN_SHIFT = 5.0
# Times the linear growth of a normalized network, one unit of variance per block.
GROWTH = 8.0
# Of the reference. Average-pool shortcuts take white noise to 0.012 in NFNet-F0, to 0.0017 in NF-RegNet.
VANISHING = 1e-3
# In training, of the reference there and of what it is without dropout. One dropout of p = 0.5 doubles a mean square.
NOISE = 4.0
# Fraction of constant units after an activation, and the values a channel that it takes to call one dead.
DEAD = 0.5
DEAD_COUNT = 32
# Bits of headroom below 65504.
FP16_BITS = 1.0
# Mean cosine between samples. BN and NF stay below 0.7, GroupNorm below 0.93, He-VGG reaches 0.994.
COSINE = 0.98
# Largest over smallest gradient variance along the trunk. ResNet-50 with a small input reaches 1e3.
GRADIENT = 1e5


@dataclass(frozen=True)
class Finding:
    """One layer that broke one rule."""

    rule: str
    model: str
    name: str
    step: int
    value: float
    limit: float
    remedy: str

    def __str__(self) -> str:
        where = f"{self.model}: {self.name or '(input)'}" + (f" at step {self.step}" if self.step else "")
        return f"{self.rule}: {where}: {self.value:.4g} (limit {self.limit:.4g})"


Broken = Iterator[tuple[Point, float, float]]


@dataclass(frozen=True)
class Rule:
    """A named test of one model's points at one step.

    Args:
        name: what a user selects it by.
        what: the sickness, in a few words.
        remedy: what most likely cures it.
        find: yields `(point, value, limit)` for each point that breaks the rule.
        needs: the column of `Point` that it judges by, where that need not have been measured.

    Example:
        >>> loud = Rule("loud", "values above 10", "scale it", lambda ps: ((p, p.max, 10.0) for p in ps if p.max > 10))
        >>> from nfnets.signal import SignalReport
        >>> bool(check(SignalReport([Point("net", "fc", "linear", max=3.0)]), [loud]))
        True
    """

    name: str
    what: str
    remedy: str
    find: Callable[[Sequence[Point]], Iterable[tuple[Point, float, float]]]
    needs: str = ""


@dataclass(frozen=True)
class Check:
    """The verdict: true when no rule was broken.

    Attributes:
        findings: one entry per broken rule, layer and step, in execution order (gradients: the other way round).
        rules: the rules that were applied.
        models: the models that were judged.
        unmeasured: the rules that had nothing to look at.
    """

    findings: tuple[Finding, ...]
    rules: tuple[Rule, ...]
    models: tuple[str, ...]
    unmeasured: tuple[Rule, ...] = ()

    def __bool__(self) -> bool:
        return not self.findings

    @property
    def passed(self) -> bool:
        """The same as `bool(check)`."""
        return not self.findings

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the broken rules."""
        return tuple(dict.fromkeys(f.rule for f in self.findings))

    def of(self, model: str) -> tuple[Finding, ...]:
        """The findings of one model."""
        return tuple(f for f in self.findings if f.model == model)

    @property
    def scope(self) -> str:
        """How many rules were applied, and which were not, in words."""
        names = ", ".join(r.name for r in self.unmeasured)
        return f"{len(self.rules)} rules" + (f"; not measured: {names}" if names else "")

    def __str__(self) -> str:
        if not self.findings:
            return f"signal: healthy ({', '.join(self.models)}; {self.scope})"
        known = {r.name: r for r in self.rules}
        lines = []
        for rule in self.broken:
            layers: dict[tuple[str, str], list[Finding]] = {}
            for f in self.findings:
                if f.rule == rule:
                    layers.setdefault((f.model, f.name), []).append(f)
            lines.append(f"signal: {rule}: {known[rule].what}")
            lines += [f"  {_worst(hits)}" for hits in list(layers.values())[:8]]
            if len(layers) > 8:
                lines.append(f"  … and {len(layers) - 8} more")
            lines.append(f"  remedy: {known[rule].remedy}")
        return "\n".join([*lines, f"signal: {self.scope}"] if self.unmeasured else lines)


def _worst(hits: Sequence[Finding]) -> str:
    """One layer's findings by one rule, over all steps."""

    def excess(f: Finding) -> float:
        by = abs(f.value - f.limit)
        return math.inf if math.isnan(by) else by

    worst = max(hits, key=excess)
    when = f"step {worst.step}: " if worst.step else ""
    if len(hits) > 1:
        when = f"{len(hits)} steps, {hits[0].step} to {hits[-1].step}, worst at {worst.step}: "
    return f"{worst.model}: {worst.name or '(input)'}: {when}{worst.value:.4g} (limit {worst.limit:.4g})"


# -- the points a rule looks at -------------------------------------------------------------------------------


def trunk(points: Sequence[Point]) -> list[Point]:
    """The points that carry the signal: the residual joins, or what enters each activation of a plain network.

    A convolution in front of a norm layer is left out: its mean and scale are the norm layer's to remove.
    """
    joins = [p for p in points if p.role == "join"]
    if len(joins) > 1:
        return joins
    if any(p.kind == "conv" for p in points):
        # The classifier of a CNN sees pooled features: a few values a channel, and alike between samples.
        points = [p for p in points if len(p.shape) > 2]
    entering = [p for p in points if p.feeds == "activation" and p.kind != "activation"]
    return entering or [p for p in points if p.kind in ("conv", "linear") and p.feeds != "norm"]


def reference(points: Sequence[Point]) -> float:
    """The variance that growth and vanishing are measured against: the first finite one of stem and trunk."""
    stem = [p.var for p in points if p.role == "stem"]
    first = [p.var for p in trunk(points)][:1]
    known = [v for v in (*stem, *first) if v is not None and math.isfinite(v) and v > 0]
    return max(known, default=1.0)


def growth_limit(points: Sequence[Point]) -> list[float]:
    """Per trunk point the variance above which it has outgrown linear growth."""
    ref = reference(points)
    return [GROWTH * ref * (j + 2) for j in range(len(trunk(points)))]


def sick_gradients(p: Point) -> list[float]:
    """What is not finite of that which was measured of the gradients at a point, the output's and the weight's."""
    known = (p.grad_min, p.grad_max, p.grad_var, p.weight_grad_norm)
    return [v for v in known if v is not None and not math.isfinite(v)]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _nonfinite(points: Sequence[Point]) -> Broken:
    for p in points:
        if p.nonfinite:
            worst = p.max if p.max is not None else math.nan
            yield p, worst, math.inf


def _nonfinite_gradient(points: Sequence[Point]) -> Broken:
    if any(p.nonfinite for p in points):
        return  # what `finite` names has made these
    for p in reversed(points):  # as the gradients came
        if found := sick_gradients(p):
            yield p, found[0], math.inf


def _mean_shift(points: Sequence[Point]) -> Broken:
    for p in trunk(points):
        if p.residual_var is not None and p.residual_var < 1e-12:
            continue  # a branch that starts at zero shifts nothing: what is seen is the stem's pooling
        if p.mean_sq is not None and p.var is not None and _finite(p.mean_sq) and _finite(p.var):
            ratio = p.mean_sq / p.var if p.var > 0 else (math.inf if p.mean_sq > 0 else 0.0)
            if ratio > MEAN_SHIFT:
                yield p, ratio, MEAN_SHIFT


def _growth(points: Sequence[Point]) -> Broken:
    for p, limit in zip(trunk(points), growth_limit(points), strict=True):
        if p.var is not None and _finite(p.var) and p.var > limit:
            yield p, p.var, limit


def _vanishing(points: Sequence[Point]) -> Broken:
    limit = VANISHING * reference(points)
    for p in trunk(points):
        if p.var is not None and p.var < limit:
            yield p, p.var, limit


def _noise(points: Sequence[Point]) -> Broken:
    """Growth by dropout: a stream that grows without it, or starts as large, is not meant."""
    known = [p for p in trunk(points) if _finite(p.training_var) and _finite(p.var)]
    start = max(
        [p.training_var or 0.0 for p in points if p.role == "stem" and _finite(p.training_var)], default=0.0
    )
    for p in known:
        limit = NOISE * max(start or known[0].training_var or 0.0, p.var or 0.0)
        if (p.training_var or 0.0) > limit:
            yield p, p.training_var or 0.0, limit


def _dead(points: Sequence[Point]) -> Broken:
    for p in points:
        if p.kind != "activation" or p.dead is None or p.count < DEAD_COUNT:
            continue
        # Not a gate (1×1 maps, one channel): off for a few similar descriptors need not be dead.
        gate = len(p.shape) > 2 and (math.prod(p.shape[2:]) == 1 or math.prod(p.shape) == p.count)
        if not gate and p.dead > DEAD:
            yield p, p.dead, DEAD


def _overflow(points: Sequence[Point]) -> Broken:
    for p in points:
        if not p.nonfinite and p.headroom_fp16 is not None and p.headroom_fp16 < FP16_BITS:
            yield p, p.headroom_fp16, FP16_BITS


def _cosine(points: Sequence[Point]) -> Broken:
    for p in trunk(points):
        if p.cosine is not None and p.cosine > COSINE:
            yield p, p.cosine, COSINE


def _gradient(points: Sequence[Point]) -> Broken:
    known = [p for p in trunk(points) if p.grad_var is not None and _finite(p.grad_var) and p.grad_var > 0]
    if len(known) < 2:
        return
    low = min(known, key=lambda p: p.grad_var or 0.0)
    for p in known:
        ratio = (p.grad_var or 0.0) / (low.grad_var or 1.0)
        if ratio > GRADIENT:
            yield p, ratio, GRADIENT


DEFAULT = (
    Rule(
        "finite",
        "NaN or inf in the output",
        "look at the first layer listed: its weights or its input are not finite, or it overflowed; lower the "
        "learning rate, clip gradients (AGC), or keep it in fp32",
        _nonfinite,
    ),
    Rule(
        "finite-gradient",
        "NaN or inf in a gradient, while every output is finite",
        "what follows the first layer listed makes it: a root, quotient or logarithm of zero, or fp16 overflowed (a "
        "GradScaler's first steps may)",
        _nonfinite_gradient,
        "grad_var",
    ),
    Rule(
        "mean-shift",
        "the channels' means dwarf their variance (squared mean / variance)",
        'standardize the weights: nfnets.convert(model, images, method="nf") uses scaled weight standardization',
        _mean_shift,
    ),
    Rule(
        "growth",
        "the variance grows faster than one unit per block",
        "divide each branch's input by β and multiply its output by α (0.2), or start branches at zero (SkipInit)",
        _growth,
    ),
    Rule(
        "noise",
        "the variance grows in training, by dropout or stochastic depth, and not without",
        "each multiplies the mean square by 1/(1 − p), and no norm layer takes that back: nfnets.convert measures "
        "constants that do, or lower p",
        _noise,
    ),
    Rule(
        "vanishing",
        "the variance dies out with depth",
        "multiply each activation by its gain (nfnets.gains.gain) or initialize by nfnets.init.lsuv_",
        _vanishing,
    ),
    Rule(
        "dead-units",
        "fraction of units that do not answer to the input",
        "raise the biases in front of the activation, lower the learning rate, or use a leaky activation",
        _dead,
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
    Rule(
        "gradient",
        "the gradient's variance changes by orders of magnitude along the trunk",
        "as for growth and vanishing: bring the forward variance to 1; clip by AGC meanwhile",
        _gradient,
        "grad_var",
    ),
)
RULES = {rule.name: rule for rule in DEFAULT}
# How a column comes to be measured that need not be.
_MEASURE = {"grad_var": "pass backward=True", "cosine": "pass two samples or more"}


def check(report: Measured, rules: Sequence[str | Rule] | None = None) -> Check:
    """Judges every model and step of a report.

    Args:
        report: a `SignalReport`.
        rules: names of default rules, or `Rule` objects; when omitted all default rules that have something to judge.

    Returns:
        The verdict.

    Raises:
        UserError: an unknown rule, one without the measurements that it judges by, or a report without points.

    Example:
        >>> from nfnets.signal import SignalReport
        >>> sick = SignalReport([Point("net", "fc", "linear", nonfinite=True, max=float("nan"))])
        >>> check(sick).broken
        ('finite',)
    """
    if not report.points:
        raise UserError(
            "a report without points: expected measurements; profile a model or let the probe see a step"
        )
    chosen = _chosen(rules)
    missing = tuple(r for r in chosen if r.needs and all(getattr(p, r.needs) is None for p in report.points))
    if rules is not None and missing:
        rule = missing[0]
        how = _MEASURE.get(rule.needs, "measure it")
        raise UserError(f"rule {rule.name} judges by {rule.needs}, which was not measured: {how}")
    applied = tuple(r for r in chosen if r not in missing)
    findings = []
    for model in report.models:
        for step in report.steps:
            points = report.select(model=model, step=step)
            for rule in applied:
                for p, value, limit in rule.find(points):
                    findings.append(Finding(rule.name, model, p.name, step, value, limit, rule.remedy))
    return Check(tuple(findings), applied, report.models, missing)


def needs_backward(rules: Sequence[str | Rule] | None) -> bool:
    """Whether rules that were asked for judge gradients.

    Args:
        rules: as in `check`.

    Returns:
        False where none were named.

    Raises:
        UserError: an unknown rule.

    Example:
        >>> needs_backward(["gradient"]), needs_backward(None)
        (True, False)
    """
    return rules is not None and any(r.needs == "grad_var" for r in _chosen(rules))


def _chosen(rules: Sequence[str | Rule] | None) -> tuple[Rule, ...]:
    if rules is None:
        return DEFAULT
    return tuple(_rule(r) for r in ([rules] if isinstance(rules, str) else rules))


def _rule(rule: str | Rule) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    return RULES[rule]
