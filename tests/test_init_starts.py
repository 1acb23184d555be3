"""Weight normalization, self-normalizing nets and ZerO: torch's own layers, fixed points, Hadamard matrices."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats
from scipy.linalg import hadamard
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from nfnets.errors import UserError
from nfnets.init import initialize, selu_, weight_norm_, zero_
from nfnets.layers import TailoredActivation


def channels(out: Tensor) -> tuple[Tensor, Tensor]:
    rows = out.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.std(1)


class Block(nn.Module):
    def __init__(self, width: int = 16, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.act, self.drop = act(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.drop(self.act(self.a(x))))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Conv2d(3, 16, 3, bias=False),
            nn.ReLU(),
            Block(),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 12, 2, 2),
            nn.ReLU(),
        ),
        *(nn.Conv2d(12, 24, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 100, 10)),
    )


X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
LAYERS = ("0", "2.a", "2.b", "4", "6", "9")


def test_every_channel_starts_at_mean_0_and_variance_1() -> None:
    """OpenAI's start: in one ordinary forward pass of torch's weight norm each pre-activation is normal."""
    model = net()
    weight_norm_(model, X)
    seen = {}
    for path in LAYERS:
        model.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.update({path: o}))
    with torch.no_grad():
        model(X)
    for path, out in seen.items():
        mean, std = channels(out)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=2e-5, rtol=0)
        torch.testing.assert_close(std, torch.ones_like(std), atol=2e-4, rtol=0)
        chain = model.get_submodule(path).parametrizations.weight
        assert [type(step).__name__ for step in chain] == ["_WeightNorm"]
        assert chain.original1.std().item() == pytest.approx(0.05, rel=0.25)  # v is as it was drawn
        dim = 1 if path == "4" else 0
        redone = torch._weight_norm(chain.original1, chain.original0, dim)
        torch.testing.assert_close(model.get_submodule(path).weight, redone)


def test_one_layer_by_the_papers_formula() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4), torch.randn(64, 8) + 1
    weight_norm_(model, x)
    v = model.parametrizations.weight.original1.detach()
    t = x @ (v / v.norm(dim=1, keepdim=True)).T
    g = 1 / t.std(0)
    torch.testing.assert_close(model.parametrizations.weight.original0.flatten(), g, rtol=1e-3, atol=0)
    torch.testing.assert_close(model.bias, -t.mean(0) * g, rtol=1e-3, atol=1e-5)


def test_weight_norm_trains_and_can_be_taken_out() -> None:
    model = net()
    report = initialize(model, X, method="weight_norm")
    assert report.paths("set") == LAYERS
    assert "a bias added" in report["0"].reason
    before = model(X)
    before.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    for path in LAYERS:
        parametrize.remove_parametrizations(model.get_submodule(path), "weight")
    torch.testing.assert_close(model(X), before)


def test_weight_norm_refuses_and_changes_nothing() -> None:
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2, bias=False), nn.Conv2d(4, 4, 1, bias=False))
    with pytest.raises(UserError, match="0: a grouped transposed convolution has no g per output channel"):
        weight_norm_(grouped, torch.randn(4, 4, 4, 4))
    report = weight_norm_(grouped, torch.randn(4, 4, 4, 4), strict=False)
    assert report["0"].action == "refused"
    assert report["1"].action == "set"
    with pytest.raises(UserError, match="0: a gain or norm beside its weight"):
        weight_norm_(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), torch.randn(8, 4))

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    broken = Breaks()
    weight = broken.a.weight.clone()
    with pytest.raises(UserError, match="forward fails"):
        weight_norm_(broken, torch.randn(8, 4))
    assert broken.a.bias is None
    assert not parametrize.is_parametrized(broken.a)
    assert torch.equal(broken.a.weight, weight)


def test_selus_fixed_point_holds_through_a_deep_net() -> None:
    """E[selu(z)] = 0 and Var = 1 by SciPy; then 30 layers of a wide net with alpha dropout in training."""
    scale, a = 1.0507009873554805, 1.6732632423543772
    selu = lambda z: scale * (z if z > 0 else a * math.expm1(z))  # noqa: E731
    for power, expected in ((1, 0.0), (2, 1.0)):
        got = integrate.quad(lambda z, p=power: selu(z) ** p * stats.norm.pdf(z), -12, 12, points=[0])[0]
        assert got == pytest.approx(expected, abs=1e-7)
    torch.manual_seed(0)
    layers = [m for _ in range(30) for m in (nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.05))]
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    x = torch.randn(256, 512)
    report = initialize(model, x, method="selu")
    assert [type(m) for m in model[:3]] == [nn.Linear, nn.SELU, nn.AlphaDropout]
    assert model[2].p == 0.05
    assert torch.equal(model[1](x), nn.functional.selu(x))
    for path in ("30", "60", "87"):
        assert report[path].rms == pytest.approx(1, abs=0.15), path
    assert report["87"].promised == 1


def test_selu_leaves_the_last_activation_and_gates() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gate, self.act, self.last = (
                *(nn.Linear(8, 8), nn.Linear(8, 8)),
                *(nn.Sigmoid(), nn.ReLU(), nn.Tanh()),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.last(self.b(self.gate(x) * self.act(x)))

    model = Gated()
    selu_(model, torch.randn(2, 8))
    assert [type(m) for m in (model.gate, model.act, model.last)] == [nn.Sigmoid, nn.SELU, nn.Tanh]
    conv = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Dropout2d(0.2), TailoredActivation(nn.ReLU()), nn.Conv2d(8, 8, 1)
    )
    selu_(conv, torch.randn(2, 3, 4, 4))
    assert [type(m) for m in conv[1:3]] == [nn.FeatureAlphaDropout, nn.SELU]


@pytest.mark.parametrize("outputs", [2, 5, 8, 24])
def test_zero_is_scipys_hadamard(outputs: int) -> None:
    inputs = (outputs + 1) // 2
    model = nn.Linear(inputs, outputs)
    zero_(model, torch.randn(1, inputs))
    steps = math.ceil(math.log2(outputs))
    expected = hadamard(2**steps)[:outputs, :inputs] * 2 ** (-(steps - 1) / 2)
    torch.testing.assert_close(model.weight.detach().double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_zero_starts_residual_nets_at_the_identity_and_breaks_the_rank() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(16, 4))
    x = torch.randn(16, 3, 5, 5)
    report = initialize(model, x, method="zero")
    assert report["1.b"].reason == "zero: branch end"
    assert report["4"].reason == "zero: classifier"
    out = model[0](x)
    assert torch.equal(model[1](out), out)
    assert torch.equal(model[1].a(out), out)  # an identity
    assert model(x).eq(0).all()
    again = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Block(), nn.Flatten(), nn.Linear(400, 4))
    initialize(again, x, method="zero", generator=torch.Generator().manual_seed(3))
    assert torch.equal(again[0].weight, model[0].weight)  # nothing is random
    # The paper's point: 3 inputs widened to 64 units, whose hidden gradient has more than rank 3 after a step.
    wide = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    initialize(wide, torch.randn(2, 3), method="zero")
    y = torch.randint(8, (256,), generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(wide(torch.randn(256, 3)), y).backward()
    assert int(torch.linalg.matrix_rank(wide[2].weight.grad)) > 3


def test_norm_layers_and_functions_are_refused() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(4, 4)
    for model, match in (
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)), "normalizes at 1"),
        (Functional(), "relu at the root is called as a function"),
        (nn.Sequential(nn.ReLU()), "no convolution or linear"),
    ):
        with pytest.raises(UserError, match=match):
            selu_(model, x)
