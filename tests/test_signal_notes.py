"""What a profile and a probe cannot measure they say, in the same words; NaN is named where it arises."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from test_signal_unchanged import Returns
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.signal import SignalReport, assert_signal, probe, profile

X = torch.randn(4, 3, 8, 8)


def by_probe(model: nn.Module, x: Tensor, backward: bool = False) -> SignalReport:
    with probe(model, backward=backward) as p:
        out = model(x)
        if backward:
            out.square().mean().backward()
    return p.report()


both = pytest.mark.parametrize("measure", [profile, by_probe])
Measure = Callable[..., SignalReport]


@both
def test_a_batch_of_one_says_what_cannot_be_estimated(measure: Measure) -> None:
    report = measure(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), X[:1])
    assert [n for n in report.notes if "batch of one" in n]
    assert all(p.cosine is None and p.rank is None for p in report.points)
    assert report["0"].var is not None
    assert "cosine" in [r.name for r in report.check().unmeasured]
    with pytest.raises(UserError, match=r"cosine judges by cosine, .* two samples"):
        report.check(["cosine"])


@both
def test_few_values_are_said_to_be_coarse(measure: Measure) -> None:
    (note,) = measure(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), X).notes
    assert "fewer than 32 values a channel at 1 points (2)" in note


@both
def test_an_integer_output_is_said_and_the_rest_measured(measure: Measure) -> None:
    report = measure(Returns(lambda y: y.argmax(1)), X)
    assert any("not floating point" in note for note in report.notes)
    assert report["conv"].var is not None


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_reported_by_layer(value: float, measure: Measure) -> None:
    model = torchvision.models.resnet18()
    with torch.no_grad():
        model.layer2[0].conv1.weight[3] = value
    report = measure(model, torch.randn(4, 3, 48, 48))
    first = next(p for p in report.points if p.nonfinite)
    assert first.name == "layer2.0.conv1"
    assert all(not p.nonfinite for p in report.points if p.name.startswith("layer1"))
    assert any("layer2.0.conv1" in note for note in report.notes)
    verdict = report.check()
    assert "finite" in verdict.broken
    assert verdict.findings[0].name == "layer2.0.conv1"


class Rooted(nn.Module):
    """The root's gradient is infinite where the ReLU puts out zeros; every output is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)).sqrt())))


@both
def test_gradients_that_are_not_finite_are_named_backwards(measure: Measure) -> None:
    torch.manual_seed(0)
    report = measure(Rooted(), torch.randn(40, 8), backward=True)
    assert not any(p.nonfinite for p in report.points)
    assert all(math.isfinite(p.grad_var or 0.0) for p in report.points if p.name in ("b", "c"))
    verdict = report.check()
    assert verdict.broken == ("finite-gradient",)
    assert verdict.findings[0].name == "relu"
    assert not math.isfinite(verdict.findings[0].value)
    assert any("NaN or inf in the gradient, backwards first at relu" in note for note in report.notes)
    with pytest.raises(AssertionError, match="finite-gradient"):
        assert_signal(Rooted(), torch.randn(40, 8), rules=["finite-gradient"])


def test_what_follows_from_a_nan_in_the_output_is_not_reported_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    report = profile(model, torch.randn(40, 8), backward=True)
    assert report.check().broken == ("finite",)
    assert not any("gradient" in note for note in report.notes)


def test_an_empty_batch_is_not_sampled_and_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with probe(model) as p:
        assert model(X[:0]).shape == (0, 4, 6, 6)
        with pytest.raises(UserError, match=r"step 0 was not sampled: input of shape \(0, 3, 8, 8\)"):
            p.report()
        model(X)
    report = p.report()
    assert report.steps == (1,)
    assert [q.name for q in report.points] == ["input", "0", "1"]
    assert report.notes[0].startswith("step 0 was not sampled")


def test_notes_say_the_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with probe(model, every=2) as p:
        for _ in range(4):
            model(X)
            with torch.no_grad():
                model[0].weight.fill_(math.nan)
    assert "NaN or inf first at 0 at step 2 (2 points in all)" in p.report().notes
