"""Networks that people train every day pass the default rules, branches that start at zero included."""

import pytest
import timm
import torch

import nfnets


@pytest.mark.parametrize(
    "name", ["resnet10t", "resnet18", "seresnet50", "regnety_002", "mobilenetv3_small_100", "dla34"]
)
def test_timms_networks_are_healthy(name: str) -> None:
    torch.manual_seed(0)
    check = nfnets.profile(timm.create_model(name), torch.randn(8, 3, 96, 96)).check()
    assert check, str(check)
