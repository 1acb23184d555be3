"""DKS and TAT on graphs: DeepMind's constants found from our own graph, cosines predicted and measured, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from test_local_maps import DKS_SAYS
from torch import Tensor, nn
from torch.nn import functional as F

from nfnets.errors import UserError
from nfnets.init import dks_, initialize, tat_
from nfnets.layers import TailoredActivation

Build = Callable[[], nn.Module]


class PreActivation(nn.Module):
    """A block of three activations; the first of a stage projects behind its first activation."""

    def __init__(self, act: Build, width: int, projects: bool):
        super().__init__()
        self.acts = nn.ModuleList(act() for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.project = nn.Conv2d(width, width, 1) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.acts[0](x)
        shortcut = x if self.project is None else self.project(y)
        for index, conv in enumerate(self.convs):
            y = conv(y if index == 0 else self.acts[index](y))
        return shortcut + y


class ResNet101(nn.Module):
    """The papers' rescaled ResNet-101 by its topology, of 4 channels: a plain sum at every block."""

    def __init__(self, act: Build, width: int = 4, blocks: tuple[int, ...] = (3, 4, 23, 3)):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.blocks = nn.Sequential(
            *(PreActivation(act, width, block == 0) for count in blocks for block in range(count))
        )
        self.act, self.fc = act(), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.blocks(self.stem(x))).mean((2, 3)))


X = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "act", "method"),
    [
        ("tanh", nn.Tanh, "TAT"),
        ("softplus", nn.Softplus, "TAT"),
        ("softplus", nn.Softplus, "DKS"),
        ("silu", nn.SiLU, "DKS"),
    ],
)
def test_our_graph_gives_deepminds_constants(name: str, act: Build, method: str) -> None:
    if method == "TAT":
        report = tat_(ResNet101(act), X, tau=0.2, shortcut_weight=0.6)
    else:
        report = dks_(ResNet101(act), X, zeta=1.2, shortcut_weight=0.6)
    names = ("input_scale", "input_shift", "output_shift", "output_scale")
    assert [report.constants[n] for n in names] == pytest.approx(DKS_SAYS[name, method], rel=1e-6)


@pytest.mark.parametrize("act", [nn.ReLU, lambda: nn.LeakyReLU(0.2)])
def test_our_graph_gives_deepminds_slope(act: Build) -> None:
    report = tat_(ResNet101(act), X, eta=0.75, shortcut_weight=0.6)
    assert report.constants["negative_slope"] == pytest.approx(0.6291800290346146, abs=1e-7)
    assert report.constants["output_scale"] == pytest.approx(1.196996549778802, abs=1e-7)
    assert dks_(ResNet101(act), X, zeta=1.2, shortcut_weight=0.6).constants[
        "negative_slope"
    ] == pytest.approx(0.8761257073473065, abs=1e-6)


def pairs(width: int, cosine: float, count: int = 60) -> tuple[Tensor, Tensor]:
    """Two batches of white noise whose rows have this cosine to each other, each of mean square 1."""
    a, b = torch.randn(count, width), torch.randn(count, width)
    b = b - (a * b).sum(1, keepdim=True) / a.square().sum(1, keepdim=True) * a
    a, b = (F.normalize(t, dim=1) * math.sqrt(width) for t in (a, b))
    return a, cosine * a + math.sqrt(1 - cosine**2) * b


@pytest.mark.parametrize(
    ("initializer", "act"),
    [(tat_, nn.ReLU), (tat_, nn.Tanh), (dks_, nn.Softplus), (dks_, nn.ReLU), (dks_, nn.SiLU)],
)
@pytest.mark.parametrize(("weights", "width", "close"), [("normal", 2000, 0.02), ("delta", 500, 0.04)])
def test_cosines_and_squares_are_those_predicted(
    initializer, act: Build, weights: str, width: int, close: float
) -> None:
    """At every activation of a wide net on white noise: within 2 %; orthogonal ones are narrower, for time."""
    torch.manual_seed(0)
    layers = [layer for _ in range(10) for layer in (nn.Linear(width, width, bias=False), act())]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    a, b = pairs(width, 0.3)
    options = {"eta": 0.7} if act is nn.ReLU and initializer is tat_ else {}
    report = initializer(model, torch.stack([a[0], b[0]]), weights=weights, **options)
    with torch.no_grad():
        for index, module in enumerate(model):
            a, b = module(a), module(b)
            if isinstance(module, TailoredActivation):
                row = report[str(index)]
                assert float(F.cosine_similarity(a, b).mean()) == pytest.approx(
                    row.promised_cosine, abs=close
                ), index
                assert float(a.square().mean().sqrt()) == pytest.approx(row.promised, rel=2 * close)


class Residual(nn.Module):
    """One activation module for two places, where the mean squares differ: a LeakyReLU does not mind."""

    def __init__(self, width: int):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(width, width), nn.Linear(width, width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(self.act(x.clone()))))
        y += x
        return y


class Dense(nn.Module):
    """What a layer puts out stands beside its input, of another mean square."""

    def __init__(self, width: int):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(2 * width, width), nn.Linear(width, width)
        self.act, self.act2 = nn.Tanh(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.a(self.act(x)) + self.c(x)], 1)
        return self.b(self.act2(x))


@pytest.mark.parametrize("block", [Residual, Dense])
def test_sums_and_concatenations_are_as_predicted(block) -> None:
    torch.manual_seed(0)
    width = 800
    model = nn.Sequential(nn.Linear(width, width), *(block(width) for _ in range(5)), nn.Linear(width, 10))
    options = {"eta": 0.4} if block is Residual else {"tau": 2.0}
    a, b = pairs(width, 0.3)
    report = tat_(model, torch.stack([a[0], b[0]]), **options)
    with torch.no_grad():
        for index in range(6):
            a, b = model[index](a), model[index](b)
        # A weighted layer keeps the cosine of what it reads.
        assert float(F.cosine_similarity(a, b).mean()) == pytest.approx(report["6"].promised_cosine, abs=0.03)
        grown = 1.2**5 if block is Residual else 1.0  # each of 5 branches adds a fifth of its shortcut
        assert float(a.square().mean()) == pytest.approx(grown, rel=0.15)
        assert float(model[6](a).square().mean()) == pytest.approx(1, rel=0.4)
    assert not any("unmixed" in line for line in report.assumed)


def test_a_post_activation_stream_is_named() -> None:
    """torchvision's ResNet, whose blocks call one ReLU inside the branch and behind the sum with another's output."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=nn.Identity, num_classes=4)
    model.maxpool = nn.Identity()
    report = initialize(model, torch.randn(8, 3, 32, 32), method="tat", eta=0.8, weights="orthogonal")
    for row in report:
        if row.path != "fc":
            assert 0.5 < row.rms / row.promised < 3, row.path
    assert sum(isinstance(m, TailoredActivation) for m in model.modules()) == 9
    assert "a branch has 0.125 of the mean square of its shortcut" in report.assumed
    assert "layer1.0.relu and 4 more read normal values of mean 0" in str(report)


def test_again_gives_the_same_constants() -> None:
    model = ResNet101(nn.ReLU)
    first = tat_(model, X, eta=0.75)
    again = tat_(model, X, eta=0.75)
    assert again.constants == first.constants
    assert isinstance(model.act.activation, nn.LeakyReLU)
    assert dks_(ResNet101(nn.Tanh), X, zeta=1.2).constants == pytest.approx(
        dks_(ResNet101(nn.Tanh), X, zeta=1.2).constants
    )


def test_the_last_activation_and_left_layers_stay() -> None:
    model = nn.Sequential(
        *(layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 4), nn.ReLU()
    )
    model[4].requires_grad_(False)
    before = model[4].weight.clone()
    report = tat_(model, torch.randn(4, 8), eta=0.8)
    assert type(model[41]) is nn.ReLU
    assert report["4"].action == "frozen"
    assert torch.equal(model[4].weight, before)


def test_transposed_even_and_grouped_kernels_keep_the_mean_square() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(64, 64, 2), nn.ReLU(), nn.ConvTranspose2d(64, 64, 2, 2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, groups=8, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2), nn.ReLU()),
        nn.Conv2d(128, 32, 1),
    )
    report = initialize(model, torch.randn(16, 64, 9, 9), method="tat", eta=0.3)
    for row in report:
        assert row.promised == pytest.approx(1)
        assert row.rms == pytest.approx(1, rel=0.2), row


def test_half_precision() -> None:
    layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(64, 4)).bfloat16()
    report = initialize(model, torch.randn(64, 64).bfloat16(), method="tat")
    assert report["39"].rms == pytest.approx(1, rel=0.2)


def linear(*acts: nn.Module, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        *(layer for act in acts for layer in (nn.Linear(width, width), act)), nn.Linear(width, 4)
    )


class Functional(nn.Module):
    def __init__(self, wrong: str):
        super().__init__()
        self.a, self.b, self.wrong, self.act = nn.Linear(8, 8), nn.Linear(8, 8), wrong, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.wrong == "relu":
            return self.b(F.relu(self.a(x)))
        y = self.act(self.a(x))
        return self.b(y * torch.sigmoid(y) if self.wrong == "gate" else torch.cumsum(y, 1))


def test_bad_input_is_one_line_and_changes_nothing() -> None:
    x = torch.randn(4, 8)
    shared = nn.Tanh()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), shared

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.a(x) + self.b(self.act(self.a(x)))))

    for call, match in (
        (lambda m: tat_(m, x, eta=1.0), "eta=1.0: expected a number between 0 and 1"),
        (lambda m: tat_(m, x, tau=0.0), "tau=0.0: expected a number above 0"),
        (lambda m: dks_(m, x, zeta=1.0), "zeta=1.0: expected a number above 1"),
        (lambda m: tat_(m, x, shortcut_weight=1.0), "shortcut_weight=1.0"),
        (lambda m: tat_(m, x, weights="gauss"), "unknown weights 'gauss'"),
        (lambda m: tat_(m, x), "too shallow for it, with plain ReLUs .* come to 0.494 only; pass eta=0.49"),
        (lambda m: tat_(linear(nn.ReLU(), nn.Tanh()), x), "ReLU at 1 and Tanh.. at 3: it takes either"),
        (lambda m: tat_(linear(nn.SELU()), x), "SELU.*no constants"),
        (lambda m: tat_(linear(nn.PReLU()), x), "no constants for PReLU at 1"),
        (lambda m: tat_(linear(nn.BatchNorm1d(8), nn.ReLU()), x), "normalizes at 1"),
        (lambda m: dks_(linear(nn.LayerNorm(8), nn.ReLU()), x), "normalizes at 1"),
        (lambda m: tat_(Functional("relu"), x), "relu at the root is called as a function"),
        (
            lambda m: tat_(Functional("gate"), x),
            "sigmoid at the root is called as a function|no C map for mul",
        ),
        (lambda m: tat_(Functional("cumsum"), x, eta=0.1), "no C map for cumsum at the root"),
        (lambda m: tat_(Twice(), x), "give|a module of its own for each call"),
        (lambda m: tat_(nn.Sequential(nn.Linear(8, 8)), x), "no activation that a weighted layer follows"),
        (lambda m: tat_(m, 0 * x), "mean square 0"),
        (lambda m: tat_(m.to("meta"), x), "meta"),
    ):
        model = linear(nn.ReLU(), nn.ReLU())
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UserError, match=match) as error:
            call(model)
        assert "\n" not in str(error.value)
        assert type(model[1]) is nn.ReLU
        if not model[0].weight.is_meta:
            assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
