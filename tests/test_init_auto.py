"""AutoInit: closed forms of the moments, He's rule, measured mean squares, what is assumed, bad input."""

from __future__ import annotations

import math
import re

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nfnets.errors import UserError
from nfnets.init import autoinit_, initialize


def square_of(f) -> float:
    """E[f(z)²], z ~ N(0, 1), by SciPy."""
    return integrate.quad(lambda z: f(z) ** 2 * stats.norm.pdf(z), -12, 12, points=[0])[0]


def deviation(model: nn.Module, path: str) -> float:
    return model.get_submodule(path).weight.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("activation", "f"),
    [
        (nn.ReLU(), lambda z: max(z, 0.0)),
        (nn.Tanh(), math.tanh),
        (nn.LeakyReLU(0.2), lambda z: max(z, 0.2 * z)),
        (nn.SiLU(), lambda z: z / (1 + math.exp(-z))),
        (nn.Softplus(), lambda z: math.log1p(math.exp(z))),
    ],
)
def test_behind_an_activation_the_weight_divides_by_its_second_moment(activation: nn.Module, f) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), activation, nn.Linear(400, 400))
    autoinit_(model, torch.randn(2, 400))
    assert deviation(model, "0") == pytest.approx(1 / 20, rel=0.01)
    assert deviation(model, "2") == pytest.approx(1 / math.sqrt(400 * square_of(f)), rel=0.01)


def test_a_relu_net_is_hes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(256, 256), nn.ReLU())))
    autoinit_(model, torch.randn(2, 256))
    he = nn.init.kaiming_normal_(
        torch.empty(4, 256, 256), nonlinearity="relu"
    ).std()  # fan_in is 256 · 256 there
    assert [deviation(model, str(i)) for i in (2, 4, 6, 8)] == pytest.approx([he.item() * 16] * 4, rel=0.01)


def test_closed_forms_of_pools_dropout_sums_and_padding() -> None:
    """Average of 4: v/4. Maximum of two normals: mean square 1. Dropout: 1/(1 − p). A sum of two: 2. Zeros: a share."""
    torch.manual_seed(0)
    wide = 64
    for between, square in (
        (nn.AvgPool1d(4), 0.25),
        (nn.MaxPool1d(2), 1.0),
        (nn.Dropout(0.2), 1.25),
        (nn.Identity(), 1.0),
    ):
        model = nn.Sequential(nn.Conv1d(wide, wide, 1), between, nn.Conv1d(wide, wide, 1))
        report = autoinit_(model, torch.randn(2, wide, 8))
        found = re.match(r"E\[x²\] = ([\d.]+)", report["2"].reason)
        assert found is not None
        assert float(found[1]) == pytest.approx(square, abs=1e-3), between

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(wide, wide) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    assert "E[x²] = 2:" in autoinit_(Sum(), torch.randn(2, wide))["c"].reason
    # 3 taps over 4 positions with one zero at each end: 10 of 12 taps are on the map.
    padded = nn.Conv1d(wide, wide, 3, padding=1)
    autoinit_(padded, torch.randn(2, wide, 4))
    assert deviation(padded, "") == pytest.approx(1 / math.sqrt(3 * wide * 10 / 12), rel=0.01)


class Mixed(nn.Module):
    """Sums, products, concatenations, pools, three activations, a transposed and a grouped convolution."""

    def __init__(self, wide: int = 128):
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Conv2d(i, wide, 3, padding=1) for i in (3, wide, wide, wide))
        self.d, self.pool = nn.Conv2d(2 * wide, wide, 3, padding=1, groups=2), nn.MaxPool2d(2)
        self.t, self.act, self.fc = nn.ConvTranspose2d(wide, wide, 2, 2), nn.SiLU(), nn.Linear(wide, 200)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = x + self.b(torch.relu(self.a(x)))
        z = self.d(torch.cat([y, self.c(torch.tanh(y))], 1))
        return self.fc(torch.relu(self.t(self.pool(self.act(z)))).mean((2, 3)))


def test_measured_mean_squares_are_those_promised() -> None:
    torch.manual_seed(0)
    model = Mixed()
    report = initialize(model, torch.randn(16, 3, 12, 12), method="autoinit")
    assert report.paths("set") == ("stem", "a", "b", "c", "d", "t", "fc")
    for row in report:
        assert row.promised == 1
        if row.path != "fc":  # the mean over a map leaves the channels' means, which are one draw's luck
            assert row.rms == pytest.approx(1, abs=0.25), row.path
    assert report.assumed == ("inputs of mean 0 and variance 1, independent over positions",)


def test_what_has_no_estimator_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cumsum(self.a(x).abs(), 1))

    report = autoinit_(Odd(), torch.randn(2, 8))
    assert any(line.startswith("cumsum at the root keeps the moments") for line in report.assumed)
    assert any(line.startswith("abs at the root") for line in report.assumed)


def test_inputs_of_another_scale_and_layers_that_are_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400).requires_grad_(False), nn.Linear(400, 400))
    with torch.no_grad():
        model[1].weight.normal_(0, 2 / 20)
        model[1].bias.zero_()
    report = autoinit_(model, torch.randn(2, 400), input_mean=3.0, input_var=7.0)
    assert deviation(model, "0") == pytest.approx(1 / math.sqrt(400 * 16), rel=0.01)
    assert [row.action for row in report] == ["set", "set", "frozen"]
    assert deviation(model, "2") == pytest.approx(1 / 40, rel=0.02)  # the frozen one doubles


def test_bad_input() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4)
    for call, match in (
        (lambda: autoinit_(model, x, input_var=-1.0), "input_var=-1.0: expected finite"),
        (lambda: autoinit_(model, x, input_var=0.0), "not both 0"),
        (lambda: autoinit_(model, x, distribution="gauss"), "unknown distribution"),
        (lambda: autoinit_(model), "no input tensor"),
        (lambda: autoinit_(model, torch.randn(2, 5)), "forward fails on inputs"),
        (lambda: autoinit_(model.to("meta"), x), "meta"),
        (
            lambda: autoinit_(parametrizations.spectral_norm(nn.Linear(4, 4)), x),
            "parametrized by SpectralNorm",
        ),
    ):
        with pytest.raises(UserError, match=match):
            call()
    half = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).bfloat16()
    autoinit_(half, torch.randn(2, 64).bfloat16())
    assert deviation(half, "2") == pytest.approx(math.sqrt(2 / 64), rel=0.03)
