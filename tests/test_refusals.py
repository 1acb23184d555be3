"""What a user can get wrong is said in one line: what was given, what was expected; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from nfnets import attach_agc, convert, create_model, param_groups, verify
from nfnets.convert import list_methods
from nfnets.convert import register as add_method
from nfnets.convert.methods.base import _METHODS, Method
from nfnets.convert.methods.evonorm_s0 import EvoNormS0
from nfnets.convert.methods.ghost_bn import GhostBatchNorm
from nfnets.convert.methods.gn import GN
from nfnets.errors import UserError
from nfnets.init import fixup_, lsuv_, skipinit_
from nfnets.layers import ScaledStdConv2d, SkipInit
from nfnets.models.cifar_resnet import CifarResNet
from nfnets.models.config import NormFreeConfig
from nfnets.models.registry import register
from nfnets.scale.knob import knob

X = torch.randn(4, 3, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(y)) + x.mean()


def _method(base: type[Any], body: dict[str, Any]) -> type[Any]:
    return type("Mine", (base,), body | {"decide": lambda self, net: []})


def _by_silent() -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_METHODS, "silent", dataclass(_method(Method, {"name": "silent"})))
        return convert(net(), X, method="silent")


@dataclass
class Needy(GN):
    name = "needy"
    amount: float = field(kw_only=True)


@pytest.fixture(autouse=True)
def _needy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_METHODS, "needy", Needy)


def test_a_method_that_is_defined_again_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfnets.convert.methods.base._METHODS", {})
    first, second = (dataclass(_method(GN, {"name": "mine"})) for _ in range(2))
    assert add_method(first) is first
    assert add_method(second) is second
    assert list_methods() == {"mine": second}


class Wrapped(nn.Module):
    pass


Wrapped.__name__ = "FullyShardedDataParallel"


class Block(nn.Module):
    def __init__(self, last: nn.Module):
        super().__init__()
        self.first, self.last, self.skip = nn.Conv2d(3, 3, 3, padding=1), last, SkipInit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.skip(self.last(self.first(x).relu()))


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3, padding=1))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no class": (lambda: create_model("nf_resnet26", num_classes=-1), "num_classes=-1"),
    "no channel": (lambda: create_model("nf_resnet26", in_chans=0), "in_chans=0"),
    "dropout of 1": (lambda: create_model("nf_resnet26", drop_rate=1.0), "drop_rate=1.0"),
    "no such pool": (lambda: CifarResNet(8, global_pool="median"), "global_pool='median'"),
    "no such activation": (
        lambda: create_model("nf_resnet26", activation="sine"),
        "unknown activation 'sine'",
    ),
    "no such option": (lambda: create_model("nf_resnet26", attentoin="se"), "attentoin"),
    "two widths": (lambda: NormFreeConfig((1, 1), (64,)), "as many of each"),
    "no width": (lambda: NormFreeConfig((1,), (0,), strides=(1,)), "expected positive"),
    "a basic block's middle": (
        lambda: NormFreeConfig((1,), (8,), strides=(1,), block="basic", extra_conv=True),
        "no middle",
    ),
    "depth 9": (lambda: CifarResNet(9), "depth=9"),
    "width 0": (lambda: CifarResNet(8, width=0), "width=0"),
    "no such shortcut": (lambda: CifarResNet(8, shortcut="padd"), "did you mean pad"),  # type: ignore[arg-type]
    "a taken name": (lambda: register("nf_resnet50", lambda **_: net()), "already registered"),
    "a negative rate": (lambda: param_groups(net(), lr=-1.0, weight_decay=0.0), "lr=-1.0"),
    "nothing to train": (
        lambda: param_groups(net().requires_grad_(False), lr=0.1, weight_decay=0.0),
        "no trainable parameters",
    ),
    "a lazy parameter": (
        lambda: param_groups(nn.Sequential(nn.LazyLinear(3)), lr=0.1, weight_decay=0.0),
        "lazy parameter 0.weight",
    ),
    "one sample": (lambda: verify.batch_independence(net(), X[:1]), "2 samples or more"),
    "no samples": (lambda: verify.batch_independence(Constant(), X), "nothing to compare"),
    "other outputs": (lambda: verify.same_function(net(), nn.Identity(), X), "same outputs"),
    "ghosts of no sample": (lambda: GhostBatchNorm(3, size=0), "size=0"),
    "ghost_bn of no sample": (lambda: convert(net(), X, method="ghost_bn", size=0), "size=0"),
    "no group": (lambda: convert(net(), X, method="gn", num_groups=0), "num_groups=0"),
    "no EvoNorm group": (lambda: convert(net(), X, method="evonorm_s0", num_groups=0), "num_groups=0"),
    "four groups of six": (lambda: EvoNormS0(6, num_groups=4), "does not divide 6"),
    "an option of fold": (lambda: convert(net(), X, method="fold", alpha=1), "it takes no options"),
    "α of 0": (lambda: convert(net(), X, alpha=0.0), "alpha=0.0"),
    "another type": (lambda: convert(net(), X, alpha="big"), "alpha='big': expected float"),
    "true as a number": (lambda: convert(net(), X, alpha=True), "alpha=True: expected float"),
    "a fraction of groups": (
        lambda: convert(net(), X, method="gn", num_groups=2.0),
        "num_groups=2.0: expected int",
    ),
    "a fraction of a chunk": (
        lambda: convert(net(), X, method="ghost_bn", size=2.0),
        "size=2.0: expected int",
    ),
    "a word for no": (
        lambda: convert(net(), X, method="fixed_variance", measure="no"),
        "measure='no': expected bool",
    ),
    "a long option": (lambda: convert(net(), X, alpha=X), "alpha=a Tensor: expected float"),
    "no method": (lambda: convert(net(), X, method=None), "method=None: expected str"),  # type: ignore[arg-type]
    "a class of a method": (lambda: convert(net(), X, method=GN), "pass one of bcn, derf, dyt, evonorm_s0"),  # type: ignore[arg-type]
    "two methods": (lambda: convert(net(), X, method=["nf"]), r"method=\['nf'\]"),  # type: ignore[arg-type]
    "a number as a pattern": (lambda: convert(net(), X, include=5), "include=5: expected str"),  # type: ignore[arg-type]
    "numbers as patterns": (lambda: convert(net(), X, include=[5]), r"include=\[5\]"),  # type: ignore[list-item]
    "bytes as a pattern": (lambda: convert(net(), X, exclude=b"0"), "exclude=b'0'"),  # type: ignore[arg-type]
    "a word for inplace": (lambda: convert(net(), X, inplace="no"), "inplace='no': expected bool"),  # type: ignore[arg-type]
    "a word for strict": (lambda: convert(net(), X, strict="no"), "strict='no': expected bool"),  # type: ignore[arg-type]
    "a tensor for kwargs": (lambda: convert(net(), kwargs=X), "kwargs is a Tensor"),  # type: ignore[arg-type]
    "no tensor where one belongs": (
        lambda: convert(Second(), X, "text"),
        r"got \(str, .*int\); nothing was changed, pass example",
    ),
    "no method class": (lambda: add_method(3), "3 as a method"),  # type: ignore[arg-type]
    "no dataclass": (lambda: add_method(_method(Method, {"name": "mine"})), "add @dataclass"),
    "no name": (lambda: add_method(_method(GN, {"name": ""})), "has no name"),
    "no rows": (lambda: add_method(dataclass(type("Idle", (Method,), {"name": "idle"}))), "define it"),
    "a built-in's name": (lambda: add_method(_method(GN, {"name": "nf"})), "rename it"),
    "a method without changes": (lambda: _by_silent(), "no change for 1: expected one per norm layer"),
    "an option without default": (
        lambda: convert(net(), X, method="needy"),
        "without amount: expected a value",
    ),
    "lazy statistics": (
        lambda: convert(nn.Sequential(nn.Conv2d(3, 3, 3), nn.LazyBatchNorm2d(affine=False)), X),
        "run the model once",
    ),
    "lazy layers": (
        lambda: convert(nn.Sequential(nn.LazyConv2d(3, 3), nn.BatchNorm2d(3)), X),
        "run the model once",
    ),
    "data parallel": (lambda: convert(nn.Sequential(nn.DataParallel(net())), X), "expected the bare model"),
    "FSDP 1": (lambda: attach_agc(torch.optim.SGD(net().parameters()), Wrapped()), "use fully_shard"),
    "spectral norm, Fixup": (lambda: fixup_(Block(spectral()), X), "remove the parametrization"),
    "spectral norm, SkipInit": (lambda: skipinit_(Block(spectral()), X), "remove the parametrization"),
    "spectral norm, LSUV": (lambda: lsuv_(Block(spectral()), X), "cannot be scaled"),
}


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


@pytest.mark.parametrize("what", REFUSED)
def test_one_line_says_what_was_given(what: str) -> None:
    call, expected = REFUSED[what]
    with pytest.raises(UserError, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_reports_know_their_rows() -> None:
    report = lsuv_(nn.Sequential(nn.Conv2d(3, 4, 3)), X)
    assert report["0"].action == "set"
    with pytest.raises(KeyError, match="conv"):
        report["conv"]


def test_frozen_scalars_and_layers_are_listed_and_left() -> None:
    model = Block(nn.Conv2d(3, 3, 3, padding=1))
    model.skip.gain.requires_grad_(False)
    with torch.no_grad():
        model.skip.gain.fill_(0.5)
    model.first.weight.requires_grad_(False)
    before = model.first.weight.clone()
    report = skipinit_(model, X)
    assert set(report.paths("frozen")) == {"skip.gain", "first"}
    assert float(model.skip.gain) == 0.5
    assert torch.equal(model.first.weight, before)


def test_a_layer_that_does_not_follow_its_weight_is_left_by_lsuv() -> None:
    class Squashes(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).tanh()

    model = nn.Sequential(Squashes(3, 4, 3), nn.Conv2d(4, 4, 3))
    before = [p.clone() for p in model[0].parameters()]
    report = lsuv_(model, X, orthonormal=False, strict=False)
    assert report["0"].action == "refused"
    assert all(map(torch.equal, model[0].parameters(), before))
    with pytest.raises(UserError, match="does not follow its weight"):
        lsuv_(model, X, orthonormal=False)


def test_orthonormal_weights_of_a_transposed_convolution() -> None:
    """Rows are what feeds one output channel: (in, kernel) of a group."""
    layer = nn.ConvTranspose2d(8, 6, 2, groups=2, bias=False)
    lsuv_(nn.Sequential(layer), torch.randn(4, 8, 5, 5))
    rows = layer.weight.detach().unflatten(0, (2, 4)).transpose(1, 2).reshape(6, -1)
    gram = rows @ rows.T
    torch.testing.assert_close(gram, torch.eye(6) * gram[0, 0], rtol=1e-4, atol=1e-4)


def test_old_weight_norm_is_scaled_by_its_magnitude() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(5, 4))
    direction = layer.weight_v.clone()
    model = nn.Sequential(layer)
    lsuv_(model, torch.randn(64, 5), orthonormal=False)
    assert torch.equal(layer.weight_v, direction)
    assert isinstance(knob(ScaledStdConv2d(3, 4, 3)).parameter, nn.Parameter)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = small()
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    groups = model.group_matcher()
    assert groups.keys() == {"stem", "blocks"}
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).ndim == 2
    assert not any("conv" in name and name.endswith("weight") for name in model.no_weight_decay())


def small() -> Any:
    from nfnets.models.norm_free import NormFreeNet

    return NormFreeNet(NormFreeConfig((1, 1), (8, 16), strides=(1, 2), stem_width=8), num_classes=3)
