"""plan and convert on torchvision and timm ResNets, and on small nets with every trap."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
import torchvision
from conversion_nets import NarrowResNet, average_channel_variance, resnet18, resnet50
from torch import Tensor, nn

import nfnets
from nfnets import verify
from nfnets.convert import ConversionError, convert, plan
from nfnets.errors import UserError
from nfnets.layers import Scale, ScaledStdConv2d
from nfnets.trace import is_batch_norm_like, silenced, trace

SMALL: dict[str, Any] = {"num_classes": 7, "layers": (1, 2, 1, 1), "channels": (16, 32, 32, 64)}
"""Of timm's networks the same blocks, stems and shortcuts, fewer and narrower."""
RESNETS = {
    "torchvision:resnet18": lambda: resnet18(num_classes=7),
    "torchvision:resnet50": lambda: NarrowResNet(torchvision.models.resnet.Bottleneck, (1, 2, 1, 1), 7),
    "timm:resnet18": lambda: timm.create_model("resnet18", **SMALL),
    "timm:resnet26d": lambda: timm.create_model("resnet26d", **SMALL),
    "timm:seresnet50": lambda: timm.create_model("seresnet50", **SMALL),
    "timm:resnet50 (drop path, dropout)": lambda: timm.create_model(
        "resnet50", **SMALL, drop_path_rate=0.1, drop_rate=0.1
    ),
}


def images(n: int = 4, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def randomize_statistics(model: nn.Module) -> nn.Module:
    """Statistics and affine maps that a trained net may have: negative γ, dead channels, six orders of magnitude."""
    g = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            n = module.num_features
            module.running_mean.normal_(generator=g)
            module.running_var.copy_(10 ** torch.empty(n).uniform_(-3, 3, generator=g))
            if module.affine:
                module.weight.data.normal_(generator=g).mul_(module.running_var.sqrt())
                module.bias.data.normal_(generator=g)
    return model


@pytest.fixture(params=RESNETS, scope="module")
def resnet(request) -> nn.Module:
    torch.manual_seed(0)
    return RESNETS[request.param]()


def test_nf_leaves_no_norm_and_a_trainable_net(resnet: nn.Module) -> None:
    before = {k: v.clone() for k, v in resnet.state_dict().items()}
    ids = {name: id(module) for name, module in resnet.named_modules()}
    model = convert(resnet, images(), method="nf")

    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())
    assert {name: id(module) for name, module in resnet.named_modules()} == ids
    assert type(model) is type(resnet)
    assert not any(is_batch_norm_like(m) for m in model.modules())
    assert (
        set(ids) - {name for name, _ in model.named_modules()} == set()
    )  # every attribute path is still there
    weights = {f"{name}.weight" for name, m in resnet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert weights <= set(model.state_dict())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in resnet.parameters()}

    model.train()
    model(images()).logsumexp(1).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    verdict = verify.batch_independence(model, images())
    assert verdict, verdict


def test_every_branch_ends_at_alpha_squared(resnet: nn.Module) -> None:
    """Measured by hooks at the branch ends, on the images that the constants were measured on."""
    model = convert(resnet, images(), method="nf", alpha=0.3)
    seen = {}
    with silenced(model):
        graph = trace(
            model,
            images(),
            visit=lambda node, out: seen.setdefault(node.index, average_channel_variance(out)),
        )
    layers = [
        graph.nodes[j.branch_end]
        for j in graph.joins
        if isinstance(graph.nodes[j.branch_end].module, nn.Conv2d)
    ]
    for node in layers:
        assert seen[node.index] == pytest.approx(0.09, rel=1e-3)
    stem = next(node for node in graph.nodes if isinstance(node.module, ScaledStdConv2d))
    assert seen[stem.index] == pytest.approx(1, rel=1e-3)


def test_fold_keeps_the_function(resnet: nn.Module) -> None:
    model = randomize_statistics(copy.deepcopy(resnet)).eval()
    folded = convert(model, images(), method="fold")
    assert verify.same_function(model, folded, images(), rtol=1e-4)
    assert not any(is_batch_norm_like(m) for m in folded.modules())
    assert not folded.training
    precise = model.double()
    assert verify.same_function(
        precise, convert(precise, images().double(), method="fold"), images().double(), rtol=1e-10
    )


def test_fold_agrees_with_torch_fusion() -> None:
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
    pair = randomize_statistics(nn.Sequential(conv, norm)).eval()
    expected = torch.nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm)
    folded = convert(pair, images(), method="fold")
    torch.testing.assert_close(folded[0].weight, expected.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(folded[0].bias, expected.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_fold_into_transposed_convolutions_and_linears(groups: int) -> None:
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 9 * 9, 5),
        nn.BatchNorm1d(5, affine=False),
    )
    randomize_statistics(net).eval()
    x = torch.randn(3, 4, 4, 4)
    folded = convert(net, x, method="fold")
    assert verify.same_function(net, folded, x)
    assert isinstance(folded[1], nn.Identity)
    assert isinstance(folded[4], nn.Identity)


def test_roles_of_a_resnet() -> None:
    rows = {row.path: row for row in plan(resnet50(), images(), method="nf")}
    assert len(rows) == 53
    assert rows["bn1"].role == "stem"
    assert rows["layer1.0.bn1"].role == "branch"
    assert rows["layer1.0.bn3"].role == "branch end"
    assert rows["layer1.0.downsample.1"].role == "shortcut"
    assert [row.role for row in rows.values()].count("branch end") == 16
    assert [row.role for row in rows.values()].count("shortcut") == 4
    assert rows["layer3.2.bn2"].reads == "layer3.2.conv2"


class PreActivation(nn.Module):
    """BN → ReLU → conv, twice, around an identity; a norm and a head at the end."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.last, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        return self.fc(self.last(x).relu().mean((2, 3)))


def test_pre_activation_is_nf_resnet() -> None:
    """h + α·f(h/β): what the NF-ResNet paper's block does, from a BatchNorm net of the same order."""
    planned = plan(PreActivation(), images(), method="nf", alpha=0.2)
    roles = {row.path: (row.role, row.replaced) for row in planned}
    assert roles == {
        "bn1": ("pre-activation", "Scale"),
        "bn2": ("branch", "Identity"),
        "last": ("head", "Scale"),
    }
    assert [(row.path, row.role) for row in planned.layers] == [("stem", "branch"), ("conv2", "branch end")]
    model = convert(PreActivation(), images(), method="nf", alpha=0.2)
    assert float(model.conv2.alpha) == pytest.approx(0.2)
    assert isinstance(model.bn1, Scale)
    seen = {}
    trace(
        model,
        images(),
        visit=lambda node, out: seen.setdefault(node.path or node.name, average_channel_variance(out)),
    )
    assert seen["stem"] == pytest.approx(1, rel=1e-3)
    assert seen["conv2"] == pytest.approx(0.04, rel=1e-3)
    assert float(model.last.value) ** -2 == pytest.approx(float(seen["add"]), rel=1e-3)
    assert type(model.fc) is nn.Linear


def test_a_branch_that_ends_in_a_depthwise_convolution_keeps_alpha() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv, self.end = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            return x + self.end(self.conv(x))

    model = convert(Depthwise(), images(), alpha=0.3)
    seen = {}
    trace(model, images(), visit=lambda n, out: seen.setdefault(n.path, average_channel_variance(out)))
    assert type(model.conv) is nn.Conv2d  # a depthwise filter that sums to zero could not pass a constant
    assert model.conv.bias is not None
    assert seen["end"] == pytest.approx(0.09, rel=1e-3)


def test_a_fused_activation_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU))
    randomize_statistics(net).eval()
    folded = convert(net, images(), method="fold")
    assert verify.same_function(net, folded, images())
    converted = convert(net, images(), method="nf")
    assert any(isinstance(m, nn.SiLU) for m in converted.modules())


def test_frozen_norm_is_folded() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(8)
    frozen.running_mean.normal_()
    frozen.weight.normal_()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), frozen)
    folded = convert(net, images(), method="fold")
    assert verify.same_function(net, folded, images())
    assert isinstance(folded[1], nn.Identity)


def test_a_shared_conv_is_not_folded_into() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.conv(x)) + self.b(self.conv(2 * x))

    net = randomize_statistics(Shared()).eval()
    folded = convert(net, images(), method="fold")
    assert verify.same_function(net, folded, images())
    assert torch.equal(folded.conv.weight, net.conv.weight)


def test_a_conv_that_others_read_too_is_not_folded_into() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) * y

    net = randomize_statistics(Twice()).eval()
    assert verify.same_function(net, convert(net, images(), method="fold"), images())


def test_everything_unconvertible_is_refused_with_the_whole_table() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
    )
    with pytest.raises(ConversionError, match="no running statistics") as caught:
        convert(net, images(), method="fold")
    assert [row.action for row in caught.value.plan] == ["replace", "refuse"]
    assert "folded into 0" in str(caught.value)  # the convertible rows are shown as well
    left = convert(net, images(), method="fold", strict=False)
    assert isinstance(left[1], nn.Identity)
    assert isinstance(left[3], nn.BatchNorm2d)


def test_inplace_changes_the_model_itself_and_is_all_or_nothing(monkeypatch) -> None:
    model = resnet18()
    assert convert(model, images(), inplace=True) is model
    assert not any(is_batch_norm_like(m) for m in model.modules())

    model = resnet18()
    ids = {name: id(module) for name, module in model.named_modules()}
    monkeypatch.setattr("nfnets.convert.apply.set_scales", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(model, images(), inplace=True)
    assert {name: id(module) for name, module in model.named_modules()} == ids


def test_copy_pickle_and_state_dict_round_trips() -> None:
    model = convert(resnet18(), images())
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = convert(resnet18(), 3 * images())  # other weights, other constants
    assert not torch.equal(other(images()), expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(images()), expected)


def test_on_meta_nothing_is_computed() -> None:
    with torch.device("meta"):
        model = resnet18()
        converted = convert(model, torch.empty(2, 3, 64, 64))
    assert not any(is_batch_norm_like(m) for m in converted.modules())
    real = convert(resnet18(), images())
    converted.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(converted(images()), real(images()))


def test_the_weights_are_the_users_own() -> None:
    """Standardization changes what a weight does, not the parameter: both arms of a comparison share it."""
    model = resnet18()
    converted = convert(model, images())
    assert torch.equal(converted.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
    assert torch.equal(converted.fc.weight, model.fc.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: convert(nn.Conv2d(3, 4, 3), images()), "no BatchNorm layer"),
        (lambda: convert(resnet18(), images(), method="nff"), "did you mean nf"),
        (lambda: convert(resnet18(), images(), aplha=0.1), "did you mean alpha"),
        (lambda: convert(resnet18(), images(), alpha=0), "above 0"),
        (
            lambda: convert(resnet18(), torch.randn(2, 1, 64, 64)),
            "forward fails on inputs",
        ),
        (lambda: convert("resnet18", images()), "expected a torch"),
        (lambda: convert(nn.DataParallel(resnet18()), images()), r"\.module"),
    ],
)
def test_bad_input_is_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_scripted_models_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(UserError, match="scripted"):
        convert(scripted, images())


def test_the_table_has_a_row_for_every_norm_layer() -> None:
    model = nfnets.create_model("bn_resnet20_cifar")
    text = str(plan(model, images(2, 32)))
    norms = [path for path, module in model.named_modules() if is_batch_norm_like(module)]
    assert all(any(line.startswith(path + " ") for line in text.splitlines()) for path in norms)
    assert text.splitlines()[-1].startswith(f"method=nf: {len(norms)} norm layers")


def test_conversion_takes_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    visited = 0
    plain = nn.Module.named_modules

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal visited
        for found in plain(self, *args, **kwargs):
            visited += 1
            yield found

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    counts = []
    for depth in (10, 40):
        layers = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(depth)]
        visited = 0
        convert(nn.Sequential(*layers), torch.randn(2, 4, 3, 3), method="nf")
        counts.append(visited)
    assert counts[1] < 5 * counts[0]
