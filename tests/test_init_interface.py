"""One interface to every initializer: torch's own draws, what is left and why, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from scipy.stats import truncnorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nfnets.convert import convert
from nfnets.errors import UserError
from nfnets.init import draw_, initialize, list_initializers, register, zero_gamma_
from nfnets.init.registry import _KNOWN
from nfnets.scale.report import Report, Row


def keyed(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )


WEIGHTED = ("0", "2", "5")


@pytest.mark.parametrize(
    ("method", "options", "torchs"),
    [
        ("he", {}, lambda w, g: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=g)),
        (
            "he",
            {"distribution": "uniform"},
            lambda w, g: nn.init.kaiming_uniform_(w, nonlinearity="relu", generator=g),
        ),
        ("glorot", {}, lambda w, g: nn.init.xavier_normal_(w, generator=g)),
        ("glorot", {"distribution": "uniform"}, lambda w, g: nn.init.xavier_uniform_(w, generator=g)),
        ("lecun", {}, lambda w, g: nn.init.kaiming_normal_(w, nonlinearity="linear", generator=g)),
        ("glorot", {"gain": 5 / 3}, lambda w, g: nn.init.xavier_normal_(w, 5 / 3, generator=g)),
    ],
)
def test_draws_are_torchs(method: str, options: dict, torchs) -> None:
    model, ours, theirs = net(), keyed(), keyed()
    report = initialize(model, method=method, generator=ours, **options)
    assert report.paths("set") == WEIGHTED
    for path in WEIGHTED:
        expected = torchs(torch.empty_like(model.get_submodule(path).weight), theirs)
        torch.testing.assert_close(model.get_submodule(path).weight, expected, rtol=1e-6, atol=0)
        assert not model.get_submodule(path).bias.any()


def test_orthogonal_is_an_isometry_as_torchs() -> None:
    model = net()
    initialize(model, method="orthogonal", gain=1.0)
    for path in WEIGHTED:
        rows = model.get_submodule(path).weight.detach().flatten(1)
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=2e-6, rtol=0)
    # The distribution: every entry of a Haar matrix has variance 1/n, as torch's has.
    found = [initialize(m, method="orthogonal") and m[5].weight.var().item() for m in (net(), net())]
    assert found == pytest.approx([2 / 256] * 2, rel=0.05)


def test_truncated_normal_has_its_standard_deviation_and_no_tail() -> None:
    model = nn.Linear(400, 400)
    initialize(model, method="truncated_normal", generator=keyed())
    std, cut = 1 / 20, 2 * (1 / 20) / float(truncnorm.std(-2, 2))
    assert model.weight.std().item() == pytest.approx(std, rel=0.01)
    assert model.weight.abs().max().item() <= cut
    assert model.weight.abs().max().item() == pytest.approx(cut, rel=0.01)


def test_delta_orthogonal_says_where_it_cannot_be() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 8, 3, groups=2)
    )
    report = initialize(model, method="delta_orthogonal", gain=1.0)
    centre = model[0].weight.detach()[:, :, 1, 1]
    torch.testing.assert_close(centre @ centre.T, torch.eye(8), atol=1e-6, rtol=0)
    assert int(model[0].weight.count_nonzero()) == 64
    assert "more inputs than outputs" in report["1"].reason
    assert "even kernel" in report["2"].reason
    for block in model[3].weight.detach()[:, :, 1, 1].split(4):
        torch.testing.assert_close(block.T @ block, torch.eye(2), atol=1e-6, rtol=0)


def test_transposed_and_grouped_layers_keep_the_mean_square() -> None:
    """He's rule is about the weights that one output reads, in any layout."""
    torch.manual_seed(0)
    for layer, x in (
        (nn.ConvTranspose2d(64, 32, 3, groups=2), torch.randn(8, 64, 6, 6)),
        (nn.Conv1d(64, 32, 3, groups=4), torch.randn(64, 64, 6)),
    ):
        initialize(layer, method="lecun")
        inner = layer(x)[..., 2:-2, 2:-2] if x.ndim == 4 else layer(x)
        assert inner.square().mean().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_gamma_is_torchvisions(name: str) -> None:
    build = torchvision.models.get_model
    torch.manual_seed(0)
    ours = build(name, num_classes=4)
    torch.manual_seed(0)
    theirs = build(name, num_classes=4, zero_init_residual=True)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    zero_gamma_(ours, torch.randn(2, 3, 32, 32))
    expected = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert (
        sum(not torch.equal(before[k], v) for k, v in expected.items())
        == {"resnet18": 8, "resnet50": 16}[name]
    )


class Block(nn.Module):
    def __init__(self, end: nn.Module | None = None):
        super().__init__()
        self.a, self.b, self.end = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            end or nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.b(self.a(x).relu()))


def test_zero_gamma_without_norm_layers_and_behind_a_relu() -> None:
    x = torch.randn(2, 4, 5, 5)
    model = nn.Sequential(Block(), Block(nn.ReLU()), Block(nn.GroupNorm(2, 4)))
    report = initialize(model, x, method="zero_gamma")
    assert report.paths("set") == ("0.b", "2.end")
    assert report.paths("skipped") == ("1",)
    assert torch.equal(model[0](x), x)
    assert torch.equal(model[2](x), x)
    model[0](x).sum().backward()
    assert model[0].b.weight.grad is not None
    assert bool(model[0].b.weight.grad.any())


def test_what_is_measured_stands_beside_each_layer() -> None:
    model, x = net(), torch.randn(64, 3, 8, 8)
    report = initialize(model, x, method="he", generator=keyed())
    with torch.no_grad():
        outs = [model[0](x), model[:3](x), model(x)]
    for path, out in zip(WEIGHTED, outs, strict=True):
        row = report[path]
        assert row.rms == pytest.approx(out.square().mean().sqrt().item(), rel=1e-5)
        assert row.std == pytest.approx(out.std(correction=0).item(), rel=1e-5)
        rows = nn.functional.normalize(out[:32].flatten(1), dim=1)
        gram = rows @ rows.T
        assert row.cosine == pytest.approx((gram.sum() - 32).item() / (32 * 31), abs=1e-5)
    assert math.isnan(initialize(model, x, method="he", measure=False)["0"].rms)


def test_left_layers_say_why() -> None:
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 8))
    )
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    with pytest.raises(UserError, match=r"3: a gain or norm beside its weight"):
        initialize(model, method="he")
    before = model[2].weight.clone(), model[3].weight.detach().clone()
    report = initialize(model, method="he", strict=False)
    assert [row.action for row in report] == ["set", "shared", "frozen", "refused"]
    assert torch.equal(model[2].weight, before[0])
    assert torch.equal(model[3].weight, before[1])


def test_half_precision_is_drawn_in_full() -> None:
    full, half = nn.Linear(64, 64), nn.Linear(64, 64).bfloat16()
    for method in ("he", "orthogonal", "truncated_normal"):
        initialize(full, method=method, generator=keyed())
        initialize(half, method=method, generator=keyed())
        assert torch.equal(half.weight, full.weight.bfloat16()), method


def test_bad_input_is_one_line_and_changes_nothing() -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 3, 8, 8)
    for call, match in (
        (lambda: initialize(model, method="hee"), "did you mean he"),
        (lambda: initialize(model, method=3), "method=3: expected an initializer's name"),
        (lambda: initialize(model, method="he", gian=2.0), "did you mean gain"),
        (lambda: initialize(model, method="he", weights="lecun"), "unknown option of initializer 'he'"),
        (lambda: initialize(model, method="he", gain=-1.0), "gain=-1.0: expected a finite number above 0"),
        (lambda: initialize(model, method="orthogonal", distribution="uniform"), "leave it out"),
        (lambda: initialize(model, method="lsuv"), "'lsuv' without inputs"),
        (lambda: initialize(model, method="fixup"), "reads their shapes"),
        (lambda: initialize(model, x, method="he", layers=["7"]), "unknown layer '7'"),
        (lambda: initialize(model, torch.randn(4, 5, 8, 8), method="he"), "forward fails on inputs"),
        (lambda: initialize(net().to("meta"), method="he"), "meta device"),
        (lambda: initialize(nn.Sequential(nn.LazyLinear(3)), method="he"), "is lazy"),
        (lambda: initialize(nn.ReLU(), method="he"), "no convolution or linear layer"),
        (lambda: initialize([], method="he"), "expected an nn.Module"),
        (lambda: initialize(model, x, method="he", kwargs={"gain": x}), "kwargs holds gain"),
        (lambda: zero_gamma_(model, x), "no residual branch"),
        (lambda: draw_(model, weights="hee"), "did you mean he"),
    ):
        with pytest.raises(UserError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_standardized_nets_are_refused_by_name() -> None:
    model = convert(torchvision.models.resnet18(num_classes=4), torch.randn(4, 3, 32, 32), method="nf")
    with pytest.raises(UserError, match="conv1: a gain or norm beside its weight sets its size"):
        initialize(model, method="he")


def test_an_initializer_of_ones_own() -> None:
    def ones_(model: nn.Module, *inputs: Tensor, value: float = 1.0) -> Report:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        return Report("ones", [Row("", "set")])

    register("ones", ones_, "everything 1", reads="nothing")
    try:
        model = nn.Linear(2, 2)
        initialize(model, method="ones", value=2.0)
        assert model.weight.eq(2).all()
        assert list_initializers()["ones"] == "everything 1"
    finally:
        _KNOWN.pop("ones")
    with pytest.raises(UserError, match="expected a name and a function"):
        register("", ones_, "")
