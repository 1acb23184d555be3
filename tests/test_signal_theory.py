"""Dashed lines: theory follows what attention and written-out norm layers make of a signal."""

import math

import pytest
import torch
from held_out_nets import HELD_OUT
from planted_nets import NETS
from torch import nn

import nfnets
from nfnets.signal import SignalReport, probe


def reports(name: str) -> list[SignalReport]:
    """By a profile and by a probe."""
    net = (NETS | HELD_OUT)[name]
    torch.manual_seed(0)
    model, x = net.build(), torch.randn(32, *net.shape)
    with probe(model, warn=False) as p:
        model(x)
    return [nfnets.profile(model, x), p.report()]


@pytest.mark.parametrize("name", ["ViT", "encoder", "Swin"])
def test_attention_takes_what_it_leaves_from_the_measurement(name: str) -> None:
    """It was taken to pass its input on: torch's own attention layer was expected to put out a variance of 1."""
    for report in reports(name):
        joins = [p for p in report.points if p.role == "join"]
        assert len(joins) == 8
        for p in joins:
            assert p.residual_var is not None, p.name
            assert abs(math.log(p.predicted_residual_var / p.residual_var)) < math.log(2.5), p  # type: ignore[operator]
            assert abs(math.log(p.predicted_var / p.var)) < math.log(1.3), p  # type: ignore[operator]


def test_a_norm_layer_of_functions_restarts_theory() -> None:
    """EvoNorm's group deviation is no module: without it the expected variance overflowed in a DenseNet."""
    net = NETS["DenseNet"]
    torch.manual_seed(0)
    x = torch.randn(16, *net.shape)
    model = nfnets.convert(net.build(), x, method="evonorm_s0")
    for p in nfnets.profile(model, x).points:
        assert abs(math.log(p.predicted_var / p.var)) < math.log(5), p  # type: ignore[operator]


def test_parameters_added_before_an_activation_are_a_point() -> None:
    """`fixed_variance` puts them where a norm layer stood: its output enters the activation, not the convolution's."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(32, 3, 12, 12)
    report = nfnets.profile(nfnets.convert(net, x, method="fixed_variance"), x)
    assert [p.name for p in report.points if p.feeds == "activation" and p.kind == "function"] == ["1.add"]
    assert report["1.add"].var == pytest.approx(1, rel=0.05)


def test_one_value_a_channel_is_no_variance() -> None:
    """A batch of one row has variance 0 everywhere: nothing dies out."""
    verdict = nfnets.profile(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(1, 8)
    ).check()
    assert verdict
    assert "vanishing" in {r.name for r in verdict.unmeasured}
