"""Faults that were planted are found where they are; what is not found is on record (`planted_faults.py`).

`NFNETS_GRID=all` (`make soak`) plants every fault in every net.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from planted_faults import FAULTS, NETS, OTHERWISE, SAMPLE, Absent, first_of, outcome, report_of
from planted_remedies import tried
from soak import ALL

from nfnets.signal import SignalReport
from nfnets.signal.notes import doubts

CASES = [(f, n) for f in FAULTS for n in NETS] if ALL else SAMPLE


@pytest.mark.parametrize(("fault", "name"), CASES)
def test_a_planted_fault_is_found_where_it_is(fault: str, name: str) -> None:
    try:
        found = outcome(fault, name)
    except Absent:
        pytest.skip(f"{name} has no place for it")
    assert found == OTHERWISE.get((fault, name), "found")


@pytest.mark.parametrize("name", NETS)
def test_without_a_fault_nothing_is_found(name: str) -> None:
    _, report = report_of(None, name)
    assert first_of(report) is None, str(report.check())
    assert not doubts(report.notes)


def test_the_cause_is_said_once_and_first() -> None:
    """One layer × 30 in a plain net breaks several rules: the layer is named, the others are folded under it."""
    _, report = report_of("one layer × 30", "plain")
    verdict = report.check()
    assert len(verdict.broken) > 1
    first, *rest = str(verdict).splitlines()
    assert first.startswith("signal: Sequential: starts at 6: the size of this layer's weights")
    assert "× that of the point before" in first
    assert sum("remedy:" in line for line in rest) == 1
    for rule in verdict.broken[1:]:
        assert any(line.startswith(f"  with it {rule}: ") for line in rest) or rule == "odd-layer"


def test_a_rule_that_judged_nothing_does_not_count_as_passed() -> None:
    _, report = report_of("head of zeros", "ResNet")
    verdict = report.check()
    assert "gradient" not in {r.name for r in verdict.rules}
    assert "gradient (all gradients are 0, as behind a head of zeros)" in str(verdict)


def test_remedies_fit_the_model() -> None:
    """No conversion is offered where there is nothing to convert, or where it was done."""
    for name in ("plain", "NF-ResNet", "ViT"):
        _, report = report_of("inputs' mean + 10", name)
        for model in (report, SignalReport([replace(p, mean_sq=9 * (p.var or 1)) for p in report.points])):
            assert not any("nfnets.convert(" in f.remedy for f in model.check().findings), name
    _, report = report_of(None, "ResNet")
    shifted = SignalReport([replace(p, mean_sq=9 * (p.var or 1)) for p in report.points]).check(
        ["mean-shift"]
    )
    assert "nfnets.convert(" in shifted.findings[0].remedy


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("one layer × 3", "NF-ResNet"),
        ("90 % of a layer dead", "plain"),
        ("units of a layer identical", "MLP"),
        ("softmax before the loss's own", "MLP"),
        ("attention scale missing", "ViT"),
        ("training: rate × 30", "MLP"),
    ],
)
def test_a_remedy_cures(fault: str, name: str) -> None:
    assert (found := tried(fault, name)) is not None
    assert found[1:] == (True, True)
