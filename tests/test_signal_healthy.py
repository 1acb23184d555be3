"""Networks that people train every day pass the default rules, branches that start at zero included.

`NFNETS_GRID=all` (`make soak`) judges every report of `healthy_nets.py`; here a few of them.
"""

import pytest
import timm
import torch
from healthy_nets import CASES, KNOWN, SAMPLE, reports_of
from soak import ALL

import nfnets


@pytest.mark.parametrize(
    "name", ["resnet10t", "resnet18", "seresnet50", "regnety_002", "mobilenetv3_small_100", "dla34"]
)
def test_timms_networks_are_healthy(name: str) -> None:
    torch.manual_seed(0)
    check = nfnets.profile(timm.create_model(name), torch.randn(8, 3, 96, 96)).check()
    assert check, str(check)


@pytest.mark.parametrize("name", CASES if ALL else SAMPLE)
def test_healthy_reports_break_no_rule(name: str) -> None:
    for report in reports_of(CASES[name]):
        check = report.check()
        assert ", ".join(check.broken) == KNOWN.get(name, ""), str(check)


def test_there_are_sixty_and_more() -> None:
    assert len(CASES) >= 60
    assert set(SAMPLE) <= set(CASES)
