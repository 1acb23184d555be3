"""SkipInit: identity at α = 0, the scalar's gradient, added scalars, bad input."""

from __future__ import annotations

import copy
import io
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nfnets.convert import convert
from nfnets.errors import UserError
from nfnets.init import skipinit_
from nfnets.layers import ScaledStdConv2d, SkipInit
from nfnets.trace import is_batch_norm_like


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width: int = 4, scalar: bool = True):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.skip = SkipInit() if scalar else nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(F.relu(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.skip(self.branch(x))


class Net(nn.Module):
    def __init__(self, blocks: int = 3, scalar: bool = True):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(scalar=scalar) for _ in range(blocks)))
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


def normless(name: str) -> nn.Module:
    return torchvision.models.get_model(name, norm_layer=no_norm, num_classes=10)


def test_existing_scalars_become_zero_and_layers_he() -> None:
    model, x = Net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    report = skipinit_(model, x)
    assert [block.skip.gain.item() for block in model.blocks] == [0.0] * 3
    h = torch.randn(2, 4, 8, 8)
    assert torch.equal(model.blocks(h), h)
    weights = torch.cat([getattr(b, c).weight.flatten() for b in model.blocks for c in ("conv1", "conv2")])
    assert weights.std().item() == pytest.approx(math.sqrt(2 / 36), rel=0.1)
    assert not any(getattr(b, c).bias.any() for b in model.blocks for c in ("conv1", "conv2"))
    assert report.paths("set")[:3] == tuple(f"blocks.{i}.skip.gain" for i in range(3))
    assert report["fc"].reason == "classifier: √(1/4)"


def test_gradient_of_the_scalar_is_the_branch_times_the_gradient_of_the_output() -> None:
    block, x = Net(1).blocks[0], torch.randn(2, 4, 6, 6)
    skipinit_(block, x)
    out, g = block(x), torch.randn(2, 4, 6, 6)
    (out * g).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(block.skip.gain.grad, (g * block.branch(x)).sum())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_missing_scalars_are_added_in_place_of_nothing(name: str) -> None:
    model, x = normless(name), torch.randn(2, 3, 32, 32)
    last = "conv2" if name == "resnet18" else "conv3"
    weights = dict(model.named_parameters())
    keys = set(model.state_dict())
    report = skipinit_(model, x)
    blocks = [m for m in model.modules() if hasattr(m, "downsample")]
    assert set(model.state_dict()) - keys == {p for p in report.paths("set") if p.endswith("skip_gain")}
    assert len(set(model.state_dict()) - keys) == len(blocks)
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in weights.items())
    h = torch.rand(2, blocks[1].conv1.in_channels, 8, 8)
    assert torch.equal(blocks[1](h), h)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    scalar, conv = getattr(blocks[1], last).skip_gain, blocks[1].conv1
    assert scalar.grad.abs() > 0
    assert not conv.weight.grad.any()  # α = 0: of a branch only α moves at the first step
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        scalar.fill_(0.5)
        assert not torch.equal(copy.deepcopy(model)(x), loaded(x))
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    keys = set(model.state_dict())
    again = skipinit_(model, x)
    assert set(model.state_dict()) == keys
    assert again.paths("set") == report.paths("set")
    assert scalar.item() == 0


def test_standardized_nets_of_timm_learn_again() -> None:
    model = timm.create_model("nf_resnet26", num_classes=5)
    skipinit_(model, torch.randn(1, 3, 64, 64))
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(
        p.item() == 0 and p.grad.abs() > 0 for n, p in model.named_parameters() if n.endswith("skip_gain")
    )
    assert sum(n.endswith("conv3.skip_gain") for n, _ in model.named_parameters()) == 8
    block = Block()
    block.conv2 = ScaledStdConv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        block.conv2.gain.zero_()
    weight = block.conv2.weight.clone()
    skipinit_(block, torch.randn(1, 4, 8, 8))
    assert (block.conv2.gain == 1).all()
    assert torch.equal(block.conv2.weight, weight)
    block(torch.randn(2, 4, 8, 8)).square().sum().backward()
    assert block.skip.gain.grad.abs() > 0


@pytest.mark.parametrize("blocks", [200, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_thousand_blocks_are_finite_and_learn(blocks: int) -> None:
    model, x = nn.Sequential(*(Block(2) for _ in range(blocks))), torch.randn(2, 2, 4, 4)
    skipinit_(model, x)
    assert torch.equal(model(x), x)
    model(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(block.skip.gain.grad.abs() > 0 for block in model)


def test_value() -> None:
    model, x = Net(), torch.randn(1, 3, 8, 8)
    skipinit_(model, x, value=0.25)
    assert {block.skip.gain.item() for block in model.blocks} == {0.25}


class ParallelEnds(nn.Module):
    """x + a(x) + relu(b(x)), one after another and in parallel, and the same inside a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.a(x) + self.relu(self.b(x))
        y = y + self.c(y)
        return x + y.mul(torch.sigmoid(self.d(y)))


def test_scalars_of_parallel_and_nested_branches() -> None:
    """Every path has one; together they make the identity, and none is stuck there."""
    model, x = ParallelEnds(), torch.randn(2, 4, 8, 8)
    skipinit_(model, x)
    names = {n.removesuffix(".skip_gain") for n, _ in model.named_parameters() if n.endswith("skip_gain")}
    assert names == {"a", "relu", "c"}
    torch.testing.assert_close(model(x), x)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):  # c is inside: its scalar learns once the outer ones have moved
        optimizer.zero_grad()
        (model(x) * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))).mean().backward()
        optimizer.step()
    assert all(p.abs() > 0 for n, p in model.named_parameters() if n.endswith("skip_gain"))


class ReluEnd(Block):
    def branch(self, x: Tensor) -> Tensor:
        return F.relu(super().branch(x))


def spectral() -> nn.Module:
    model = Net()
    parametrizations.spectral_norm(model.blocks[1].conv1)
    return model


@pytest.mark.parametrize(
    ("build", "shape", "options", "message"),
    [
        (lambda: torchvision.models.resnet18(), (2, 3, 32, 32), {}, "normalizes at bn1"),
        (lambda: nn.Conv2d(3, 4, 3), (1, 3, 8, 8), {}, "no residual branch"),
        (lambda: ReluEnd(scalar=False), (1, 4, 8, 8), {}, "has no SkipInit scalar"),
        (spectral, (1, 3, 8, 8), {}, "blocks.1.conv1: its weight is parametrized by SpectralNorm"),
        (Net, (1, 3, 8, 8), {"value": math.nan}, "value=nan"),
    ],
)
def test_models_it_cannot_handle_are_refused_unchanged(build, shape, options, message: str) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        skipinit_(model, torch.randn(shape), **options)
    assert "\n" not in str(caught.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["skipinit", "fixup", "nf", "fold"])
def test_a_scalar_behind_a_kept_norm_layer_outlives_it(method: str) -> None:
    """The first conversion keeps the branch's last norm layer and scales its output; the second takes the layer."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.two(self.norm(self.one(x))))

    x = torch.randn(4, 4, 5, 5)
    half = convert(nn.Sequential(nn.Conv2d(4, 4, 1), Branch()), x, method="skipinit", include="1.norm")
    scalars = [p for n, p in half.named_parameters() if n.endswith("skip_gain")]
    assert len(scalars) == 1
    whole = convert(half, x, method=method)
    assert not any(map(is_batch_norm_like, whole.modules()))
    assert len([n for n, _ in whole.named_parameters() if n.endswith("skip_gain")]) == 1
    assert torch.isfinite(whole(x)).all()
