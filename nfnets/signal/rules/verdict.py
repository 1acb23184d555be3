"""The verdict: which rules were broken, where it starts, what follows from that, and what was not judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from nfnets.errors import UserError, unknown
from nfnets.signal.measured import Measured, Point
from nfnets.signal.rules.default import DEFAULT, MEASURE, RULES
from nfnets.signal.rules.places import finite
from nfnets.signal.rules.remedies import remedy
from nfnets.signal.rules.rule import Finding, Rule


@dataclass(frozen=True)
class Check:
    """The verdict: true when rules were judged and none was broken.

    Attributes:
        findings: one entry per broken rule, layer and step, in execution order (gradients: the other way round).
        rules: the rules that were applied.
        models: the models that were judged.
        unmeasured: the rules that had nothing to look at.
        causes: per sick model the finding that it starts with.
        why: per rule of `unmeasured` the reason.
    """

    findings: tuple[Finding, ...]
    rules: tuple[Rule, ...]
    models: tuple[str, ...]
    unmeasured: tuple[Rule, ...] = ()
    causes: tuple[Finding, ...] = ()
    why: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rules) and not self.findings

    @property
    def passed(self) -> bool:
        """The same as `bool(check)`."""
        return bool(self)

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the broken rules, in the order in which rules are applied."""
        found = {f.rule for f in self.findings}
        return tuple(r.name for r in self.rules if r.name in found)

    def of(self, model: str) -> tuple[Finding, ...]:
        """The findings of one model."""
        return tuple(f for f in self.findings if f.model == model)

    @property
    def scope(self) -> str:
        """How many rules had something to judge, and why the others had not, in words."""
        names = ", ".join(f"{r.name} ({self.why.get(r.name, 'not measured')})" for r in self.unmeasured)
        return f"{len(self.rules)} rules" + (f"; not judged: {names}" if names else "")

    def __str__(self) -> str:
        if not self.findings:
            what = "healthy" if self.rules else "nothing judged"
            return f"signal: {what} ({', '.join(self.models)}; {self.scope})"
        lines = [line for cause in self.causes for line in self._told(cause)]
        return "\n".join([*lines, f"signal: {self.scope}"])

    def _told(self, cause: Finding) -> list[str]:
        """One model: where it starts, the rule broken there with its layers, and what else broke."""
        found = self.of(cause.model)
        what = {r.name: r.what for r in self.rules}
        lines = [f"signal: {headline(cause, what[cause.rule])}"]
        layers: dict[str, list[Finding]] = {}
        for f in found:
            if f.rule == cause.rule:
                layers.setdefault(f.name, []).append(f)
        lines.append(f"signal: {cause.rule}: {what[cause.rule]}")
        shown = sorted(layers.values(), key=lambda hits: hits[0].name != cause.name)[:8]
        lines += [f"  {_worst(hits)}" for hits in shown]
        if len(layers) > 8:
            lines.append(f"  … and {len(layers) - 8} more")
        lines.append(f"  remedy: {cause.remedy}")
        others = [name for name in dict.fromkeys(f.rule for f in found) if name != cause.rule]
        lines += [f"  with it {name}: {_folded([f for f in found if f.rule == name])}" for name in others]
        return lines


def headline(cause: Finding, what: str) -> str:
    """Where it starts, what is wrong there, and by how much.

    Args:
        cause: of `Check.causes`.
        what: the rule's words for it.

    Returns:
        One line.
    """
    model = f"{cause.model}: " if cause.model else ""
    step = f" at step {cause.step}" if cause.step else ""
    over = f", variance {cause.over:.3g} × that of the point before" if cause.over is not None else ""
    number = f": {cause.value:.4g}" if cause.limited else ""
    return f"{model}starts at {cause.name or '(input)'}{step}: {what}{number}{over}"


def _folded(hits: Sequence[Finding]) -> str:
    names = list(dict.fromkeys(f.name for f in hits))
    number = f" ({hits[0].value:.4g}, limit {hits[0].limit:.4g})" if hits[0].limited else ""
    first = f"{names[0]}{number}"
    return first if len(names) == 1 else f"{len(names)} points from {first} on"


def _worst(hits: Sequence[Finding]) -> str:
    """One layer's findings by one rule, over all steps."""

    def excess(f: Finding) -> float:
        by = abs(f.value - f.limit)
        return math.inf if math.isnan(by) else by

    worst = max(hits, key=excess)
    when = f"step {worst.step}: " if worst.step else ""
    if len(hits) > 1:
        when = f"{len(hits)} steps, {hits[0].step} to {hits[-1].step}, worst at {worst.step}: "
    number = (
        f": {when}{worst.value:.4g} (limit {worst.limit:.4g})" if worst.limited else when and f": {when[:-2]}"
    )
    return f"{worst.model}: {worst.name or '(input)'}{number}"


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
    if rules is not None and (why := _unmeasured(report, chosen)):
        rule = next(r for r in chosen if r.name in why)
        raise UserError(f"rule {rule.name} judges by {rule.needs}, which was not measured: {why[rule.name]}")
    return judge(report, chosen)


def _unmeasured(report: Measured, chosen: Sequence[Rule]) -> dict[str, str]:
    return {
        r.name: MEASURE.get(r.needs, "not measured")
        for r in chosen
        if r.needs and all(getattr(p, r.needs) is None for p in report.points)
    }


def judge(report: Measured, chosen: Sequence[Rule]) -> Check:
    """The verdict by rules of which some may have nothing to judge.

    Args:
        report: what was measured.
        chosen: the rules.

    Returns:
        The verdict.
    """
    why = _unmeasured(report, chosen)
    found: list[Finding] = []
    causes: list[Finding] = []
    idle: dict[str, str] = {}
    judged: set[str] = set()
    for model in report.models:
        steps = [report.select(model=model, step=step) for step in report.steps]
        everything = [p for points in steps for p in points]
        place = {(p.name, p.step): i for i, p in enumerate(everything)}
        mine: list[tuple[Rule, Finding]] = []
        for points, whole in [*((points, False) for points in steps), (everything, True)]:
            for rule in chosen:
                if rule.steps != whole or rule.name in why or not points:
                    continue
                if reason := rule.idle(points):
                    idle.setdefault(rule.name, reason)
                else:
                    judged.add(rule.name)
                for p, value, limit in rule.find(points):
                    before = place[p.name, p.step] - 1
                    over = _over(p, everything[before] if before >= 0 else None)
                    cure = remedy(rule, points, p)
                    mine.append((rule, Finding(rule.name, model, p.name, p.step, value, limit, cure, over)))
        found += [f for _, f in mine]
        if mine:
            given = {(p.name, p.step) for p in everything if p.kind == "input"}
            causes.append(_first(mine, place, given))
    why |= {name: reason for name, reason in idle.items() if name not in judged}
    broken = {f.rule for f in found}
    unmeasured = tuple(r for r in chosen if r.name in why and r.name not in broken)
    applied = tuple(r for r in chosen if r not in unmeasured)
    return Check(tuple(found), applied, report.models, unmeasured, tuple(causes), why)


def _over(p: Point, before: Point | None) -> float | None:
    if before is None or before.step != p.step or not (finite(p.var) and finite(before.var)):
        return None
    return (p.var or 0.0) / before.var if before.var else None


def _first(
    found: Sequence[tuple[Rule, Finding]],
    place: dict[tuple[str, int], int],
    given: set[tuple[str, int]],
) -> Finding:
    """What is wrong with the input; then rules that name a cause, by step and place; gradients start at the end.

    Of one rule that looks at gradients the first finding is the last layer, so its own order is kept.
    """
    start = {}
    for rule, f in found:
        start.setdefault((rule.name, f.step), (rule, f))

    def order(pair: tuple[Rule, Finding]) -> tuple[bool, bool, int, bool, int]:
        rule, f = pair
        backwards = rule.needs == "grad_var"
        return (f.name, f.step) not in given, not rule.cause, f.step, backwards, place[f.name, f.step]

    return min(start.values(), key=order)[1]


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
