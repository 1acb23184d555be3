"""Norm layers that couple no samples are left, or replaced where the user names them; `fold` folds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from nfnets import convert, plan, verify
from nfnets.convert import list_methods
from nfnets.convert.own_norm import eps_of
from nfnets.trace import is_batch_norm_like

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
NORM_FREE = [name for name in list_methods() if name not in ("bcn", "fold", "ghost_bn", "online")]


class HiddenEps(nn.Module):
    """As in the DETR family of Hugging Face: buffers only, and ε is a constant inside the forward."""

    eps_there = 1e-5

    def __init__(self, n: int):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + self.eps_there).rsqrt()  # type: ignore[operator]
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)  # type: ignore[operator]


class LargeEps(HiddenEps):
    eps_there = 0.3


class NeverTraining(nn.BatchNorm2d):
    """Frozen by its forward, whatever the mode, and it says another ε than it computes with."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=0.01)


class OutsideTheRoot(HiddenEps):
    """ε is added to σ instead of σ²: no formula of ours."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        return x * (self.weight / (self.running_var.sqrt() + 1e-3)).reshape(shape)  # type: ignore[operator]


class Split(nn.BatchNorm2d):
    """As lightly's: parts of the batch on their own in training, and in evaluation the mean of their statistics."""

    def __init__(self, num_features: int, num_splits: int):
        super().__init__(num_features)
        self.num_splits = num_splits
        self.running_mean = self.running_mean.repeat(num_splits)  # type: ignore[union-attr]
        self.running_var = self.running_var.repeat(num_splits)  # type: ignore[union-attr]

    def train(self, mode: bool = True) -> Split:
        if self.training and not mode:
            for name in ("running_mean", "running_var"):
                mean = getattr(self, name).view(self.num_splits, -1).mean(0)
                setattr(self, name, mean.repeat(self.num_splits))
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        n, c, h, w = input.shape
        k = self.num_splits
        if not self.training:
            mean, var = self.running_mean[:c], self.running_var[:c]  # type: ignore[index]
            return F.batch_norm(
                input, mean, var, self.weight, self.bias, False, self.momentum or 0.0, self.eps
            )
        affine = (self.weight.repeat(k), self.bias.repeat(k))
        parts = input.view(-1, c * k, h, w)
        return F.batch_norm(parts, self.running_mean, self.running_var, *affine, True, 0.1, self.eps).view(
            n, c, h, w
        )


class Detector(nn.Module):
    """A frozen backbone with a block, and a neck and head that learn."""

    def __init__(self, kind: Any):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), kind(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), kind(8)
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.neck(x + self.bn2(self.conv2(x)))
        return self.head((x + self.block(x)).mean((2, 3)))


FROZEN: dict[str, Any] = {
    "as Hugging Face's": HiddenEps,
    "another ε": LargeEps,
    "torchvision": FrozenBatchNorm2d,
    "timm": FrozenBatchNormAct2d,
    "by its forward": NeverTraining,
    "more than a formula": OutsideTheRoot,
}
KNOWN = [name for name in FROZEN if name != "more than a formula"]


def random(model: nn.Module) -> Any:
    """As trained: no statistic and no affine map is 0 or 1, and some variances are as small as ε."""
    g = torch.Generator().manual_seed(1)
    for module in model.modules():
        if is_batch_norm_like(module):
            norm: Any = module
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                tensor.data.normal_(1, 0.5, generator=g)
            norm.running_var.copy_(10 ** torch.empty_like(norm.running_var).uniform_(-6, 1, generator=g))
            norm.weight.data *= norm.running_var[: len(norm.weight)].sqrt()
    return model


def detector(name: str) -> Any:
    torch.manual_seed(0)
    return random(Detector(FROZEN[name]))


CASES = [("as Hugging Face's", method) for method in NORM_FREE]
CASES += [(name, "nf") for name in FROZEN if name != "as Hugging Face's"]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_it_is_left_and_stops_nothing(name: str, method: str) -> None:
    net = detector(name)
    converted: Any = convert(net, X, method=method)
    assert [p for p, m in converted.named_modules() if is_batch_norm_like(m)] == ["bn1", "bn2"]
    for kept, old in ((converted.bn1, net.bn1), (converted.bn2, net.bn2)):
        assert type(kept) is type(old)
        for now, then in zip(kept.state_dict().values(), old.state_dict().values(), strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=0)
    if method in ("nf", "gn"):
        assert verify.batch_independence(converted, X)
    assert converted(X).isfinite().all()


@pytest.mark.parametrize(("name", "method"), [case for case in CASES if case[0] in KNOWN])
def test_named_it_is_replaced(name: str, method: str) -> None:
    converted = convert(detector(name), X, method=method, include="*")
    assert not any(is_batch_norm_like(m) for m in converted.modules())
    assert converted(X).isfinite().all()


@pytest.mark.parametrize("method", ["bcn", "ghost_bn", "online"])
def test_those_that_couple_samples_leave_it_too(method: str) -> None:
    rows = plan(detector("as Hugging Face's"), X, method=method)
    assert [row.action for row in rows] == ["leave", "leave", "replace", "replace"]


@pytest.mark.parametrize("name", KNOWN)
def test_fold_keeps_the_function(name: str) -> None:
    net = detector(name).eval()
    folded = convert(net, X, method="fold")
    assert not any(is_batch_norm_like(m) for m in folded.modules())
    assert verify.same_function(net, folded, X, rtol=1e-4)
    precise, x = net.double(), X.double()
    assert verify.same_function(precise, convert(precise, x, method="fold"), x, rtol=1e-6)


def test_fold_says_where_the_formula_is_another() -> None:
    rows = plan(detector("more than a formula"), X, method="fold")
    assert [row.path for row in rows.refused] == ["bn1", "bn2"]
    assert "OutsideTheRoot.forward does more than batch normalization" in rows.refused[0].reason


@pytest.mark.parametrize(("kind", "eps"), [(HiddenEps, 1e-5), (LargeEps, 0.3), (NeverTraining, 0.01)])
def test_eps_is_the_one_that_it_computes_with(kind: Any, eps: float) -> None:
    norm = random(kind(8))
    assert eps_of(norm) == pytest.approx(eps, rel=1e-4)
    assert eps_of(norm.to("meta")) == pytest.approx(eps, rel=1e-4)
    assert eps_of(FrozenBatchNorm2d(4, eps=0.002)) == 0.002
    assert eps_of(FrozenBatchNormAct2d(4, eps=0.0, act_layer=nn.SiLU)) == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_split_batch_norm_is_what_evaluation_makes_of_it(training: bool) -> None:
    torch.manual_seed(0)
    net = random(nn.Sequential(nn.Conv2d(3, 8, 3), Split(8, 4), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    if not training:
        net.eval()
    folded = convert(net, X, method="fold")
    assert not any(is_batch_norm_like(m) for m in folded.modules())
    assert verify.same_function(net.eval(), folded.eval(), X, rtol=1e-4)


@pytest.mark.parametrize("method", [*NORM_FREE, "bcn", "ghost_bn", "online"])
def test_split_batch_norm_couples_samples_so_it_goes(method: str) -> None:
    def block(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), Split(8, 2))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = block(3), block(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return x + self.block(x)

    converted = convert(Net(), X, method=method)
    assert not any(isinstance(m, Split) for m in converted.modules())
    assert converted.train()(X).isfinite().all()
    assert converted.eval()(X).isfinite().all()


def test_batch_norm_in_evaluation_mode_is_not_frozen() -> None:
    """Torch's own couples samples again as soon as somebody says `train()`."""
    net = detector("torchvision")
    net.bn1 = nn.BatchNorm2d(8).eval().requires_grad_(False)
    assert [row.action for row in plan(net, X)] == ["replace", "leave", "replace", "replace"]
