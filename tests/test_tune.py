"""`tune`: convolution and frozen norm layer as one, equal to the two in evaluation mode in value and gradient."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.fx
import torchvision
from soak import ALL
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import nfnets
from nfnets import tuned, verify
from nfnets.convert import bake, convert, plan
from nfnets.trace import is_batch_norm_like

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2), nn.BatchNorm1d(6)), (3, 4, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (3, 4, 7, 7)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6, eps=0.1)), (3, 4, 5, 5, 5)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), (3, 4, 7, 7)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (3, 4, 7, 7)),
    "reflecting": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
        (3, 4, 7, 7),
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (3, 4, 5, 5)),
    "transposed, grouped": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), nn.BatchNorm1d(6)),
        (3, 4, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "not affine": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
        (3, 4, 7, 7),
    ),
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), (3, 4, 7, 7)),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        (3, 4, 7, 7),
    ),
    "with activation": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), timm.layers.BatchNormAct2d(6)),  # type: ignore[attr-defined]
        (3, 4, 7, 7),
    ),
}


def trained(model: nn.Module, *shape: int, wide: bool = True) -> tuple[Any, Tensor]:
    """The model with statistics, γ and β that are not a new one's."""
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64 if wide else torch.float32)
    model = model.to(x.dtype).train()
    for _ in range(3):
        model(2 * x + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, x


def gradients(model: nn.Module, x: Tensor) -> dict[int, list[Tensor]]:
    """Of a loss that no symmetry makes 0, by the number of elements; and of the input, at 0."""
    x = x.clone().requires_grad_()
    out = model(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out / out.detach().std()).tanh().mul(weights).sum().backward()
    found: dict[int, list[Tensor]] = {0: [x.grad]}  # type: ignore[list-item]
    for p in model.parameters():
        if p.grad is not None:
            found.setdefault(p.numel(), []).append(p.grad.flatten())
    return found


def alike(model: nn.Module, converted: nn.Module, x: Tensor, close: float = 1e-10) -> None:
    """In value, and in the gradient of every parameter, whose order may be another."""
    torch.testing.assert_close(converted(x), model(x), rtol=close, atol=close)
    ours, theirs = gradients(converted, x), gradients(model, x)
    assert {n: len(group) for n, group in ours.items()} == {n: len(group) for n, group in theirs.items()}
    for number, group in theirs.items():
        scale = max(float(g.abs().max()) for g in group) + 1e-30
        rest = list(ours[number])
        for one in group:
            near = min(range(len(rest)), key=lambda i: float((rest[i] - one).abs().max()))
            assert float((rest.pop(near) - one).abs().max()) <= close * scale


@pytest.mark.parametrize("name", LAYERS)
def test_value_and_gradient_are_those_of_evaluation(name: str) -> None:
    make, shape = LAYERS[name]
    model, x = trained(make(), *shape)
    converted = convert(model, x, method="tune")
    assert converted.training
    assert not any(map(is_batch_norm_like, converted.modules()))
    alike(model.eval(), converted, x)
    torch.testing.assert_close(bake(converted)(x), model(x), rtol=1e-10, atol=1e-10)
    plain = [type(m) for m in bake(converted).modules() if type(m).__name__.startswith("Tuned")]
    assert plain == []


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: torchvision.models.resnet18(num_classes=3),
    "mobile": lambda: timm.create_model("mobilenetv3_small_050", num_classes=3),
    "same padding": lambda: timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=3),
    "pre-activation": lambda: (
        timm.create_model("resnetv2_50", num_classes=3, width_factor=0.25)
        if ALL
        else timm.create_model("test_resnet", num_classes=3)
    ),
    "dense": lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=3),
    "squeeze-excite": lambda: timm.create_model("test_efficientnet", num_classes=3),
    "repvgg": lambda: timm.create_model("test_byobnet", num_classes=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_nets_of_every_kind(name: str) -> None:
    model, x = trained(MODELS[name](), 2, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or "drop_rate" in vars(module):
            module.p = module.drop_rate = 0.0  # type: ignore[assignment]
    converted = convert(model, x, method="tune")
    assert not any(map(is_batch_norm_like, converted.modules()))
    alike(model.eval(), converted, x)


def test_nothing_thaws_the_statistics() -> None:
    model, x = trained(LAYERS["conv2d"][0](), 3, 4, 7, 7)
    converted = convert(model, x, method="tune")
    before = {name: buffer.clone() for name, buffer in converted.named_buffers()}
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    for _ in range(3):
        converted.train()(x + 5).square().sum().backward()
        optimizer.step()
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in converted.named_buffers())
    assert verify.batch_independence(converted, x)


def test_learning_is_that_of_frozen_statistics() -> None:
    """Twenty steps with momentum and decay end where the original in evaluation mode ends."""
    model, x = trained(LAYERS["conv3d"][0](), 3, 4, 5, 5, 5)
    converted = convert(model, x, method="tune")
    for net in (model.eval(), converted.train()):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)


def test_what_lies_between_is_not_kept() -> None:
    """One activation a layer instead of two, counted by what autograd keeps."""

    def kept(net: nn.Module) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(x).sum()
        return sum(seen.values())

    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    model, x = trained(nn.Sequential(*layers), 4, 8, 32, 32, wide=False)
    assert kept(convert(model, x, method="tune")) < 0.6 * kept(model.eval())


def test_state_pickles_copies_and_meta() -> None:
    model, x = trained(LAYERS["transposed, grouped"][0](), 3, 4, 5)
    converted = convert(model, x, method="tune").eval()
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    for other in (copy.deepcopy(converted), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), converted(x))
    with torch.device("meta"):
        empty = LAYERS["transposed, grouped"][0]().double()
    late = convert(empty, x.to("meta"), method="tune")
    late.load_state_dict(converted.state_dict(), assign=True)  # weights that come later
    assert torch.equal(late.eval()(x), converted(x))


def test_the_remembered_weight_is_never_stale() -> None:
    model, x = trained(LAYERS["conv2d"][0](), 3, 4, 7, 7)
    converted: Any = convert(model, x, method="tune").eval()
    with torch.no_grad():
        first = converted(x)
        for name in ("norm_weight", "norm_bias", "norm_mean", "norm_var", "weight"):
            before = converted(x)
            getattr(converted[0], name).mul_(1.5)
            assert not torch.equal(converted(x), before), name
        assert not torch.equal(converted(x), first)


def test_half_precision_compiles_and_exports() -> None:
    model, x = trained(LAYERS["conv2d"][0](), 3, 4, 7, 7, wide=False)
    converted = convert(model, x, method="tune").eval()
    first = convert(trained(LAYERS["first"][0](), 3, 4, 7, 7, wide=False)[0], x, method="tune").eval()
    for each in (converted, first):
        assert torch.equal(torch.fx.symbolic_trace(each)(x), each(x))
    exported = torch.export.export(converted, (x,)).module()
    torch.testing.assert_close(exported(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    half, there = converted.to(torch.bfloat16), x.to(torch.bfloat16)
    assert half(there).dtype is torch.bfloat16
    torch.testing.assert_close(half(there).float(), model(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda norm: norm.running_var.fill_(float("nan")), "not finite"),
        (lambda norm: norm.running_mean.fill_(float("inf")), "not finite"),
        (lambda norm: (norm.__init__(6, track_running_stats=False), norm.double()), "no running statistics"),
    ],
)
def test_statistics_that_are_none_are_refused(spoil: Callable[[Any], Any], said: str) -> None:
    model, x = trained(LAYERS["conv2d"][0](), 3, 4, 7, 7)
    spoil(model[1])
    with pytest.raises(nfnets.convert.ConversionError, match=said):
        convert(model, x, method="tune")


def test_the_plan_says_what_is_frozen_and_what_was_never_trained() -> None:
    x = torch.randn(2, 4, 7, 7)
    assert "statistics frozen; they were never trained" in str(plan(LAYERS["conv2d"][0](), x, method="tune"))
    model, _ = trained(LAYERS["conv2d"][0](), 3, 4, 7, 7, wide=False)
    said = str(plan(model, x, method="tune"))
    assert "one layer with 0, a TunedConv2d; statistics frozen" in said
    assert "never" not in said


def test_a_shared_gain_stays_shared_and_the_original_stays_apart() -> None:
    model, x = trained(
        nn.Sequential(*LAYERS["conv2d"][0](), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), 3, 4, 7, 7
    )
    model[3].weight = model[1].weight
    converted: Any = convert(model, x, method="tune")
    assert converted[0].norm_weight is converted[2].norm_weight
    assert converted[0].norm_weight is not model[1].weight
    assert converted[0].norm_bias is not model[1].bias
    alike(model.eval(), converted, x)
    first = model[1].weight
    changed: Any = convert(model, x, method="tune", inplace=True)
    assert changed[0].norm_weight is first  # an optimizer that was made before goes on


def test_dead_channels_and_shared_layers() -> None:
    model, x = trained(LAYERS["conv2d"][0](), 3, 4, 7, 7)
    model[1].running_var[2] = 0.0
    alike(model.eval(), convert(model, x, method="tune"), x)

    class Twice(nn.Module):
        """One convolution, two norm layers."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.conv(self.one(self.conv(x))))

    twice, x = trained(Twice(), 3, 4, 7, 7)
    converted = convert(twice, x, method="tune")
    assert isinstance(converted.two, tuned.TunedNorm)
    alike(twice.eval(), converted, x)


def test_frozen_norm_layers_stay_unless_named() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(6)
    frozen.running_var.fill_(2.0)  # type: ignore[operator]
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), frozen, nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    ).double()
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    model(x)
    assert isinstance(convert(model, x, method="tune")[1], torchvision.ops.FrozenBatchNorm2d)
    converted = convert(model, x, method="tune", include=["1", "4"])
    assert isinstance(converted[1], nn.Identity)
    assert {n for n, _ in converted.named_parameters()} == {
        *("0.weight", "0.bias", "3.weight", "3.bias", "3.norm_weight", "3.norm_bias")
    }
    torch.testing.assert_close(converted(x), model.eval()(x), rtol=1e-10, atol=1e-10)
