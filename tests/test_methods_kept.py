"""What a conversion keeps of the layers that it replaces: frozen ones stay frozen, types and devices are theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfnets.convert import convert, list_methods

METHODS = [name for name in list_methods() if name != "ghost_bn"]


class Residual(nn.Module):
    """A stem and two blocks, each a norm layer behind a convolution."""

    def __init__(self, activation: Any = nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation())
        self.b = nn.ModuleList(Block(activation) for _ in range(2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.b:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, activation: Any):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act1, self.act2 = activation(), activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(x + self.n2(self.c2(self.act1(self.n1(self.c1(x))))))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)  # at which `skipinit` scales the head


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 3, 8, 8)), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_stay_frozen(method: str) -> None:
    net = Residual()
    net.stem.requires_grad_(False)
    net.b[0].requires_grad_(False)
    converted = convert(net, images(), method=method)
    for name, parameter in converted.named_parameters():
        frozen = name.startswith(("stem", "b.0"))
        # Frozen at 0, the branch would be gone for good.
        assert parameter.requires_grad != frozen or (method == "skipinit" and "gain" in name), name


def test_fold_without_a_bias_to_stand_for_follows_the_weight() -> None:
    for learns in (True, False):
        net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)).eval()
        net[0].requires_grad_(learns)
        folded = convert(net, images(), method="fold")
        assert [p.requires_grad for p in folded.parameters()] == [learns, learns]


def test_fold_of_a_frozen_convolution_keeps_the_shift_learning() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    net[0].requires_grad_(False)
    folded = convert(net, images(), method="fold")
    assert {name: p.requires_grad for name, p in folded.named_parameters()} == {
        "0.weight": False,
        "0.bias": True,
    }


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_flows_as_through_batch_norm(method: str) -> None:
    net = Residual().bfloat16()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = images(16, 3, 8, 8).bfloat16()
    assert net(x).dtype == torch.bfloat16
    converted = convert(net, x, method=method)
    y = converted(x)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_another_default_device_changes_nothing(method: str) -> None:
    net, x = Residual(), images()
    net.b[0].c1.requires_grad_(False)
    with torch.device("meta"):
        converted = convert(net, x, method=method)
    assert {t.device.type for t in [*converted.parameters(), *converted.buffers()]} == {"cpu"}
    assert converted(x).isfinite().all()


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
def test_a_part_of_a_model_leaves_the_rest(method: str) -> None:
    net, x = Residual(), images()
    state = net.state_dict()
    converted = convert(net, x, method=method, include="b.1")
    for name, value in converted.state_dict().items():
        if not name.startswith("b.1") and name in state:
            assert torch.equal(value, state[name]), name
    rest = convert(converted, x, method=method)
    assert method == "skipinit" or not rest.fc.weight.any()


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_activations_with_parameters(method: str, count: int) -> None:
    net, x = Residual(lambda: nn.PReLU(count, init=0.5)), images()
    converted = convert(net, x, method=method)
    assert converted(x).isfinite().all()
    on_meta = convert(net.to("meta"), x.to("meta"), method=method)
    assert on_meta(x.to("meta")).shape == (4, 5)


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
def test_a_slope_per_channel_counts_as_the_slope_of_all(method: str) -> None:
    """Against the activation without parameters that computes the same."""
    sizes = []
    for activation in (lambda: nn.PReLU(8, init=0.1), lambda: nn.LeakyReLU(0.1)):
        torch.manual_seed(0)
        net = Residual(activation)
        torch.manual_seed(0)
        sizes.append(convert(net, images(), method=method).stem[0].weight.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_bookkeeping_with_a_slope_per_channel() -> None:
    net = Residual(lambda: nn.PReLU(8, init=0.5))
    assert convert(net, images(), method="fixed_variance", measure=False)(images()).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_at_most_two_passes_over_the_whole_batch(method: str) -> None:
    """One to see, one to measure; what only looks at shapes takes two samples."""
    sizes: list[int] = []
    net = Residual()
    net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    convert(net, images(16, 3, 8, 8), method=method)
    assert sizes.count(16) <= 2
    assert set(sizes) <= {16, 2}
