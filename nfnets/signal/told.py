"""The verdict in HTML: where it starts, what follows from that, what was not judged."""

from __future__ import annotations

import html
from collections.abc import Sequence

from nfnets.signal.rules import Check, Finding
from nfnets.signal.table import number


def told(verdict: Check) -> str:
    """The verdict on every model, and the rules that had nothing to judge.

    Args:
        verdict: of the report.

    Returns:
        HTML.
    """
    causes = {cause.model: cause for cause in verdict.causes}
    parts = [
        _sick(verdict, causes[model]) if model in causes else _healthy(verdict, model)
        for model in verdict.models
    ]
    return f'<section class="verdicts">{"".join(parts)}</section>{_idle(verdict)}'


def _healthy(verdict: Check, model: str) -> str:
    return (
        f'<div class="verdict ok"><h3>✓ {html.escape(model)}</h3>'
        f"<p>Healthy by {len(verdict.rules)} rules.</p></div>"
    )


def _sick(verdict: Check, cause: Finding) -> str:
    found = verdict.of(cause.model)
    what = {rule.name: html.escape(rule.what) for rule in verdict.rules}
    over = f", variance {number(cause.over)} × that of the point before" if cause.over is not None else ""
    when = f" at step {cause.step}" if cause.step else ""
    own = [f for f in found if f.rule == cause.rule]
    more = f"<p>Also at {_where(own[1:])}.</p>" if len(own) > 1 else ""
    others = [name for name in dict.fromkeys(f.rule for f in found) if name != cause.rule]
    items = "".join(
        f"<li><b>{html.escape(name)}</b>: {what[name]} at {_where([f for f in found if f.rule == name])}.</li>"
        for name in others
    )
    folded = (
        f"<details><summary>With it: {html.escape(', '.join(others))}</summary><ul>{items}</ul></details>"
        if others
        else ""
    )
    return (
        f'<div class="verdict bad"><h3>✗ {html.escape(cause.model)}: starts at '
        f"<code>{html.escape(cause.name or '(input)')}</code>{when}</h3>"
        f"<p><b>{html.escape(cause.rule)}</b>: {what[cause.rule]}{_number(cause)}{over}.</p>"
        f"<p>Remedy: {html.escape(cause.remedy)}.</p>{more}{folded}</div>"
    )


def _where(hits: Sequence[Finding]) -> str:
    names = list(dict.fromkeys(f.name or "(input)" for f in hits))
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(html.escape(n) for n in names[:6]) + more + _number(hits[0])


def _number(hit: Finding) -> str:
    """Where there is a limit to compare it with."""
    return f" ({number(hit.value)}, limit {number(hit.limit)})" if hit.limited else ""


def _idle(verdict: Check) -> str:
    if not verdict.unmeasured:
        return ""
    items = "".join(
        f"<li><b>{html.escape(rule.name)}</b>: {html.escape(verdict.why.get(rule.name, 'not measured'))}</li>"
        for rule in verdict.unmeasured
    )
    return (
        f'<details class="idle"><summary>{len(verdict.rules)} rules judged; {len(verdict.unmeasured)} had nothing to '
        f"judge</summary><ul>{items}</ul></details>"
    )
