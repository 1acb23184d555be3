"""What a conversion would lose, or cannot see, is refused with a reason and left: never converted in silence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from soak import thinned
from timm.layers import BatchNormAct2d, DropBlock2d, FrozenBatchNormAct2d, SplitBatchNorm2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn

from nfnets import verify
from nfnets.convert import ConversionError, convert, list_methods, plan
from nfnets.convert.methods.ghost_bn import GhostBatchNorm
from nfnets.errors import UserError
from nfnets.trace import is_batch_norm_like

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class BNReLU(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Leaky(nn.Module):
    """As InPlaceABN: the activation is a name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.num_features, self.eps, self.activation = channels, 1e-5, "leaky_relu"

    def forward(self, x: Tensor) -> Tensor:
        out = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)  # type: ignore[arg-type]
        return F.leaky_relu(out)


class PlusOne(nn.BatchNorm2d):
    """γ counts from 1: at the start it is hard to tell."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.weight is not None
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            1 + self.weight,
            self.bias,
            self.training,
            eps=self.eps,
        )


class ChannelsLast(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class NoEps(Leaky):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.eps


class Patched(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.forward = lambda x: x * 2  # type: ignore[method-assign]


class Plain(nn.BatchNorm2d):
    """A forward of its own that adds nothing."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous())


class Conditional(nn.BatchNorm2d):
    """Class-conditional."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gains = nn.Embedding(10, channels)

    def forward(self, input: Tensor, y: Tensor | None = None) -> Tensor:
        out = super().forward(input)
        return out if y is None else out * self.gains(y)[:, :, None, None]


class Net(nn.Module):
    """A site to convert before the one in question, in a residual net."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), norm
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return x + self.bn3(self.conv3(self.between(self.conv2(x))))

    def between(self, x: Tensor) -> Tensor:
        return self.bn2(x)


class Last(Net):
    def between(self, x: Tensor) -> Tensor:
        return self.bn2(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ByClass(Net):
    def __init__(self, norm: nn.Module, *more: Any) -> None:
        super().__init__(norm)
        self.more = more

    def between(self, x: Tensor) -> Tensor:
        return self.bn2(x, *self.more)


class Reading(Net):
    """Reads something of a norm layer that it also calls."""

    def __init__(self, name: str) -> None:
        super().__init__(nn.BatchNorm2d(8))
        self.name = name

    def between(self, x: Tensor) -> Tensor:
        return self.bn2(x) * getattr(self.bn2, self.name).abs().mean()


def refused(net: nn.Module, method: str, expected: str, path: str = "bn2") -> None:
    """Refused with its reason, the model untouched; `strict=False` converts all else."""
    before = copy.deepcopy(net)
    with pytest.raises(ConversionError, match=expected) as caught:
        convert(net, X, method=method, inplace=True)
    assert [row.path for row in caught.value.plan.refused] == [path]
    assert expected in caught.value.plan.refused[0].reason
    assert [type(module) for module in net.modules()] == [type(module) for module in before.modules()]
    for now, then in zip(net.state_dict().values(), before.state_dict().values(), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    part = convert(net, X, method=method, strict=False)
    assert type(part.get_submodule(path)) is type(net.get_submodule(path))
    norms = [
        p for p, m in part.named_modules() if is_batch_norm_like(m) and not isinstance(m, GhostBatchNorm)
    ]
    assert norms == ([path] if is_batch_norm_like(net.get_submodule(path)) else [])
    assert part(X).isfinite().all()


METHODS = list(list_methods())
MORE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fused ReLU": (lambda: Net(BNReLU(8)), "BNReLU.forward does more than batch normalization"),
    "named activation": (lambda: Net(Leaky(8)), "Leaky.forward does more"),
    "another γ": (lambda: Net(PlusOne(8)), "PlusOne.forward does more"),
    "other dimension": (lambda: Last(ChannelsLast(8)), "ChannelsLast.forward does more"),
    "no eps": (lambda: Net(NoEps(8)), "NoEps.forward does more"),
    "patched": (lambda: Net(Patched(8)), "Patched.forward does more"),
    "conditional": (lambda: ByClass(Conditional(8), torch.tensor([1, 2, 3, 4])), "called with 2 arguments"),
    "a number besides": (lambda: ByClass(Domains(8), 1), "called with 2 arguments"),
    "reads γ": (lambda: Reading("weight"), "reads bn2.weight"),
    "reads a buffer": (lambda: Reading("running_var"), "reads bn2.running_var"),
}


class Domains(nn.BatchNorm2d):
    def forward(self, input: Tensor, domain: int = 0) -> Tensor:
        return super().forward(input) + domain


@pytest.mark.parametrize(("name", "method"), thinned(MORE, METHODS, 2))
def test_a_layer_that_does_more_is_left(name: str, method: str) -> None:
    make, expected = MORE[name]
    refused(make(), method, expected)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.BatchNorm2d(8),
    "without affine map": lambda: nn.BatchNorm2d(8, affine=False),
    "sync": lambda: nn.SyncBatchNorm(8),
    "timm": lambda: BatchNormAct2d(8, act_layer=nn.SiLU),
    "timm, dropout": lambda: BatchNormAct2d(8, act_layer=nn.PReLU, drop_layer=DropBlock2d),
    "timm, inplace": lambda: BatchNormAct2d(8),
    "timm, frozen": lambda: FrozenBatchNormAct2d(8),
    "timm, sync": lambda: SyncBatchNormAct(8),
    "timm, split": lambda: SplitBatchNorm2d(8),
    "torchvision, frozen": lambda: torchvision.ops.FrozenBatchNorm2d(8),
    "its own forward": lambda: Plain(8),
    "in bf16": lambda: BatchNormAct2d(8).bfloat16(),
    "ghosts": lambda: GhostBatchNorm(8, size=2),
    "3d": lambda: nn.BatchNorm3d(8),
}


@pytest.mark.parametrize("name", NORMS)
def test_known_kinds_are_converted(name: str) -> None:
    norm = NORMS[name]()
    conv = nn.Conv3d if name == "3d" else nn.Conv2d
    kind = next((p.dtype for p in norm.parameters()), torch.float32)
    x = torch.randn(4, 3, 6, 8, 8)[:, :, 0] if conv is nn.Conv2d else torch.randn(4, 3, 6, 8, 8)
    net = nn.Sequential(conv(3, 8, 3), norm).to(kind).eval()
    folded = convert(net, x.to(kind), method="fold")
    assert verify.same_function(net, folded, x.to(kind), rtol=2e-2 if kind == torch.bfloat16 else 1e-4)
    x, net = x.to("meta", kind), net.to("meta")
    assert [row.action for row in plan(net, x, include="1")] == ["replace"]
    assert [row.action for row in plan(net, x)] == ["leave" if "frozen" in name else "replace"]


def test_what_a_layer_does_is_told_on_meta_too() -> None:
    with torch.device("meta"):
        planned = plan(Net(BNReLU(8)), torch.empty(2, 3, 8, 8))
    assert [row.path for row in planned.refused] == ["bn2"]


def test_looking_at_a_layer_leaves_no_trace() -> None:
    norm = BatchNormAct2d(8)
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda m, args, out: seen.append(out))
    norm.act.register_forward_hook(lambda m, args, out: seen.append(out))
    net, state = nn.Sequential(nn.Conv2d(3, 8, 3), norm), torch.get_rng_state()
    before = copy.deepcopy(net.state_dict())
    plan(net, X, method="gn")
    assert len(seen) == 2  # of the recorded pass
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)  # type: ignore[arg-type]


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.BatchNorm2d(8)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize("kind", [Functional, Unregistered])
@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_as_a_function(kind: type[nn.Module], method: str) -> None:
    refused(Net(kind()), method, f"{kind.__name__}.forward calls F.batch_norm")
    left = plan(Net(kind()), X, method=method, exclude="bn2")
    assert [row.action for row in left if row.path == "bn2"] == ["leave"]


def test_nothing_but_batch_norm_as_a_function() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Functional())
    with pytest.raises(ConversionError, match=r"Functional\.forward calls F\.batch_norm"):
        convert(net, X)
    assert type(convert(net, X, strict=False)[1]) is Functional


class Standardized(nn.Module):
    """Standardizes its weight by the same function, as timm does: the batch is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, 8, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape(8, 3, 3, 3))


def test_a_standardized_weight_is_no_norm_layer() -> None:
    planned = plan(nn.Sequential(Standardized(), nn.BatchNorm2d(8)), X, method="gn")
    assert [(row.path, row.action) for row in planned] == [("1", "replace")]


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Net(nn.BatchNorm2d(8))
        self.side = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.side(x) if x.shape[-1] > 8 else x


@pytest.mark.parametrize("method", ["nf", "lsuv", "fixed_variance", "fixup", "skipinit"])
def test_where_nothing_is_measured_the_layer_stays(method: str) -> None:
    net = Unreached()
    (row,) = [row for row in plan(net, X, method=method) if row.path == "side.1"]
    assert (row.action, row.replaced) == ("leave", "")
    assert "never runs it" in row.reason
    converted = convert(net, X, method=method)
    assert [p for p, m in converted.named_modules() if is_batch_norm_like(m)] == ["side.1"]
    assert type(converted.side[0]) is nn.Conv2d
    assert float(converted(torch.randn(4, 3, 16, 16)).detach().std()) < 4


@pytest.mark.parametrize("method", ["gn", "ws_gn", "evonorm_s0", "ghost_bn", "fold"])
def test_what_needs_no_measurement_is_replaced_unseen(method: str) -> None:
    net = Unreached().eval()
    converted = convert(net, X, method=method)
    assert type(converted.side[1]) is not nn.BatchNorm2d
    if method == "fold":
        assert verify.same_function(net, converted, torch.randn(2, 3, 12, 12))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(value: float, method: str) -> None:
    net = Net(nn.BatchNorm2d(8))
    net.conv2.weight.data[0, 1, 2, 0] = value
    before = [type(module) for module in net.modules()]
    with pytest.raises(UserError, match=r"^conv2\.weight holds NaN") as caught:
        convert(net, X, method=method, inplace=True)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in net.modules()] == before


@pytest.mark.parametrize("method", METHODS)
def test_other_values_that_are_not_numbers(method: str) -> None:
    net = Net(nn.BatchNorm2d(8))
    net.register_buffer("mask", torch.full((2, 2), float("-inf")))
    convert(net, X, method=method)  # as attention masks are
    with pytest.raises(
        UserError, match=r"tensor 0 of the example inputs, of shape \(4, 3, 8, 8\), holds NaN"
    ):
        convert(net, X.masked_fill(X > 1, float("nan")), method=method)
    net.mask[0] = float("nan")
    with pytest.raises(UserError, match=r"^mask holds NaN"):
        convert(net, X, method=method)
    net.mask[0] = 3e38  # its sum overflows, and it is finite
    convert(net, X, method=method)
    net.bn2.running_mean[3] = float("nan")
    refused(net, method, "running_mean is not finite")


def quantized() -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(
        nn.Sequential(Net(nn.BatchNorm2d(8)), nn.Flatten(), nn.Linear(512, 4)), {nn.Linear}
    )


def aware() -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(Net(nn.BatchNorm2d(8)).train(), get_default_qat_qconfig_mapping("x86"), (X,))


def observed() -> nn.Module:
    from torch.ao.quantization import get_default_qconfig, prepare

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    net.qconfig = get_default_qconfig("x86")  # type: ignore[assignment]
    return prepare(net)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [quantized, aware, observed])
def test_quantized_models(make: Callable[[], nn.Module]) -> None:
    model = make()
    for method in METHODS:
        with pytest.raises(UserError, match="convert before quantizing") as caught:
            convert(model, X, method=method)
        assert "\n" not in str(caught.value)


def test_floating_point_models_that_can_be_quantized() -> None:
    model = torchvision.models.quantization.resnet18(quantize=False)
    assert not any(map(is_batch_norm_like, convert(model, torch.randn(2, 3, 32, 32)).modules()))


class Lists(nn.Module):
    """Calls its layers through containers of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), how
        self.again, self.last = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        first, second = (self.conv, self.bn), (self.again, self.last)
        kinds = {"list": [*first, *second], "pairs": [first, second], "dict": {"a": [*first], "b": second}}
        self.held: Any = kinds[how]
        self.same = (first, second)

    def forward(self, x: Tensor) -> Tensor:
        held = list(self.held.values()) if self.how == "dict" else self.held
        for layer in held if self.how == "list" else [layer for pair in held for layer in pair]:
            x = layer(x)
        return x


@pytest.mark.parametrize("how", ["list", "pairs", "dict"])
@pytest.mark.parametrize("inplace", [False, True])
def test_layers_that_are_called_through_containers(how: str, inplace: bool) -> None:
    net = Lists(how).eval()
    expected = net(X)
    for method in ("nf", "gn", "fold"):
        model = copy.deepcopy(net)
        converted = convert(model, X, method=method, inplace=inplace)
        assert verify.batch_independence(converted, X)
        assert converted.same == ((converted.conv, converted.bn), (converted.again, converted.last))
        if method == "fold":
            torch.testing.assert_close(converted(X), expected, rtol=1e-4, atol=1e-5)


def test_containers_are_as_before_when_a_conversion_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Lists("pairs")
    before = [id(layer) for pair in (*net.held, *net.same) for layer in pair]
    monkeypatch.setattr("nfnets.convert.apply.set_scales", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(net, X, inplace=True)
    assert [id(layer) for pair in (*net.held, *net.same) for layer in pair] == before
    assert type(net.bn) is nn.BatchNorm2d
